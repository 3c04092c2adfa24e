"""Which detections are right, which wrong and why, and which objects are missed, for people to see.

The numbers are COCO's evaluators'; this is their matching at one IoU, kept for each box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as mask_util

import utils.boxes as box_utils
from datasets.json_dataset import JsonDataset

RIGHT_IOU = 0.5
NEAR_IOU = 0.1  # from here to RIGHT_IOU an object is found, but badly placed

# What a detection is. Ignored: within a crowd, or on an object that is not to be found.
RIGHT, TWICE, MISPLACED, CONFUSED, NOTHING, IGNORED = range(6)
NAMES = ("right", "found twice", "poor localisation", "wrong class", "nothing there", "ignored")


@dataclass(frozen=True)
class ImageMatches:
    """One image's boxes (xyxy, image pixels) and how they relate.

    boxes (D, 5) with scores, best first; labels (D,); rows (D,): index of each detection in
    `all_boxes[label][image]`; kinds (D,): RIGHT ... IGNORED; seen_as (D,): label of the object that
    the detection overlaps most by RIGHT_IOU or more, -1 without one.
    gt_boxes (G, 4), gt_labels (G,), gt_ids (G,) of annotations, gt_wanted (G,) bool: neither crowd
    nor ignored; gt_scores (G,): of the detection that is right about it, NaN if it is missed.
    """

    boxes: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    kinds: np.ndarray
    seen_as: np.ndarray
    gt_boxes: np.ndarray
    gt_labels: np.ndarray
    gt_ids: list[int]
    gt_wanted: np.ndarray
    gt_scores: np.ndarray


def match_image(dataset: JsonDataset, all_boxes: Sequence, index: int) -> ImageMatches:
    """Match the detections in image number `index` with its objects, best score first."""
    objects = dataset.COCO.imgToAnns.get(dataset.image_ids[index], [])
    to_label = dataset.json_category_id_to_contiguous_id
    gt_xywh = np.array([o["bbox"] for o in objects], dtype=np.float64).reshape(-1, 4)
    gt_labels = np.array([to_label[o["category_id"]] for o in objects], dtype=np.int64)
    crowd = np.array([bool(o["iscrowd"]) for o in objects], dtype=bool)
    skip = crowd | np.array([o.get("ignore", 0) == 1 for o in objects], dtype=bool)

    per_label = [np.asarray(of[index], dtype=np.float64).reshape(-1, 5) for of in all_boxes]
    labels = np.repeat(np.arange(len(per_label)), [len(b) for b in per_label])
    rows = np.concatenate([np.arange(len(b)) for b in per_label])
    boxes = np.concatenate(per_label)
    order = np.argsort(-boxes[:, 4], kind="stable")
    boxes, labels, rows = boxes[order], labels[order], rows[order]

    kinds = np.full(len(boxes), NOTHING)
    seen_as = np.full(len(boxes), -1)
    gt_scores = np.full(len(objects), np.nan)
    if len(boxes) and len(objects):
        xywh = box_utils.xyxy_to_xywh(boxes[:, :4])
        ious = mask_util.iou(xywh, gt_xywh, crowd.astype(np.uint8))
        overlapping = np.where(skip, 0, ious)
        most = overlapping.argmax(axis=1)
        enough = overlapping.max(axis=1) >= RIGHT_IOU
        seen_as[enough] = gt_labels[most[enough]]
        # Most detections are near nothing and need no closer look.
        for i in np.flatnonzero(ious.max(axis=1) >= NEAR_IOU):
            same = gt_labels == labels[i]
            free = same & ~skip & np.isnan(gt_scores) & (ious[i] >= RIGHT_IOU)
            if free.any():
                kinds[i] = RIGHT
                gt_scores[np.where(free, ious[i], -1).argmax()] = boxes[i, 4]
            elif (same & skip & (ious[i] >= RIGHT_IOU)).any():
                kinds[i] = IGNORED
            elif (same & ~skip & (ious[i] >= RIGHT_IOU)).any():
                kinds[i] = TWICE
            elif enough[i]:
                kinds[i] = CONFUSED
            elif (same & ~skip & (ious[i] >= NEAR_IOU)).any():
                kinds[i] = MISPLACED
    return ImageMatches(
        boxes,
        labels,
        rows,
        kinds,
        seen_as,
        np.concatenate((gt_xywh[:, :2], gt_xywh[:, :2] + gt_xywh[:, 2:] - 1), axis=1),
        gt_labels,
        [o["id"] for o in objects],
        ~skip,
        gt_scores,
    )


def confusion(matches: Sequence[ImageMatches], num_classes: int, thresh: float) -> np.ndarray:
    """(num_classes, num_classes) counts: row: what is there, column: what it was taken for.

    Row 0: detections of nothing; column 0: objects that no detection overlaps enough. Only
    detections that score at least thresh. An object that is found right counts as that alone.
    """
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    for m in matches:
        shown = m.boxes[:, 4] >= thresh
        found = m.gt_wanted & (m.gt_scores >= thresh)
        np.add.at(counts, (m.gt_labels[found], m.gt_labels[found]), 1)
        wrong = shown & (m.kinds == CONFUSED)
        np.add.at(counts, (m.seen_as[wrong], m.labels[wrong]), 1)
        nothing = shown & np.isin(m.kinds, (NOTHING, MISPLACED))
        np.add.at(counts[0], m.labels[nothing], 1)
        np.add.at(counts[:, 0], m.gt_labels[m.gt_wanted & ~found], 1)
    return counts
