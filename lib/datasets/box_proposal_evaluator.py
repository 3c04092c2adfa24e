"""Average recall of box proposals, as Detectron measures it.

Each image's best N proposals are paired with its objects one to one; recall at an IoU is the share
of objects whose partner overlaps them that much, and average recall (AR) its mean over IoU .50 to
.95. This is not COCO's recall: pairs are made greedily from the best overlap down, and boxes have
Detectron's +1 widths.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import utils.boxes as box_utils
from datasets.entry import RoidbEntry

# Areas of objects by the annotations' `area`, both ends inside.
AREAS: dict[str, tuple[float, float]] = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
    "96-128": (96.0**2, 128.0**2),
    "128-256": (128.0**2, 256.0**2),
    "256-512": (256.0**2, 512.0**2),
    "512-inf": (512.0**2, 1e10),
}
LIMITS = (100, 1000)
_SUFFIXES = {"": "all", "s": "small", "m": "medium", "l": "large"}
THRESHOLDS = np.arange(10) * 0.05 + 0.5


@dataclass(frozen=True)
class Recall:
    """What a set of objects is covered by.

    overlaps: float32 (num_objects,), ascending: IoU of each object with its partner, 0 without one.
    recalls: float64 (T,), share of the objects with that IoU or more, at each of `thresholds`.
    ar: their mean; -1 without objects.
    """

    overlaps: np.ndarray
    recalls: np.ndarray
    thresholds: np.ndarray
    ar: float


def evaluate_box_proposals(
    roidb: Sequence[RoidbEntry],
    thresholds: np.ndarray | None = None,
    area: str = "all",
    limit: int | None = None,
    class_specific: bool = False,
) -> Recall:
    """Recall of the proposals in a roidb: JsonDataset.get_roidb(gt=True, proposal_file=...).

    Args:
        thresholds: IoUs; .50, .55 ... .95 by default.
        area: a name in AREAS; objects outside it do not count.
        limit: proposals of an image that count, in the order of the file; None: all.
        class_specific: let every class have all proposals to itself, and average recalls over the
            classes that have objects.

    Returns:
        Recall; crowd regions are no objects. An image without proposals adds its objects only.
    """
    images = [_overlaps_of(entry) for entry in roidb]
    return _recall(images, _thresholds(thresholds), area, limit, class_specific)


def average_recalls(
    roidb: Sequence[RoidbEntry], class_specific: bool = False
) -> tuple[OrderedDict[str, float], dict[tuple[str, int], Recall]]:
    """`AR@100`, `ARs@100` ... `ARl@1000` (-1 where there are no objects), in Detectron's order, and
    the Recall behind each, by area and limit. Arguments as for evaluate_box_proposals()."""
    images = [_overlaps_of(entry) for entry in roidb]
    metrics: OrderedDict[str, float] = OrderedDict()
    recalls = {}
    for limit in LIMITS:
        for suffix, area in _SUFFIXES.items():
            recall = _recall(images, THRESHOLDS, area, limit, class_specific)
            metrics[f"AR{suffix}@{limit}"] = recall.ar
            recalls[area, limit] = recall
    return metrics, recalls


@dataclass(frozen=True)
class _Image:
    """iou: float32 (G, P) of objects and proposals; area and class of the objects."""

    iou: np.ndarray
    areas: np.ndarray
    classes: np.ndarray


def _overlaps_of(entry: RoidbEntry) -> _Image:
    objects = (entry["gt_classes"] > 0) & ~entry["is_crowd"]
    proposals = entry["boxes"][entry["gt_classes"] == 0]
    gt = entry["boxes"][objects]
    iou = np.zeros((len(gt), len(proposals)), dtype=np.float32)
    if iou.size:
        iou = np.ascontiguousarray(box_utils.bbox_overlaps(gt, proposals))
    return _Image(iou, entry["seg_areas"][objects], entry["gt_classes"][objects])


def _thresholds(given: np.ndarray | None) -> np.ndarray:
    return THRESHOLDS if given is None else np.asarray(given, dtype=np.float64)


def _recall(
    images: Sequence[_Image],
    thresholds: np.ndarray,
    area: str,
    limit: int | None,
    class_specific: bool,
) -> Recall:
    low, high = AREAS[area]
    found, labels = [], []
    for image in images:
        inside = (image.areas >= low) & (image.areas <= high)
        groups = [inside]
        if class_specific:
            groups = [inside & (image.classes == c) for c in np.unique(image.classes[inside])]
        for group in groups:
            found.append(best_pairs(image.iou[group, :limit]))
            labels.append(image.classes[group])
    overlaps = np.concatenate([np.zeros(0, np.float32), *found])
    labels = np.concatenate([np.zeros(0, np.int32), *labels])
    # In the precision of the IoUs: one of exactly .7 would miss a .7 of float64.
    hit = overlaps[:, None] >= thresholds.astype(np.float32)
    if not len(overlaps):
        return Recall(overlaps, np.full(len(thresholds), -1.0), thresholds, -1.0)
    recalls = hit.mean(axis=0, dtype=np.float64)
    if class_specific:
        recalls = np.mean([hit[labels == c].mean(axis=0) for c in np.unique(labels)], axis=0)
    return Recall(np.sort(overlaps), recalls, thresholds, float(recalls.mean()))


def best_pairs(iou: np.ndarray) -> np.ndarray:
    """Overlap of each of G objects with its own of P proposals: float32 (G,), best pair first.

    iou: (G, P). The pair of the largest IoU is taken and both leave, until either side is empty;
    objects that stay alone have 0.
    """
    pairs = np.zeros(len(iou), dtype=np.float32)
    left = iou.copy()
    for i in range(min(iou.shape)):
        obj, proposal = divmod(int(left.argmax()), left.shape[1])
        pairs[i] = left[obj, proposal]
        left[obj], left[:, proposal] = -1, -1
    return pairs
