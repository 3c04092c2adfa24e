"""Training targets of the region proposal network, for all images of a mini-batch at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import ops
import utils.boxes as box_utils


class RPNTargets(NamedTuple):
    """Targets of the anchors drawn in N images, S an image; of all others nothing is learned.

    Attributes:
        index: (N, S) int64, anchors of all levels side by side; 0 in empty slots.
        labels: (N, S) int8, 1 foreground, 0 background, -1 for a slot that does not count. An
            anchor has one slot that counts.
        bbox_targets: (N, S, 4) float32 deltas of the foreground; 0 elsewhere.
        bbox_weights: (N, S) float32, inside times outside weight: 1 / (used anchors of the
            image) on foreground, 0 elsewhere.
    """

    index: Tensor
    labels: Tensor
    bbox_targets: Tensor
    bbox_weights: Tensor


@torch.no_grad()
def rpn_targets(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    im_info: Tensor,
    *,
    positive_overlap: float,
    negative_overlap: float,
    batch_size: int,
    fg_fraction: float,
    straddle_thresh: float,
) -> RPNTargets:
    """Label anchors, draw a sample of them, and compute the foreground's regression targets.

    Args:
        anchors: (A, 4) float32, network-input pixels.
        gt_boxes: (N, G, 4) float32, network-input pixels; padded.
        gt_valid: (N, G) bool, False for padding and crowd regions.
        im_info: (N, 3) height, width, scale of the unpadded images.
        positive_overlap, negative_overlap: TRAIN.RPN_POSITIVE_OVERLAP, RPN_NEGATIVE_OVERLAP.
        batch_size, fg_fraction: at most `fg_fraction * batch_size` foreground; background
            fills up to `batch_size`, drawn with replacement.
        straddle_thresh: pixels an anchor may reach outside; < 0 allows any.

    Source: Faster R-CNN, section 3.1.3, as Detectron samples.
    """
    matches = ops.match_anchors(
        anchors, gt_boxes, gt_valid, im_info, positive_overlap, straddle_thresh
    )
    index, labels = sample_anchors(
        matches, negative_overlap, batch_size, int(fg_fraction * batch_size)
    )
    gt_index = matches.gt_index.gather(1, index).unsqueeze(-1).expand(-1, -1, 4)
    deltas = box_utils.bbox_transform_inv(anchors[index], gt_boxes.gather(1, gt_index))
    foreground = labels > 0
    used = (labels >= 0).sum(dim=1, keepdim=True).clamp(min=1)
    targets = torch.where(foreground.unsqueeze(-1), deltas, 0.0)
    return RPNTargets(index, labels, targets, foreground / used)


def sample_anchors(
    matches: ops.AnchorMatches, negative_overlap: float, batch_size: int, max_foreground: int
) -> tuple[Tensor, Tensor]:
    """Draw the anchors to learn from: index (N, batch_size) int64 and labels, as in RPNTargets."""
    background = matches.inside & (matches.max_overlap < negative_overlap)
    shape = (len(background), max_foreground + batch_size)
    random = torch.rand(shape, device=background.device)
    return ops.sample_anchors(matches.foreground, background, random, max_foreground)
