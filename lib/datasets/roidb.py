"""The training roidb: ground truth of all training sets, flipped copies, filtered, ranked."""

from __future__ import annotations

import collections
import logging
from collections.abc import Sequence

import numpy as np

import utils.keypoints as keypoint_utils
import utils.segms as segm_utils
from core.attr_dict import AttrDict
from core.config import cfg
from core.errors import UserError
from datasets.entry import RoidbEntry
from datasets.json_dataset import JsonDataset
from datasets.proposals import ProposalFiles, add_proposals, load_proposals
from datasets.roidb_cache import cached_gt_roidb

logger = logging.getLogger(__name__)


def combined_roidb_for_training(
    dataset_names: str | Sequence[str], proposal_files: str | Sequence[ProposalFiles | None] = ()
) -> tuple[list[RoidbEntry], np.ndarray, np.ndarray]:
    """Load and join the roidbs of one or more training sets.

    Each set contributes its images and then (TRAIN.USE_FLIPPED) their mirrored copies; images
    without anything to train on are dropped, which is logged with reasons.
    proposal_files: precomputed proposals, one file (or None) per data set, or none at all; the
    images of a single data set may be shared out among several files.

    Returns (roidb, ratio_list, ratio_index): the last two as `rank_for_training` says.
    Raises UserError for missing or wrong files, if no image is left, and if a mask model gets no
    mask.
    """
    names = (dataset_names,) if isinstance(dataset_names, str) else tuple(dataset_names)
    files = (proposal_files,) if isinstance(proposal_files, str) else tuple(proposal_files)
    if not names:
        raise UserError("there is no training data set; give one with --dataset or TRAIN.DATASETS")
    if len(names) == 1 and len(files) > 1:
        files = (files,)
    if files and len(files) != len(names):
        raise UserError(
            f"TRAIN.PROPOSAL_FILES has {len(files)} files for {len(names)} data sets; give one each"
        )
    roidb: list[RoidbEntry] = []
    for i, name in enumerate(names):
        roidb.extend(_dataset_roidb(name, files[i] if files else None))
    roidb = filter_for_training(roidb)
    if not roidb:
        raise UserError(
            f"no image of {', '.join(names)} has an object to train on; check the annotations "
            "(the log says why images were dropped)"
        )
    if cfg.MODEL.MASK_ON and not any(any(entry["segms"]) for entry in roidb):
        raise UserError(
            f"no object of {', '.join(names)} has a mask to train MODEL.MASK_ON with; annotate "
            "segmentations or set MODEL.MASK_ON False"
        )
    ratio_list, ratio_index = rank_for_training(roidb)
    return roidb, ratio_list, ratio_index


def _dataset_roidb(name: str, proposal_file: ProposalFiles | None) -> list[RoidbEntry]:
    dataset = JsonDataset(name)
    roidb = cached_gt_roidb(dataset)
    _check_num_classes(name, roidb)
    if proposal_file is not None:
        proposals = load_proposals(proposal_file, roidb)
        add_proposals(roidb, proposals, cfg.TRAIN.CROWD_FILTER_THRESH)
    if cfg.TRAIN.USE_FLIPPED:
        # Only keypoints need the names, which would read the annotations in spite of the cache.
        has_keypoints = bool(roidb) and "gt_keypoints" in roidb[0]
        extend_with_flipped_entries(roidb, dataset.keypoints if has_keypoints else None)
    logger.info("Loaded data set %s: %d images%s", name, len(roidb), _flipped_note())
    return roidb


def _flipped_note() -> str:
    return " (half of them mirrored)" if cfg.TRAIN.USE_FLIPPED else ""


def _check_num_classes(name: str, roidb: list[RoidbEntry]) -> None:
    if not roidb:
        return
    num_classes = roidb[0]["gt_overlaps"].shape[1]
    if cfg.MODEL.NUM_CLASSES not in (-1, num_classes):
        raise UserError(
            f"data set {name} has {num_classes} classes (with background) but MODEL.NUM_CLASSES "
            f"is {cfg.MODEL.NUM_CLASSES}; set it to {num_classes}"
        )


