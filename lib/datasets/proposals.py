"""Precomputed proposals: reading Detectron's proposal files and adding them to a roidb."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

import utils.boxes as box_utils
from core.errors import UserError
from datasets.entry import RoidbEntry, set_overlaps

_MIN_SIZE = 2  # proposals must be wider and higher than this, in image pixels


class _ArrayUnpickler(pickle.Unpickler):
    """Loads plain data and numpy arrays only: a proposal file must not be able to run code."""

    _ALLOWED = {
        ("_codecs", "encode"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def load_proposals(
    path: str | Path, roidb: Sequence[RoidbEntry], limit: int = 0
) -> list[np.ndarray]:
    """Proposals of each image of a roidb: float32 (R, 4) xyxy in image pixels.

    The file is a pickled dict of per-image lists `boxes`, `scores` and `ids` (or `indexes`), in
    any order of images. Boxes are clipped to their image, and those that repeat an earlier one
    after rounding or are at most 2 pixels wide or high are left out; limit > 0 keeps the first
    ones. Raises UserError naming the file if it is missing, damaged, or lacks an image.
    """
    data = _read(Path(path))
    positions = {image_id: i for i, image_id in enumerate(data["ids"])}
    missing = [entry["id"] for entry in roidb if entry["id"] not in positions]
    if missing:
        raise UserError(
            f"proposal file {path} lacks {len(missing)} of {len(roidb)} images (first: id "
            f"{missing[0]}); use the file made for this data set"
        )
    proposals = []
    for entry in roidb:
        boxes = np.asarray(data["boxes"][positions[entry["id"]]], dtype=np.float32).reshape(-1, 4)
        boxes = box_utils.clip_boxes_to_image(boxes, entry["height"], entry["width"])
        boxes = boxes[box_utils.unique_boxes(boxes)]
        boxes = boxes[box_utils.filter_small_boxes(boxes, _MIN_SIZE)]
        proposals.append(boxes[:limit] if limit > 0 else boxes)
    return proposals


def _read(path: Path) -> dict[str, Any]:
    try:
        data = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except OSError as error:
        raise UserError(f"proposal file {path} cannot be read ({error.strerror})") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"proposal file {path} is not a file of proposals ({error})") from error
    if isinstance(data, dict) and "indexes" in data:
        data["ids"] = data["indexes"]
    lists = ("boxes", "scores", "ids")
    if not isinstance(data, dict) or any(key not in data for key in lists):
        raise UserError(f"proposal file {path} is not a dict with 'boxes', 'scores' and 'ids'")
    if len({len(data[key]) for key in lists}) != 1:
        raise UserError(f"proposal file {path}: its lists differ in length; make it anew")
    return data


def add_proposals(
    roidb: Sequence[RoidbEntry], proposals: Sequence[np.ndarray], crowd_filter_thresh: float
) -> None:
    """Append proposals (float32 (R, 4) per entry) to the entries' boxes, in place.

    A proposal has class 0; its overlap with the class of the ground truth (crowd included) that
    it overlaps most is their IoU. With crowd_filter_thresh > 0, one that lies within a crowd box
    by more than that share of its area gets overlap -1: neither foreground nor background.
    """
    for entry, boxes in zip(roidb, proposals, strict=True):
        _append(entry, boxes, crowd_filter_thresh)


def _append(entry: RoidbEntry, boxes: np.ndarray, crowd_filter_thresh: float) -> None:
    n, gt_boxes = len(boxes), entry["boxes"]
    overlaps = np.zeros((n, entry["gt_overlaps"].shape[1]), dtype=np.float32)
    gt_index = np.full(n, -1, dtype=np.int32)
    if n and len(gt_boxes):
        iou = box_utils.bbox_overlaps(boxes, gt_boxes)
        best, best_iou = iou.argmax(axis=1), iou.max(axis=1)
        touches = np.flatnonzero(best_iou > 0)
        overlaps[touches, entry["gt_classes"][best[touches]]] = best_iou[touches]
        gt_index[touches] = best[touches]
        crowd = gt_boxes[entry["is_crowd"]]
        if crowd_filter_thresh > 0 and len(crowd):
            xywh = box_utils.xyxy_to_xywh
            inside = mask_util.iou(
                xywh(boxes).astype(np.float64), xywh(crowd).astype(np.float64), [1] * len(crowd)
            )
            overlaps[inside.max(axis=1) > crowd_filter_thresh] = -1.0
    dtype = {key: entry[key].dtype for key in ("gt_classes", "seg_areas", "is_crowd")}
    for key, kind in dtype.items():
        entry[key] = np.concatenate((entry[key], np.zeros(n, dtype=kind)))
    entry["boxes"] = np.concatenate((gt_boxes, boxes.astype(np.float32)))
    entry["box_to_gt_ind_map"] = np.concatenate((entry["box_to_gt_ind_map"], gt_index))
    set_overlaps(entry, np.concatenate((entry["gt_overlaps"].toarray(), overlaps)))
