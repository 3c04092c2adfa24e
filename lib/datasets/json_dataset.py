"""A data set in COCO's JSON format, and its roidb: one plain dict per image (datasets.entry)."""

from __future__ import annotations

import collections
import logging
import os
from functools import cached_property
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

import utils.keypoints as keypoint_utils
from core.config import cfg
from core.errors import UserError
from datasets.annotations import load_annotations
from datasets.dataset_catalog import get_entry
from datasets.entry import RoidbEntry, make_entry
from datasets.proposals import ProposalFiles, add_proposals, load_proposals
from utils.segms import usable_polygons

logger = logging.getLogger(__name__)

_DEBUG_IMAGES = 100


class JsonDataset:
    """A data set of the catalog (datasets.dataset_catalog), by name.

    The annotation file and the image directory must exist (UserError otherwise); annotations are
    read when first needed. findings: what was odd about the ground truth, with counts; set by
    get_roidb(gt=True).
    """

    def __init__(self, name: str) -> None:
        self.name = name
        entry = get_entry(name)
        self.annotation_file: Path = entry.annotation_file()
        self.image_directory, self.image_prefix = entry.image_dir()
        self.findings: collections.Counter[str] = collections.Counter()

    @cached_property
    def COCO(self) -> COCO:
        return load_annotations(self.annotation_file)

    @cached_property
    def category_to_id_map(self) -> dict[str, int]:
        """Class name to the annotation file's category id."""
        return {c["name"]: c["id"] for c in self.COCO.dataset["categories"]}

    @cached_property
    def classes(self) -> list[str]:
        """Class names by label, '__background__' first."""
        return ["__background__"] + [c["name"] for c in self.COCO.dataset["categories"]]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def json_category_id_to_contiguous_id(self) -> dict[int, int]:
        return {c["id"]: i + 1 for i, c in enumerate(self.COCO.dataset["categories"])}

    @cached_property
    def contiguous_category_id_to_json_id(self) -> dict[int, int]:
        return {v: k for k, v in self.json_category_id_to_contiguous_id.items()}

    @cached_property
    def keypoints(self) -> list[str] | None:
        """Names of the keypoints, from the category that has any; None without keypoints."""
        for category in self.COCO.dataset["categories"]:
            if category.get("keypoints"):
                return list(category["keypoints"])
        return None

    @property
    def num_keypoints(self) -> int:
        return len(self.keypoints or ())

    @property
    def keypoint_flip_map(self) -> dict[str, str] | None:
        """{left name: right name}; None without keypoints."""
        return keypoint_utils.keypoint_flip_map(self.keypoints) if self.keypoints else None

    @cached_property
    def image_ids(self) -> list:
        """Ids of the images, ascending: the order of the roidb. DEBUG keeps the first 100."""
        ids = sorted(self.COCO.getImgIds())
        return ids[:_DEBUG_IMAGES] if cfg.DEBUG else ids

    @property
    def has_annotations(self) -> bool:
        """False for COCO's image_info files, whose results only a server can score."""
        return "annotations" in self.COCO.dataset

    def image_path(self, file_name: str) -> str:
        """Path of an image, by its file name in the annotations."""
        return os.path.join(self.image_directory, self.image_prefix + file_name)

    def get_roidb(
        self,
        gt: bool = False,
        proposal_file: ProposalFiles | None = None,
        crowd_filter_thresh: float = 0,
    ) -> list[RoidbEntry]:
        """One entry per image, ordered by image id, not flipped.

        gt: include the ground truth (cleaned as Detectron does; dropped objects are logged).
        proposal_file: boxes to append to each entry, as they are in training; those that lie
        within crowd regions by more than crowd_filter_thresh (0: off) count as neither foreground
        nor background. Raises UserError for a missing image, a box wholly outside its image, or
        a bad proposal file.
        """
        self.findings.clear()
        stray = sum(
            len(self.COCO.imgToAnns[i]) for i in self.COCO.imgToAnns.keys() - self.COCO.imgs
        )
        if gt and stray:
            self.findings["objects of images that the file does not list"] = stray
        roidb = []
        for image in self.COCO.loadImgs(self.image_ids):
            objects = self.COCO.imgToAnns.get(image["id"], []) if gt else []
            roidb.append(self._image_entry(image, objects))
        check_images_exist(roidb, self.annotation_file)
        self.log_findings()
        if proposal_file is not None:
            proposals = load_proposals(
                proposal_file, roidb, limit=0 if gt else cfg.TEST.PROPOSAL_LIMIT
            )
            add_proposals(roidb, proposals, crowd_filter_thresh)
        return roidb

    def log_findings(self) -> None:
        """Say how many objects were dropped or changed, and why."""
        if self.findings:
            counts = ", ".join(f"{count} {what}" for what, count in sorted(self.findings.items()))
            logger.info("%s: %s", self.name, counts)

    def _image_entry(self, image: dict, objects: list[dict]) -> RoidbEntry:
        height, width = image["height"], image["width"]
        kept, boxes = [], []
        for obj in objects:
            box, reason = _clean_box(obj, height, width)
            if reason == _OUTSIDE:
                raise UserError(
                    f"annotation file {self.annotation_file}: annotation {obj['id']} has its box "
                    f"{obj['bbox']} outside its image {image['file_name']} ({width} x {height}); "
                    "correct or remove it (boxes are [x, y, width, height])"
                )
            if reason:
                self.findings[reason] += 1
            if box is not None:
                kept.append(obj)
                boxes.append(box)
        return make_entry(
            image_id=image["id"],
            image=self.image_path(image["file_name"]),
            height=height,
            width=width,
            num_classes=self.num_classes,
            boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
            gt_classes=np.array(
                [self.json_category_id_to_contiguous_id[o["category_id"]] for o in kept], np.int32
            ),
            is_crowd=np.array([o["iscrowd"] for o in kept], dtype=bool),
            seg_areas=np.array([o["area"] for o in kept], dtype=np.float32),
            segms=[self._segmentation(o, height, width) for o in kept],
            gt_keypoints=self._keypoints(kept) if self.keypoints else None,
        )

    def _keypoints(self, objects: list[dict]) -> np.ndarray:
        keypoints = np.zeros((len(objects), 3, self.num_keypoints), dtype=np.int32)
        for row, obj in zip(keypoints, objects, strict=True):
            if "keypoints" not in obj:
                continue
            if len(obj["keypoints"]) != 3 * self.num_keypoints:
                raise UserError(
                    f"annotation file {self.annotation_file}: annotation {obj['id']} has "
                    f"{len(obj['keypoints'])} keypoint numbers; the category's "
                    f"{self.num_keypoints} keypoints need {3 * self.num_keypoints}"
                )
            row[:] = np.array(obj["keypoints"]).reshape(-1, 3).T
        return keypoints

    def _segmentation(self, obj: dict, height: int, width: int) -> list | dict:
        """The object's polygons of at least 3 points, or its RLE, checked."""
        segm = obj["segmentation"]
        problem = _mask_problem(segm, height, width)
        if problem:
            raise UserError(
                f"annotation file {self.annotation_file}: the segmentation of annotation "
                f"{obj['id']} {problem}; correct or remove it"
            )
        if isinstance(segm, dict):
            return segm
        return [np.array(p, dtype=np.float64) for p in usable_polygons(segm)]


