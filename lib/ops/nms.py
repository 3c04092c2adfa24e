"""Greedy non-maximum suppression, for one set of boxes and for many sets in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library  # noqa: F401


def nms(boxes: Tensor, scores: Tensor, thresh: float, plus_one: bool = True) -> Tensor:
    """Indices of the boxes that survive non-maximum suppression, ascending.

    Walks the boxes by descending score (ties: the lower index first) and drops every box whose IoU
    with a kept one is >= `thresh`. IoU and threshold are float32, whatever the dtype of the boxes.

    Args:
        boxes: (K, 4) floating point, xyxy, any device.
        scores: (K,) floating point. A NaN score ranks last.
        thresh: IoU from which on a box is suppressed.
        plus_one: Detectron's widths, x2 - x1 + 1; False for x2 - x1.

    Returns:
        (kept,) int64 ASCENDING input indices (Detectron's order, not by score). A box with a NaN
        coordinate has no IoU: it is kept and suppresses nothing.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
    """
    return torch.ops.detectron.nms(boxes, scores, float(thresh), plus_one)


def batched_nms(
    boxes: Tensor,
    valid: Tensor,
    thresh: float,
    max_out: int,
    plus_one: bool = True,
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Many independent NMS problems at once, without a host synchronisation (fit for CUDA graphs).

    Args:
        boxes: (P, K, 4) floating point, xyxy, ALREADY sorted by descending score in each problem.
        valid: (P, K) bool; an invalid box is never kept and suppresses nothing.
        thresh: IoU from which on a box is suppressed.
        max_out: boxes kept at most in each problem: the best ones.
        plus_one: as in `nms`.
        groups: (P, K) int64 within 32 bits: boxes of different groups (classes) do not suppress
            each other, but count for max_out together. By default all are of one.

    Returns:
        keep: (P, max_out) int64 indices into K in score order, padded with -1.
        count: (P,) int64, how many were kept.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
    """
    return torch.ops.detectron.batched_nms(boxes, valid, float(thresh), max_out, plus_one, groups)


@torch.library.register_fake("detectron::nms")
def _nms_fake(boxes: Tensor, scores: Tensor, thresh: float, plus_one: bool = True) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(kept, dtype=torch.int64)


@torch.library.register_fake("detectron::batched_nms")
def _batched_nms_fake(
    boxes: Tensor,
    valid: Tensor,
    thresh: float,
    max_out: int,
    plus_one: bool = True,
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    problems = boxes.shape[0]
    keep = boxes.new_empty(problems, max_out, dtype=torch.int64)
    return keep, boxes.new_empty(problems, dtype=torch.int64)
