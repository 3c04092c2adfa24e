"""Matching of anchors, or any boxes, to the ground truth of many images at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _library  # noqa: F401


class AnchorMatches(NamedTuple):
    """What a ground truth means to each anchor; all (N, A).

    Attributes:
        inside: bool, the anchor lies inside its image.
        foreground: bool.
        max_overlap: float32, best IoU with a ground truth (-1 without any or outside).
        gt_index: int64, ground truth of that IoU, the first if there are more (0 without any).
    """

    inside: Tensor
    foreground: Tensor
    max_overlap: Tensor
    gt_index: Tensor


def match_anchors(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    im_info: Tensor | None,
    positive_overlap: float,
    straddle_thresh: float,
) -> AnchorMatches:
    """Which anchors are foreground, and each anchor's best ground truth.

    Foreground has IoU >= positive_overlap with a ground truth or ties the best IoU that any anchor
    inside has with one; where that is 0, all anchors inside do. IoU is float32 with Detectron's +1
    widths, 0 where a coordinate is not a number. There is no (A, G) matrix and no synchronisation.

    Args:
        anchors: (A, 4) floating point, xyxy, or (N, A, 4), other ones for each image.
        gt_boxes: (N, G, 4) floating point, padded.
        gt_valid: (N, G) bool, False for what nothing is to match.
        im_info: (N, 3) height, width, scale of the images; None: every anchor is inside.
        positive_overlap: IoU from which on an anchor is foreground.
        straddle_thresh: pixels an anchor may reach outside; < 0 allows any.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
    """
    return AnchorMatches(
        *torch.ops.detectron.match_anchors(
            anchors, gt_boxes, gt_valid, im_info, float(positive_overlap), float(straddle_thresh)
        )
    )


@torch.library.register_fake("detectron::match_anchors")
def _match_anchors_fake(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    im_info: Tensor | None,
    positive_overlap: float,
    straddle_thresh: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (gt_boxes.shape[0], anchors.shape[-2])
    dtypes = (torch.bool, torch.bool, torch.float32, torch.int64)
    return tuple(anchors.new_empty(shape, dtype=dtype) for dtype in dtypes)
