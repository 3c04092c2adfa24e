"""Box arithmetic with Detectron's conventions.

Boxes are `[x1, y1, x2, y2]` with both ends inside: a width is `x2 - x1 + 1`. Every function takes
torch tensors on any device or numpy arrays; numpy in gives numpy out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

import ops

BBOX_XFORM_CLIP = math.log(1000.0 / 16.0)


def _numpy_too(function: Callable) -> Callable:
    """Let a function of tensors take numpy arrays as well, without a second implementation."""

    def to_tensor(value):
        return torch.from_numpy(np.ascontiguousarray(value)) if _is_array(value) else value

    def to_numpy(value):
        if isinstance(value, tuple):
            return tuple(to_numpy(v) for v in value)
        return value.numpy() if isinstance(value, Tensor) else value

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if not any(_is_array(v) for v in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        out = function(*map(to_tensor, args), **{k: to_tensor(v) for k, v in kwargs.items()})
        return to_numpy(out)

    return wrapped


def _is_array(value) -> bool:
    return isinstance(value, np.ndarray) and value.dtype != object


@_numpy_too
def boxes_area(boxes: Tensor) -> Tensor:
    """Area (...,) of boxes (..., 4), in square pixels; negative sides are not clamped."""
    return (boxes[..., 2] - boxes[..., 0] + 1) * (boxes[..., 3] - boxes[..., 1] + 1)


@_numpy_too
def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """COCO's `[x1, y1, w, h]` (..., 4) to `[x1, y1, x2, y2]`; sides below 1 count as 1."""
    return torch.cat([boxes[..., :2], boxes[..., :2] + (boxes[..., 2:] - 1).clamp(min=0)], dim=-1)


