"""Precomputed proposals: reading Detectron's proposal files and adding them to a roidb."""

from __future__ import annotations

import logging
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

import utils.boxes as box_utils
from core.config import cfg
from core.errors import UserError
from datasets.dataset_catalog import own_proposals
from datasets.entry import RoidbEntry, set_overlaps
from utils.download import download
from utils.weights import unpickle_data

logger = logging.getLogger(__name__)

# What gives the proposals of one data set: a file, or several that share its images.
ProposalFiles = str | Path | tuple[str, ...]

_MIN_SIZE = 2  # proposals must be wider and higher than this, in image pixels


def proposal_files(split: str) -> tuple[ProposalFiles | None, ...]:
    """The proposal file of each data set of cfg.TRAIN or cfg.TEST (`split`); None for each if the
    model makes its own proposals. Users' data that name theirs themselves need no PROPOSAL_FILES.

    Several files are for one data set what each of them is for a part of its images: Detectron's
    are of coco_2014_train and coco_2014_valminusminival, which together are coco_2017_train.

    Raises UserError if there is not one file for each of several data sets.
    """
    names, files = cfg[split].DATASETS, cfg[split].PROPOSAL_FILES
    if not cfg.TEST.PRECOMPUTED_PROPOSALS:
        return (None,) * len(names)
    own = tuple(own_proposals(name) for name in names)
    if names and all(own):
        return own
    if len(names) == 1 and len(files) > 1:
        return (tuple(files),)
    if len(files) != len(names):
        raise UserError(
            f"without an RPN (MODEL.FASTER_RCNN False) {split}.PROPOSAL_FILES must name one file "
            f"for each of the data sets ({', '.join(names)}), not {len(files)}; set it, or write "
            "`proposals: FILE` into the data set's YAML file"
        )
    return tuple(files)


def proposal_file_for_testing(name: str) -> ProposalFiles | None:
    """The proposal file of a data set of cfg.TEST; None for one that is not of it or needs none.

    Raises UserError as proposal_files does.
    """
    return dict(zip(cfg.TEST.DATASETS, proposal_files("TEST"), strict=True)).get(name)


def load_proposals(
    files: ProposalFiles, roidb: Sequence[RoidbEntry], limit: int = 0
) -> list[np.ndarray]:
    """Proposals of each image of a roidb: float32 (R, 4) xyxy in image pixels.

    A file is a pickled dict of per-image lists `boxes`, `scores` and `ids` (or `indexes`), in any
    order of images; it may hold more images, and several may hold them together. A URL
    is fetched into DATA_DIR/proposals first. Boxes are clipped to their image, and those that
    repeat an earlier one after rounding or are at most 2 pixels wide or high are left out;
    limit > 0 keeps the first ones.
    Raises UserError naming the file if it is missing, damaged, or lacks an image.
    """
    paths = [_local(str(file)) for file in ((files,) if isinstance(files, str | Path) else files)]
    path = " and ".join(map(str, paths))
    parts = [read_proposal_file(part) for part in paths]
    data = {key: [value for part in parts for value in part[key]] for key in ("boxes", "ids")}
    positions = {image_id: i for i, image_id in enumerate(data["ids"])}
    missing = [entry["id"] for entry in roidb if entry["id"] not in positions]
    if missing:
        raise UserError(
            f"proposal file {path} lacks {len(missing)} of {len(roidb)} images (first: id "
            f"{missing[0]}); use the file made for this data set"
        )
    proposals = []
    for entry in roidb:
        boxes = _boxes_of_image(data["boxes"][positions[entry["id"]]], entry["id"], path)
        boxes = box_utils.clip_boxes_to_image(boxes, entry["height"], entry["width"])
        boxes = boxes[box_utils.unique_boxes(boxes)]
        boxes = boxes[box_utils.filter_small_boxes(boxes, _MIN_SIZE)]
        proposals.append(boxes[:limit] if limit > 0 else boxes)
    logger.info("Loaded %d proposals from %s", sum(map(len, proposals)), path)
    return proposals


def read_proposal_file(path: str | Path) -> dict[str, Any]:
    """`boxes`, `scores` and `ids` of a proposal file, lists of equal length; it can not run code.

    Raises UserError naming the file if it is missing, damaged, or another kind of file.
    """
    try:
        with open(path, "rb") as file:
            data = unpickle_data(file)
    except OSError as error:
        raise UserError(
            f"proposal file {path} cannot be read ({error.strerror}); correct the path in "
            "PROPOSAL_FILES or make the file by testing an RPN (MODEL.RPN_ONLY)"
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"proposal file {path} is not a file of proposals ({reason})") from error
    if isinstance(data, dict) and "ids" not in data and "indexes" in data:
        data["ids"] = data["indexes"]  # selective search, as Detectron converts it
    lists = ("boxes", "scores", "ids")
    if not isinstance(data, dict) or any(key not in data for key in lists):
        raise UserError(f"proposal file {path} is not a dict with 'boxes', 'scores' and 'ids'")
    for key in lists:
        if not isinstance(data[key], (list, tuple, np.ndarray)):
            raise UserError(
                f"proposal file {path}: its {key!r} is not a list with an entry an image"
            )
    if len({len(data[key]) for key in lists}) != 1:
        raise UserError(f"proposal file {path}: its lists differ in length; make it anew")
    data["ids"] = [i.item() if isinstance(i, np.generic) else i for i in data["ids"]]
    if not all(isinstance(i, (int, str)) for i in data["ids"]):
        raise UserError(f"proposal file {path}: its 'ids' are not image ids (numbers or strings)")
    return data


def _local(name: str) -> Path:
    """The file that PROPOSAL_FILES names; one that is given by a URL is fetched once."""
    if not name.startswith(("https://", "http://")):
        return Path(name)
    path = Path(cfg.DATA_DIR) / "proposals" / urllib.parse.urlparse(name).path.lstrip("/")
    if ".." in path.parts:
        raise UserError(f"PROPOSAL_FILES: {name} is not a URL of a file")
    if not path.is_file():
        download(name, path, read_proposal_file)
    return path


def _boxes_of_image(values: Any, image_id: int | str, path: str) -> np.ndarray:
    try:
        boxes = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError):
        boxes = np.full(1, np.nan)
    if boxes.size == 0:
        return np.zeros((0, 4), dtype=np.float32)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise UserError(
            f"proposal file {path}: the boxes of image {image_id} are not rows of four numbers "
            "x1, y1, x2, y2; make the file anew"
        )
    return boxes


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
