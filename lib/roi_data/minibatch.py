"""From roidb entries to the arrays of a mini-batch: decode, draw, pack.

Nothing here resizes or normalises pixels: images stay uint8 at their own size and are prepared on
the device (utils.blob.images_to_blob), from the meta table that is packed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import utils.blob as blob_utils
import utils.segms as segm_utils
from core.config import cfg
from core.errors import UserError
from roi_data.augment import (
    AugmentOptions,
    colour_jitter,
    cut_around_object,
    large_scale_jitter,
    random_crop,
)
from roi_data.crop import View, choose_window
from roi_data.keypoint_rcnn import KeypointQuota
from utils.image import read_image
from utils.packed_roidb import RoidbEntry

# Inputs of a batch that may be longer than what is used of them: offsets and indices beside them
# say what is, and planes are zero beyond.
GROWING_INPUTS = frozenset({"data", "gt_poly_coords", "gt_poly_offsets", "gt_bitmasks"})

_MIN_SLOTS = 8  # for ground truth or proposals of an image; more are added in powers of two


@dataclass(frozen=True)
class MinibatchOptions:
    """What the config says about mini-batches, as values that loader processes can be given."""

    scales: tuple[int, ...]
    max_size: int
    stride: int
    ims_per_batch: int
    masks: bool
    keypoints: bool
    augment: AugmentOptions = AugmentOptions()
    keypoint_quota: KeypointQuota | None = None  # what a mini-batch must have, or is redrawn

    @classmethod
    def from_cfg(cls) -> MinibatchOptions:
        return cls(
            scales=tuple(cfg.TRAIN.SCALES),
            max_size=cfg.TRAIN.MAX_SIZE,
            stride=blob_utils.coarsest_stride(),
            ims_per_batch=cfg.TRAIN.IMS_PER_BATCH,
            masks=cfg.MODEL.MASK_ON,
            keypoints=cfg.MODEL.KEYPOINTS_ON,
            augment=AugmentOptions.from_cfg(),
            keypoint_quota=KeypointQuota.from_cfg(),
        )


@dataclass(frozen=True)
class Sample:
    """One decoded training image with its draws.

    image: uint8 (H, W, 3) BGR as in the file (not flipped, not resized; colours as drawn).
    out_hw: its size after resizing by `scale` and cropping; crop_xy: where the crop starts in the
    resized image.
    entry: ground truth of the flipped and cropped image, in original-image pixels.
    """

    image: np.ndarray
    entry: RoidbEntry
    scale: float
    out_hw: tuple[int, int]
    crop_xy: tuple[int, int]


def get_sample(
    entry: RoidbEntry,
    ratio: float,
    seed: int,
    options: MinibatchOptions,
    out: np.ndarray | None = None,
) -> Sample:
    """Read an image and make its draws (colours, scale, crop), which depend on `seed` alone.

    ratio: width / height to crop to, for entries with need_crop. out: memory to decode into,
    uint8 (height, width, 3). Raises UserError naming the image if it cannot be read or has
    another size than its annotations say.
    """
    rng = np.random.RandomState(seed)
    height, width = entry["height"], entry["width"]
    image = read_image(entry["image"], (height, width), out)
    target_size = options.scales[rng.randint(len(options.scales))]
    scale = blob_utils.get_target_scale(height, width, target_size, options.max_size)
    canvas = blob_utils.scaled_size(height, width, scale)
    augment = options.augment
    if augment.jitters_colour:
        colour_jitter(image, augment, rng)
    if augment.jitters_scale:
        scale = large_scale_jitter(scale, augment.scale_jitter, rng)
    resized = blob_utils.scaled_size(height, width, scale)
    view = View(entry, scale, (max(resized[0], 1), max(resized[1], 1)))
    if augment.jitters_scale:
        cut_around_object(view, canvas, rng)
    if augment.crop_prob > 0 and rng.uniform() < augment.crop_prob:
        random_crop(view, augment.crop_min, rng)
    if entry.get("need_crop"):
        view.cut(choose_window(view.entry, view.out_hw, scale, ratio, rng))
    return Sample(image, view.entry, scale, view.out_hw, view.crop_xy)


def pack_minibatch(
    samples: Sequence[Sample], options: MinibatchOptions, pixels: Tensor | None = None
) -> dict[str, Any]:
    """The arrays of one GPU's mini-batch of N images with G ground-truth slots each.

    pixels: the images back to back, if they were decoded into such memory; else they are copied.

    data            uint8 (B,)         BGR pixels of all images, back to back
    im_meta         float64 (N, 9)     a row per image, as ops.image_batch takes it
    blob_size       (int, int)         height and width of the padded network input
    im_info         float32 (N, 3)     height and width before padding, scale
    gt_boxes        float32 (N, G, 4)  xyxy, original-image pixels (flipped, cropped); 0 = unused
    gt_classes      int64 (N, G)       0 = unused slot
    gt_crowd        bool (N, G)
    gt_keypoints    float32 (N, G, K, 3)  x, y, visibility; only for keypoint models
    image_ids       list (N)
    and, with file proposals, P slots of them an image
    proposals       float32 (N, P, 4)  as gt_boxes
    proposals_valid bool (N, P)        False = unused slot
    and, for mask models, what _pack_masks describes.
    """
    sizes = [sample.out_hw for sample in samples]
    offsets = np.cumsum([0] + [sample.image.size for sample in samples])
    meta = [
        blob_utils.image_meta(
            offset, *s.image.shape[:2], s.entry["flipped"], s.out_hw, s.crop_xy, s.scale
        )
        for offset, s in zip(offsets, samples, strict=False)
    ]
    slots = _slots(samples, "boxes")
    if pixels is None:
        pixels = torch.from_numpy(np.concatenate([s.image.reshape(-1) for s in samples]))
    batch = {
        "data": pixels,
        "im_meta": torch.tensor(meta, dtype=torch.float64),
        "blob_size": blob_utils.padded_size(sizes, options.stride),
        "im_info": torch.tensor([(*s.out_hw, s.scale) for s in samples], dtype=torch.float32),
        "gt_boxes": _padded(samples, "boxes", slots, torch.float32),
        "gt_classes": _padded(samples, "gt_classes", slots, torch.int64),
        "gt_crowd": _padded(samples, "is_crowd", slots, torch.bool),
        "image_ids": [sample.entry["id"] for sample in samples],
    }
    if any("proposals" in sample.entry for sample in samples):
        places = _slots(samples, "proposals")
        counts = torch.tensor([[len(sample.entry["proposals"])] for sample in samples])
        batch["proposals"] = _padded(samples, "proposals", places, torch.float32)
        batch["proposals_valid"] = torch.arange(places) < counts
    if options.masks:
        batch.update(_pack_masks(samples, slots))
    if options.keypoints:
        _require_keypoints(samples)
        points = _padded(samples, "gt_keypoints", slots, torch.float32)
        batch["gt_keypoints"] = points.transpose(2, 3).contiguous()
    return batch


def _slots(samples: Sequence[Sample], key: str) -> int:
    """Places for the per-object arrays `key` of each image: a power of two, so that batches come
    in few shapes."""
    most = max(len(sample.entry[key]) for sample in samples)
    return max(_MIN_SLOTS, 1 << max(most - 1, 0).bit_length())


def _padded(samples: Sequence[Sample], key: str, slots: int, dtype: torch.dtype) -> Tensor:
    """Per-object arrays (n, ...) of each image as one tensor (N, slots, ...), zero padded."""
    shape = samples[0].entry[key].shape[1:]
    out = torch.zeros((len(samples), slots, *shape), dtype=dtype)
    for row, sample in zip(out, samples, strict=True):
        values = sample.entry[key]
        row[: len(values)] = torch.from_numpy(values)
    return out


def _require_keypoints(samples: Sequence[Sample]) -> None:
    for sample in samples:
        if "gt_keypoints" not in sample.entry:
            raise UserError(
                f"image {sample.entry['image']} is of a data set without keypoints; use a "
                "keypoint data set or set MODEL.KEYPOINTS_ON to False"
            )


def _pack_masks(samples: Sequence[Sample], slots: int) -> dict[str, Tensor]:
    """Masks of the objects that are not crowd.

    gt_poly_coords      float32 (T, 2)        vertices of all polygons
    gt_poly_offsets     int64 (P + 1,)        vertices of polygon p: offsets[p] to offsets[p + 1]
    gt_object_offsets   int64 (N * G + 1,)    polygons of object n * G + g, likewise
    gt_poly_boxes       float32 (N, G, 4)     extent of the mask, xyxy; 0 where there is none
    gt_has_mask         bool (N, G)
    gt_bitmasks         uint8 (B, Hm, Wm)     decoded RLE masks, zero padded to a common size
    gt_bitmask_index    int64 (N, G)          which of them is the object's; -1: none
    """
    count = len(samples) * slots
    polygons: list[np.ndarray] = []
    object_offsets = np.zeros(count + 1, dtype=np.int64)
    extents = np.zeros((count, 4), dtype=np.float32)
    bitmasks: list[np.ndarray] = []
    bitmask_index = np.full(count, -1, dtype=np.int64)
    for n, sample in enumerate(samples):
        segms = sample.entry["segms"]
        for g in np.flatnonzero(~sample.entry["is_crowd"]):
            place, segm = n * slots + g, segms[g]
            if isinstance(segm, list):
                polygons.extend(segm)
                object_offsets[place + 1] = len(segm)
                continue
            mask = segm_utils.rle_to_mask(segm) if segm_utils.is_rle(segm) else segm
            extent = segm_utils.mask_to_bbox(mask)
            if extent is not None:
                extents[place] = extent
                bitmask_index[place] = len(bitmasks)
                bitmasks.append(mask)
    has_polygons = object_offsets[1:] > 0
    has_mask = has_polygons | (bitmask_index >= 0)
    coords = np.concatenate([np.zeros(0), *polygons]).reshape(-1, 2)
    points = np.array([0] + [len(polygon) // 2 for polygon in polygons], dtype=np.int64).cumsum()
    object_offsets = object_offsets.cumsum()
    if polygons:  # the extents of all objects at once: where their points begin
        begins = points[object_offsets[:-1][has_polygons]]
        extents[has_polygons, :2] = np.minimum.reduceat(coords, begins)
        extents[has_polygons, 2:] = np.maximum.reduceat(coords, begins)
    shape = (len(samples), slots)
    return {
        "gt_poly_coords": torch.from_numpy(coords.astype(np.float32)),
        "gt_poly_offsets": torch.from_numpy(points),
        "gt_object_offsets": torch.from_numpy(object_offsets),
        "gt_poly_boxes": torch.from_numpy(extents).reshape(*shape, 4),
        "gt_has_mask": torch.from_numpy(has_mask).reshape(shape),
        "gt_bitmasks": _stack_bitmasks(bitmasks),
        "gt_bitmask_index": torch.from_numpy(bitmask_index).reshape(shape),
    }


def _stack_bitmasks(bitmasks: Sequence[np.ndarray]) -> Tensor:
    """uint8 (B, Hm, Wm); (0, 1, 1) when there are none."""
    height = max((mask.shape[0] for mask in bitmasks), default=1)
    width = max((mask.shape[1] for mask in bitmasks), default=1)
    out = np.zeros((len(bitmasks), height, width), dtype=np.uint8)
    for slot, mask in zip(out, bitmasks, strict=True):
        slot[: mask.shape[0], : mask.shape[1]] = mask
    return torch.from_numpy(out)
