"""Soft-NMS (Bodla et al.): overlapping boxes lose score in place of being dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library  # noqa: F401

METHODS = ("hard", "linear", "gaussian")


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    sigma: float = 0.5,
    overlap_thresh: float = 0.3,
    score_thresh: float = 0.001,
    method: str = "linear",
) -> tuple[Tensor, Tensor]:
    """The boxes that keep a score of at least `score_thresh`, and that score.

    Again and again the best box left is taken (of equal ones, the first), and the score of every
    other box that intersects it is multiplied by a weight: `linear`: 1 - IoU where IoU >
    overlap_thresh; `gaussian`: exp(-IoU^2 / sigma), whatever the overlap; `hard`: 0 where IoU >
    overlap_thresh. Widths are Detectron's, x2 - x1 + 1.

    Args:
        boxes: (K, 4) floating point, xyxy, any device.
        scores: (K,) floating point; a box whose score is NaN is dropped.
        sigma, overlap_thresh: as above; score_thresh: what scores less, at first or later, goes.
        method: one of METHODS.

    Returns:
        keep: (kept,) int64 indices in the order they were taken, which is by descending score.
        scores: (kept,) float32, lowered.

    Raises:
        ValueError, TypeError: an unknown method; shapes, devices or dtypes that do not fit.
    """
    valid = torch.ones_like(scores, dtype=torch.bool)
    keep, decayed, count = batched_soft_nms(
        boxes[None], scores[None], valid[None], sigma, overlap_thresh, score_thresh, method
    )
    kept = int(count)
    return keep[0, :kept], decayed[0, :kept]


def batched_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    valid: Tensor,
    sigma: float = 0.5,
    overlap_thresh: float = 0.3,
    score_thresh: float = 0.001,
    method: str = "linear",
) -> tuple[Tensor, Tensor, Tensor]:
    """Many independent soft-NMS problems at once, without a host synchronisation.

    Args:
        boxes: (P, K, 4); scores: (P, K), in any order; valid: (P, K) bool, the boxes that count.
        The others are those of `soft_nms`.

    Returns:
        keep: (P, K) int64 indices into K in the order they were taken, padded with -1.
        scores: (P, K) float32 of those, padded with 0.
        count: (P,) int64, how many there are.

    Raises:
        ValueError, TypeError: as `soft_nms`.
    """
    if method not in METHODS:
        raise ValueError(f"soft_nms: method must be one of {', '.join(METHODS)}, not {method!r}")
    return torch.ops.detectron.batched_soft_nms(
        boxes,
        scores,
        valid,
        float(sigma),
        float(overlap_thresh),
        float(score_thresh),
        METHODS.index(method),
    )


@torch.library.register_fake("detectron::batched_soft_nms")
def _batched_soft_nms_fake(boxes, scores, valid, sigma, overlap_thresh, score_thresh, method):
    keep = boxes.new_empty(scores.shape, dtype=torch.int64)
    decayed = boxes.new_empty(scores.shape, dtype=torch.float32)
    return keep, decayed, boxes.new_empty(scores.shape[0], dtype=torch.int64)