@_numpy_too
def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """`[x1, y1, x2, y2]` (..., 4) to COCO's `[x1, y1, w, h]`."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2] + 1], dim=-1)


@_numpy_too
def filter_small_boxes(boxes: Tensor, min_size: float) -> Tensor:
    """Indices (int64) of the boxes (R, 4) whose width and height both exceed `min_size`."""
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    return (sides > min_size).all(dim=1).nonzero()[:, 0]


@_numpy_too
def clip_boxes_to_image(boxes: Tensor, height: float, width: float) -> Tensor:
    """Boxes (..., 4) clipped to [0, width - 1] x [0, height - 1]."""
    x = boxes[..., 0::2].clamp(0, width - 1)
    y = boxes[..., 1::2].clamp(0, height - 1)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def clip_xyxy_to_image(x1, y1, x2, y2, height: float, width: float):
    """The four coordinates (numbers or arrays), each clipped to the image."""
    return (
        np.clip(x1, 0, width - 1),
        np.clip(y1, 0, height - 1),
        np.clip(x2, 0, width - 1),
        np.clip(y2, 0, height - 1),
    )


@_numpy_too
def clip_tiled_boxes(boxes: Tensor, im_shape: Sequence[int]) -> Tensor:
    """Boxes (R, 4K), K to a row, clipped to an image of shape `(height, width, ...)`."""
    tiles = boxes.reshape(*boxes.shape[:-1], boxes.shape[-1] // 4, 4)
    return clip_boxes_to_image(tiles, im_shape[0], im_shape[1]).reshape(boxes.shape)


@_numpy_too
def bbox_transform(
    boxes: Tensor,
    deltas: Tensor,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    clip: float = BBOX_XFORM_CLIP,
) -> Tensor:
    """Apply regression deltas to boxes.

    Args:
        boxes: (..., 4) reference boxes.
        deltas: (..., 4K) `[dx, dy, dw, dh]`, K for each box (one a class).
        weights: what the deltas were multiplied by; they are divided by it.
        clip: upper bound of dw and dh (`BBOX_XFORM_CLIP`), so that exp() cannot overflow.

    Returns:
        (..., 4K) predicted boxes. Source: R-CNN, appendix C, with Detectron's +1 widths.
    """
    size = (boxes[..., 2:] - boxes[..., :2] + 1.0).unsqueeze(-2)
    centre = boxes[..., None, :2] + 0.5 * size
    tiles = deltas.reshape(*deltas.shape[:-1], deltas.shape[-1] // 4, 4)
    if any(weight != 1 for weight in weights):
        parts = [part / weight for part, weight in zip(tiles.unbind(-1), weights, strict=True)]
        tiles = torch.stack(parts, dim=-1)
    new_centre = tiles[..., :2] * size + centre
    half = 0.5 * torch.exp(tiles[..., 2:].clamp(max=clip)) * size
    return torch.cat([new_centre - half, new_centre + half - 1], dim=-1).reshape(deltas.shape)


@_numpy_too
def bbox_transform_inv(
    boxes: Tensor, gt_boxes: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
) -> Tensor:
    """Deltas (..., 4) that turn boxes (..., 4) into gt_boxes (..., 4), times `weights`."""
    size = boxes[..., 2:] - boxes[..., :2] + 1.0
    centre = boxes[..., :2] + 0.5 * size
    gt_size = gt_boxes[..., 2:] - gt_boxes[..., :2] + 1.0
    gt_centre = gt_boxes[..., :2] + 0.5 * gt_size
    wx, wy, ww, wh = weights
    shift, stretch = (gt_centre - centre) / size, torch.log(gt_size / size)
    return torch.stack(
        [shift[..., 0] * wx, shift[..., 1] * wy, stretch[..., 0] * ww, stretch[..., 1] * wh], dim=-1
    )


@_numpy_too
def expand_boxes(boxes: Tensor, scale: float) -> Tensor:
    """Boxes (R, 4) scaled about their centres; half-sides are taken without the +1."""
    half = (boxes[..., 2:] - boxes[..., :2]) * 0.5
    centre = (boxes[..., 2:] + boxes[..., :2]) * 0.5
    half = half * scale
    return torch.cat([centre - half, centre + half], dim=-1)


@_numpy_too
def flip_boxes(boxes: Tensor, im_width: float) -> Tensor:
    """Boxes (R, 4K) mirrored left to right in an image `im_width` pixels wide."""
    flipped = boxes.clone()
    flipped[..., 0::4] = im_width - boxes[..., 2::4] - 1
    flipped[..., 2::4] = im_width - boxes[..., 0::4] - 1
    return flipped


@_numpy_too
def aspect_ratio(boxes: Tensor, ratio: float) -> Tensor:
    """Boxes (R, 4K) of an image whose width was multiplied by `ratio`."""
    scaled = boxes.clone()
    scaled[..., 0::2] = boxes[..., 0::2] * ratio
    return scaled


@_numpy_too
def bbox_overlaps(boxes: Tensor, query_boxes: Tensor) -> Tensor:
    """Intersection over union with +1 widths.

    Args:
        boxes: (..., A, 4).
        query_boxes: (..., B, 4).

    Returns:
        (..., A, B); 0 where two boxes do not intersect.
    """
    a, b = boxes[..., :, None, :], query_boxes[..., None, :, :]
    width = torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0]) + 1
    height = torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1]) + 1
    inter = width.clamp(min=0) * height.clamp(min=0)
    union = boxes_area(boxes)[..., :, None] + boxes_area(query_boxes)[..., None, :] - inter
    return torch.where(inter > 0, inter / union, torch.zeros_like(inter))


def unique_boxes(boxes: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Indices, ascending, of the first of each set of boxes equal after rint(boxes * scale)."""
    whole = np.rint(np.asarray(boxes) * scale)
    # Stable, so that of equal rows the first comes first; several times faster than np.unique.
    order = np.lexsort(whole.T)
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (whole[order[1:]] != whole[order[:-1]]).any(axis=1)
    return np.sort(order[is_new])


@_numpy_too
def nms(dets: Tensor, thresh: float) -> Tensor:
    """Greedy non-maximum suppression of dets (K, 5) `[x1, y1, x2, y2, score]`.

    Returns:
        int64 indices of the survivors in ascending order (Detectron's NMS keeps input order).
    """
    if dets.shape[0] == 0:
        return torch.zeros(0, dtype=torch.int64, device=dets.device)
    dets = dets.float()
    return ops.nms(dets[:, :4].contiguous(), dets[:, 4].contiguous(), thresh)


@_numpy_too
def soft_nms(
    dets: Tensor,
    sigma: float = 0.5,
    overlap_thresh: float = 0.3,
    score_thresh: float = 0.001,
    method: str = "linear",
) -> tuple[Tensor, Tensor]:
    """Soft-NMS of dets (K, 5) `[x1, y1, x2, y2, score]`; `ops.soft_nms` says how.

    Returns:
        dets (kept, 5) float32 with their lowered scores, best first, and their int64 indices.
    """
    dets = dets.float()
    keep, scores = ops.soft_nms(
        dets[:, :4], dets[:, 4], sigma, overlap_thresh, score_thresh, method
    )
    return torch.cat([dets[keep, :4], scores[:, None]], dim=1), keep


@_numpy_too
def box_voting(
    top_dets: Tensor,
    all_dets: Tensor,
    thresh: float,
    scoring_method: str = "ID",
    beta: float = 1.0,
) -> Tensor:
    """top_dets (T, 5) float32, refined by the votes of all_dets (A, 5); see `ops.box_voting`."""
    return ops.box_voting(top_dets, all_dets, thresh, scoring_method, beta)
