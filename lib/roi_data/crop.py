"""Cutting images, and above all: very long or very high ones to a given aspect ratio.

The window is chosen in the resized image, where it has whole pixels. Ground truth follows in
original-image pixels: what starts at c in the resized image starts at c / scale there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

import utils.segms as segm_utils
from utils.packed_roidb import RoidbEntry

X, Y = 0, 1


@dataclass(frozen=True)
class CropWindow:
    """A cut along one axis (X or Y), in pixels of the image resized by `scale`."""

    axis: int
    start: int
    size: int
    scale: float

    @property
    def offset(self) -> float:
        """Where the window starts, in original-image pixels."""
        return self.start / self.scale

    @property
    def extent(self) -> float:
        """How long the window is, in original-image pixels."""
        return self.size / self.scale


@dataclass
class View:
    """What is seen of an image: its objects, in original-image pixels, its size (height, width)
    after resizing by `scale` and cutting, and where (x, y) that starts in the resized image."""

    entry: RoidbEntry
    scale: float
    out_hw: tuple[int, int]
    crop_xy: tuple[int, int] = (0, 0)

    def cut(self, window: CropWindow, follow_masks: bool = False) -> None:
        """See a window of what is seen now; follow_masks as for `crop_entry`."""
        self.entry = crop_entry(self.entry, window, follow_masks)
        (height, width), (x, y) = self.out_hw, self.crop_xy
        if window.axis == X:
            self.out_hw, self.crop_xy = (height, window.size), (x + window.start, y)
        else:
            self.out_hw, self.crop_xy = (window.size, width), (x, y + window.start)


def choose_window(
    entry: RoidbEntry,
    resized: tuple[int, int],
    scale: float,
    ratio: float,
    rng: np.random.RandomState,
) -> CropWindow:
    """Cut an image of `resized` = (height, width) pixels to width / height = ratio.

    The place is random among those that hold all objects; where there are none such, among those
    that hold one object (drawn at random) as far as possible. Crowd regions do not count.
    """
    height, width = resized
    if width > height * ratio:
        axis, length, size = X, width, math.ceil(height * ratio)
    else:
        axis, length, size = Y, height, math.ceil(width / ratio)
    size = min(size, length)
    boxes = entry["boxes"][~entry["is_crowd"]]
    if len(boxes) == 0:
        return CropWindow(axis, rng.randint(length - size + 1), size, scale)
    begins, ends = boxes[:, axis] * scale, (boxes[:, axis + 2] + 1) * scale
    begin, end = begins.min(), ends.max()
    if end - begin > size:
        chosen = rng.randint(len(boxes))
        begin, end = begins[chosen], ends[chosen]
    # From here the window covers [begin, end), or lies inside it if it is the shorter one.
    first, last = sorted((math.ceil(end - size), math.floor(begin)))
    first, last = (min(max(place, 0), length - size) for place in (first, last))
    return CropWindow(axis, rng.randint(first, last + 1), size, scale)


def crop_entry(entry: RoidbEntry, window: CropWindow, follow_masks: bool = False) -> RoidbEntry:
    """The objects of an image as seen in a window of it; the entry itself is left as it is.

    Boxes, file proposals, polygons, RLE masks (decoded to uint8 arrays) and keypoints are shifted
    and cut; objects and proposals that are outside the window disappear, and so do the masks of
    crowd regions, which nothing uses. follow_masks: objects of whose mask nothing is left
    disappear too, and the boxes of those that are cut are drawn in to what is left.
    """
    boxes, kept = _crop_boxes(entry["boxes"], window)
    cropped = dict(entry, boxes=boxes)
    if "proposals" in entry:
        cropped["proposals"], _ = _crop_boxes(entry["proposals"], window)
    for key in ("gt_classes", "is_crowd"):
        cropped[key] = entry[key][kept]
    cropped["segms"] = [
        [] if entry["is_crowd"][i] else _crop_segm(entry["segms"][i], window) for i in kept
    ]
    if "gt_keypoints" in entry:
        cropped["gt_keypoints"] = _crop_keypoints(entry["gt_keypoints"][kept], window)
    if follow_masks:
        low, high = window.axis, window.axis + 2
        before = entry["boxes"][kept][:, [low, high]] - window.offset
        cut = (boxes[:, [low, high]] != before).any(axis=1)
        had_mask = np.array([len(entry["segms"][i]) > 0 for i in kept], dtype=bool)
        _draw_in(cropped, np.flatnonzero(cut & had_mask & ~cropped["is_crowd"]))
    return cropped


def _draw_in(entry: RoidbEntry, which: np.ndarray) -> None:
    """Shrink the boxes of these objects to their masks; drop those without a mask any more."""
    kept = np.ones(len(entry["boxes"]), dtype=bool)
    for i in which:
        extent, box = _mask_extent(entry["segms"][i]), entry["boxes"][i]
        if extent is not None:
            box[:2] = np.maximum(box[:2], extent[:2])
            box[2:] = np.minimum(box[2:], extent[2:])
        kept[i] = extent is not None and (box[2:] > box[:2]).all()
    for key in ("boxes", "gt_classes", "is_crowd", "gt_keypoints"):
        if key in entry:
            entry[key] = entry[key][kept]
    entry["segms"] = [segm for segm, keep in zip(entry["segms"], kept, strict=True) if keep]


def _mask_extent(segm: list | np.ndarray) -> np.ndarray | None:
    """Box of a mask, xyxy with both ends inside; None if it is empty."""
    if not isinstance(segm, list):
        return segm_utils.mask_to_bbox(segm)
    if not segm:
        return None
    # A polygon's edge is where its last pixel ends.
    return segm_utils.polys_to_boxes([segm])[0] - np.array([0, 0, 1, 1], dtype=np.float32)


def _crop_boxes(boxes: np.ndarray, window: CropWindow) -> tuple[np.ndarray, np.ndarray]:
    """The boxes (n, 4) that reach into the window, as seen in it, and which of all they are."""
    low, high = window.axis, window.axis + 2
    boxes = boxes.copy()
    boxes[:, [low, high]] = np.clip(boxes[:, [low, high]] - window.offset, 0, window.extent - 1)
    kept = np.flatnonzero(boxes[:, high] > boxes[:, low])
    return boxes[kept], kept


def _crop_segm(segm: list | dict | np.ndarray, window: CropWindow) -> list | np.ndarray:
    if not isinstance(segm, list):
        mask = segm_utils.rle_to_mask(segm) if isinstance(segm, dict) else segm
        # Nearest pixel: the offset in original-image pixels need not be whole.
        places = np.floor(np.arange(math.ceil(window.extent)) + window.offset + 0.5).astype(int)
        last = mask.shape[1 - window.axis] - 1
        return mask.take(np.minimum(places, last), axis=1 - window.axis)
    cut = []
    for polygon in segm:
        points = polygon.copy()
        points[window.axis :: 2] -= window.offset
        points = segm_utils.clip_polygon(points, window.axis, window.extent)
        if points is not None:
            cut.append(points)
    return cut


def _crop_keypoints(keypoints: np.ndarray, window: CropWindow) -> np.ndarray:
    """Points (n, 3, K) in the window, as float32; those outside lose their label."""
    moved = keypoints.astype(np.float32)
    moved[:, window.axis] -= window.offset
    place = moved[:, window.axis]
    unlabelled = (moved[:, 2] == 0) | (place < 0) | (place > window.extent - 1)
    return np.where(unlabelled[:, None], 0, moved)