def extend_with_flipped_entries(
    roidb: list[RoidbEntry], keypoint_names: Sequence[str] | None = None
) -> None:
    """Append the mirrored copy of every entry, in order, in place.

    keypoint_names: of the entries' gt_keypoints, if they have any.
    """
    flip_map = keypoint_utils.keypoint_flip_map(keypoint_names or ())
    flipped = []
    for entry in roidb:
        # Arrays that do not change are shared with the original: nothing modifies them.
        mirrored = dict(entry, flipped=True)
        mirrored["boxes"] = _flip_boxes(entry["boxes"], entry["width"])
        mirrored["segms"] = segm_utils.flip_segms(entry["segms"], entry["height"], entry["width"])
        if keypoint_names:
            mirrored["gt_keypoints"] = keypoint_utils.flip_keypoints(
                keypoint_names, flip_map, entry["gt_keypoints"], entry["width"]
            )
        flipped.append(mirrored)
    roidb.extend(flipped)


def _flip_boxes(boxes: np.ndarray, width: int) -> np.ndarray:
    # utils.boxes.flip_boxes without the way through torch, which takes longer than the sum.
    flipped = boxes.copy()
    flipped[:, 0::2] = width - boxes[:, 2::-2] - 1
    return flipped


def filter_for_training(roidb: list[RoidbEntry]) -> list[RoidbEntry]:
    """Drop images that give no training example; log how many and why.

    An image stays if a box has its largest overlap >= TRAIN.FG_THRESH or in [BG_THRESH_LO,
    BG_THRESH_HI), and, for keypoint models, a visible keypoint. TRAIN.KEEP_IMAGES_WITHOUT_OBJECTS
    also keeps images without any object other than crowd regions.
    """
    train, keypoints = cfg.TRAIN, cfg.MODEL.KEYPOINTS_ON
    kept, reasons = [], collections.Counter()
    for entry in roidb:
        reason = _why_useless(entry, train, keypoints)
        if reason:
            reasons[reason] += 1
        else:
            kept.append(entry)
    if reasons:
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        logger.info("Dropped %d of %d images: %s", len(roidb) - len(kept), len(roidb), why)
    return kept


def _why_useless(entry: RoidbEntry, train: AttrDict, keypoints: bool) -> str:
    """Why an image cannot be trained on; '' if it can. train is cfg.TRAIN."""
    overlaps = entry["max_overlaps"]
    usable = overlaps >= train.FG_THRESH
    if not usable.any():
        usable = (overlaps >= train.BG_THRESH_LO) & (overlaps < train.BG_THRESH_HI)
    if not usable.any():
        empty = not (~entry["is_crowd"] & (entry["gt_classes"] > 0)).any()
        if empty and train.KEEP_IMAGES_WITHOUT_OBJECTS:
            return ""
        if len(entry["boxes"]) == 0:
            return "without objects"
        return "with crowd regions only" if empty else "without a usable box"
    if keypoints and not entry["has_visible_keypoints"]:
        return "without a visible keypoint"
    return ""


def rank_for_training(roidb: list[RoidbEntry]) -> tuple[np.ndarray, np.ndarray]:
    """Sort images by aspect ratio.

    Returns (ratio_list float64, ascending width / height; ratio_index int64, the roidb index of
    each). With TRAIN.ASPECT_CROPPING ratios are clipped to [ASPECT_LO, ASPECT_HI]. Sets
    entry['need_crop']: whether the image lies outside that range.
    """
    lo, hi = cfg.TRAIN.ASPECT_LO, cfg.TRAIN.ASPECT_HI
    ratios = np.array([entry["width"] / entry["height"] for entry in roidb])
    need_crop = np.zeros(len(roidb), dtype=bool)
    if cfg.TRAIN.ASPECT_CROPPING:
        need_crop = (ratios < lo) | (ratios > hi)
        ratios = np.clip(ratios, lo, hi)
        logger.info("%d of %d images will be cropped", need_crop.sum(), len(roidb))
    for entry, crop in zip(roidb, need_crop.tolist(), strict=True):
        entry["need_crop"] = crop
    ratio_index = np.argsort(ratios, kind="stable")
    return ratios[ratio_index], ratio_index