_OUTSIDE = "objects outside their image"


def _clean_box(obj: dict, height: int, width: int) -> tuple[list[float] | None, str]:
    """(box xyxy clipped to the image, or None to drop the object; what is odd about it, or '')."""
    x, y, w, h = obj["bbox"]
    if obj["area"] < cfg.TRAIN.GT_MIN_AREA:
        return None, "objects dropped as smaller than TRAIN.GT_MIN_AREA"
    if obj.get("ignore") == 1:
        return None, "objects dropped as marked 'ignore'"
    if obj["area"] <= 0 or w <= 0 or h <= 0:
        return None, "objects dropped as without area"
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return None, _OUTSIDE
    x1, x2 = (min(max(v, 0), width - 1) for v in (x, x + max(0, w - 1)))
    y1, y2 = (min(max(v, 0), height - 1) for v in (y, y + max(0, h - 1)))
    if not (x2 > x1 and y2 > y1):  # said so that a NaN is dropped too
        return None, "objects dropped as one pixel wide or high (inside the image)"
    # Annotations are rounded: less than a pixel over the edge is nothing to report.
    beyond = max(-x, -y, x + w - width, y + h - height) >= 1
    return [x1, y1, x2, y2], "boxes clipped to their image" if beyond else ""


def _mask_problem(segm: list | dict, height: int, width: int) -> str:
    """What makes a segmentation unusable; '' if nothing does."""
    if not isinstance(segm, dict):
        odd = any(not isinstance(p, list) or len(p) % 2 for p in segm)
        return "has a polygon that is not a list x1, y1, x2, y2, ..." if odd else ""
    if list(segm.get("size", ())) != [height, width]:
        return f"has size {segm.get('size')}, its image {[height, width]}"
    return "" if "counts" in segm else "has no counts"


def check_images_exist(roidb: list[RoidbEntry], annotation_file: Path) -> None:
    """Raise UserError naming the first missing image file and how many there are."""
    missing = [entry["image"] for entry in roidb if not os.path.exists(entry["image"])]
    if missing:
        others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise UserError(
            f"image {missing[0]}{others}, listed in {annotation_file}, does not exist; "
            "complete the image directory or correct the annotations"
        )
