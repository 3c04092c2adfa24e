"""Mask probabilities in the frame of their boxes -> COCO run lengths in the frame of the image.

Nothing of the size of an image is ever built: only the pixels under each box are sampled, and the
run lengths are read off the positions of those above the threshold.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pycocotools.mask as mask_util
import torch
import torch.nn.functional as F
from torch import Tensor

import utils.boxes as box_utils

# Pixels sampled at once. Each costs some 60 bytes of intermediate values.
PIXELS_PER_CHUNK = 1 << 21


def paste_boxes(boxes: Tensor, resolution: int) -> Tensor:
    """The pixel rectangles that masks are resized to.

    Args:
        boxes: (n, 4) float32 detections in image pixels.
        resolution: side M of the probability maps.

    Returns:
        (n, 4) int64 `[x1, y1, x2, y2]`, both ends inside: the box expanded by (M + 2) / M, because
        the map gets a border of one zero pixel, and truncated towards zero (Detectron's
        segm_results).
    """
    scale = (resolution + 2.0) / resolution
    return box_utils.expand_boxes(boxes, scale).to(torch.int32).long()


def masks_to_rles(
    masks: Tensor, boxes: Tensor, im_h: int, im_w: int, thresh: float
) -> list[dict[str, list[int] | str]]:
    """COCO RLEs of masks pasted into their image.

    Args:
        masks: (n, M, M) float32 foreground probabilities, one map a box.
        boxes: (n, 4) float32 boxes in image pixels, on the device of `masks`.
        im_h, im_w: size of the image in pixels.
        thresh: a pixel belongs to the mask if its interpolated probability is above this.

    Returns:
        n dicts `{'size': [im_h, im_w], 'counts': str}`, as pycocotools encodes them.
    """
    rles = []
    rects = paste_boxes(boxes, masks.shape[-1])
    for lo, hi in _chunks(rects, im_h, im_w):
        starts, ends, owners = _runs(masks[lo:hi].float(), rects[lo:hi], im_h, im_w, thresh)
        rles += _encode(starts, ends, np.bincount(owners, minlength=hi - lo), im_h, im_w)
    return rles


def _chunks(rects: Tensor, im_h: int, im_w: int) -> Iterator[tuple[int, int]]:
    """Ranges of instances that together sample at most PIXELS_PER_CHUNK pixels (or are one
    instance)."""
    x1, y1, x2, y2 = _visible(rects, im_h, im_w).unbind(1)
    pixels = ((x2 - x1) * (y2 - y1)).tolist()
    lo, total = 0, 0
    for i, count in enumerate(pixels):
        if total and total + count > PIXELS_PER_CHUNK:
            yield lo, i
            lo, total = i, 0
        total += count
    if lo < len(pixels):
        yield lo, len(pixels)


def _visible(rects: Tensor, im_h: int, im_w: int) -> Tensor:
    """The part of each rectangle inside the image, (n, 4) with *exclusive* right and lower ends."""
    # A rectangle narrower than a pixel still counts as one, as max(x2 - x1 + 1, 1) does in the
    # original.
    size = (rects[:, 2:] - rects[:, :2] + 1).clamp(min=1)
    limit = rects.new_tensor([im_w, im_h])
    start = rects[:, :2].clamp(min=0)
    end = torch.minimum(rects[:, :2] + size, limit)
    return torch.cat([start, torch.maximum(start, end)], dim=1)


def _runs(
    masks: Tensor, rects: Tensor, im_h: int, im_w: int, thresh: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Foreground runs of each instance in the image's column-major order.

    Returns:
        first position and end (exclusive) of every run, and the instance it belongs to; instances
        ascend, and so do the runs of each.
    """
    x_start, y_start, x_end, y_end = _visible(rects, im_h, im_w).unbind(1)
    widths = (x_end - x_start) * (y_end > y_start)
    heights = y_end - y_start
    padded = F.pad(masks, (1, 1, 1, 1))
    side = padded.shape[-1]

    # One entry a visible column: the padded map interpolated along x there.
    owner, offset = _ragged(widths)
    x = x_start[owner] + offset
    left, right, weight = _bilinear(
        x - rects[owner, 0], (rects[:, 2] - rects[:, 0] + 1)[owner], side
    )
    rows = padded.transpose(1, 2)
    columns = rows[owner, left] * (1 - weight)[:, None] + rows[owner, right] * weight[:, None]

    # One entry a visible pixel: that column interpolated along y.
    column, offset = _ragged(heights[owner])
    owner = owner[column]
    y = y_start[owner] + offset
    upper, lower, weight = _bilinear(
        y - rects[owner, 1], (rects[:, 3] - rects[:, 1] + 1)[owner], side
    )
    flat = columns.reshape(-1)
    base = column * side
    values = flat[base + upper] * (1 - weight) + flat[base + lower] * weight

    # A gap of one between the positions of two instances keeps their runs apart.
    stride = im_h * im_w + 1
    position = (owner * stride + x[column] * im_h + y)[values > thresh]
    new_run = torch.ones_like(position, dtype=torch.bool)
    new_run[1:] = position[1:] != position[:-1] + 1
    run_end = torch.ones_like(new_run)
    run_end[:-1] = new_run[1:]
    starts, ends = position[new_run].cpu().numpy(), position[run_end].cpu().numpy() + 1
    owners = starts // stride
    return starts - owners * stride, ends - owners * stride, owners


def _ragged(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """For groups of the given lengths, each element's group and its index in the group."""
    group = torch.repeat_interleave(lengths)
    first = lengths.cumsum(0) - lengths
    return group, torch.arange(len(group), device=lengths.device) - first[group]


def _bilinear(target: Tensor, size: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Source indices and the weight of the second, as cv2.resize has them for `side` -> `size`
    pixels.

    The coordinate is (target + 0.5) * side / size - 0.5 in double, its fraction a float32; beyond
    the outermost source pixels the border is replicated.
    """
    source = (target + 0.5).double() * (side / size.clamp(min=1).double()) - 0.5
    low = source.floor()
    weight = (source - low).float()
    low = low.long()
    weight = torch.where((low < 0) | (low >= side - 1), 0.0, weight)
    low = low.clamp(0, side - 1)
    return low, (low + 1).clamp(max=side - 1), weight


def _encode(
    starts: np.ndarray, ends: np.ndarray, runs: np.ndarray, im_h: int, im_w: int
) -> list[dict[str, list[int] | str]]:
    """Compressed RLEs from the runs of several instances (`runs` of them each)."""
    uncompressed = []
    first = 0
    for count in runs.tolist():
        edges = np.empty(2 * count + 2, dtype=np.int64)
        edges[0], edges[-1] = 0, im_h * im_w
        edges[1:-1:2] = starts[first : first + count]
        edges[2:-1:2] = ends[first : first + count]
        first += count
        counts = np.diff(edges)
        # A mask that reaches the last pixel ends with its own run, not with an empty one.
        if count and counts[-1] == 0:
            counts = counts[:-1]
        uncompressed.append({"size": [im_h, im_w], "counts": counts.tolist()})
    rles = mask_util.frPyObjects(uncompressed, im_h, im_w) if uncompressed else []
    return [{"size": [im_h, im_w], "counts": rle["counts"].decode("ascii")} for rle in rles]
