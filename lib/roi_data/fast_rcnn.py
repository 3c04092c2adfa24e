"""Sampling of RoIs for the box head, and its targets, for all images of a mini-batch at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import ops
import utils.boxes as box_utils


class RoIPool(NamedTuple):
    """Boxes that RoIs are drawn from, and what the ground truth means to each.

    Attributes:
        boxes: (N, P, 4) float32, original-image pixels; the ground truth comes first.
        max_overlap: (N, P) float32, best IoU with a ground truth; -1 for empty and ignored slots.
        gt_index: (N, P) int64, ground truth of that IoU.
        gt_class: (N, P) int64, its class where the boxes overlap, else 0.
    """

    boxes: Tensor
    max_overlap: Tensor
    gt_index: Tensor
    gt_class: Tensor


class SampledRoIs(NamedTuple):
    """A fixed number S of RoI slots an image, foreground first.

    Attributes:
        boxes: (N, S, 4) float32, original-image pixels.
        labels: (N, S) int64 class, 0 for background and empty slots.
        valid: (N, S) bool, slots that hold an RoI.
        gt_index: (N, S) int64, the matched ground truth.
        bbox_targets: (N, S, 4) float32 deltas of the foreground times BBOX_REG_WEIGHTS.
        regressed: (N, S) bool, the foreground whose deltas are learned.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    gt_index: Tensor
    bbox_targets: Tensor
    regressed: Tensor

    @property
    def foreground(self) -> Tensor:
        """(N, S) bool."""
        return self.labels > 0


@torch.no_grad()
def roi_pool_of(
    proposals: Tensor,
    proposals_valid: Tensor,
    gt_boxes: Tensor,
    gt_classes: Tensor,
    gt_crowd: Tensor,
) -> RoIPool:
    """The proposals and the ground truth, crowd regions aside, matched to the ground truth.

    Args:
        proposals: (N, P, 4) float32, original-image pixels.
        proposals_valid: (N, P) bool.
        gt_boxes: (N, G, 4) float32, original-image pixels; padded.
        gt_classes: (N, G) int64, 0 in padding.
        gt_crowd: (N, G) bool; a crowd region is matched to, but is no RoI itself.
    """
    own = (gt_classes > 0) & ~gt_crowd
    boxes = torch.cat([gt_boxes, proposals], dim=1)
    valid = torch.cat([own, proposals_valid], dim=1)
    return match_rois(boxes, valid, gt_boxes, gt_classes, num_own=gt_boxes.shape[1])


@torch.no_grad()
def sample_rois(
    pool: RoIPool,
    gt_boxes: Tensor,
    *,
    batch_size: int,
    fg_fraction: float,
    fg_thresh: float,
    bg_thresh_hi: float,
    bg_thresh_lo: float,
    bbox_thresh: float,
    bbox_reg_weights: tuple[float, ...],
    regress_to: Tensor | None = None,
) -> SampledRoIs:
    """Draw `batch_size` RoIs an image from the pool, with targets.

    Args:
        pool: as roi_pool_of() gives it.
        gt_boxes: (N, G, 4) float32, original-image pixels.
        batch_size, fg_fraction: at most round(fg_fraction * batch_size) foreground RoIs;
            background fills the rest; both without replacement.
        fg_thresh, bg_thresh_hi, bg_thresh_lo: foreground has IoU >= fg_thresh, background
            lies in [bg_thresh_lo, bg_thresh_hi).
        bbox_thresh: IoU from which on foreground learns deltas (TRAIN.BBOX_THRESH).
        bbox_reg_weights: MODEL.BBOX_REG_WEIGHTS.
        regress_to: (N, G) bool, the ground truth that deltas may lead to; by default they lead to
            that of the best IoU, crowd regions included.

    Source: Fast R-CNN, section 2.3, as Detectron samples (matching in the original image).
    """
    index, valid = draw_rois(
        pool.max_overlap,
        batch_size,
        round(fg_fraction * batch_size),
        fg_thresh,
        bg_thresh_hi,
        bg_thresh_lo,
    )
    boxes = pool.boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
    gt_index = pool.gt_index.gather(1, index)
    overlap = pool.max_overlap.gather(1, index)
    foreground = valid & (overlap >= fg_thresh)
    labels = torch.where(foreground, pool.gt_class.gather(1, index), 0)
    regressed = (labels > 0) & (overlap >= bbox_thresh)
    goal = gt_index
    if regress_to is not None:
        overlaps = box_utils.bbox_overlaps(boxes, gt_boxes)
        goal = torch.where(regress_to.unsqueeze(1), overlaps, -1.0).argmax(dim=2)
        # A ground truth is its own goal, also where another has the same box.
        goal = torch.where(index < gt_boxes.shape[1], gt_index, goal)
        regressed = regressed & regress_to.any(dim=1, keepdim=True)
    targets = bbox_targets(boxes, gt_boxes, goal, regressed, bbox_reg_weights)
    return SampledRoIs(boxes, labels, valid, gt_index, targets, regressed)


def match_rois(
    boxes: Tensor, valid: Tensor, gt_boxes: Tensor, gt_classes: Tensor, num_own: int = 0
) -> RoIPool:
    """Best ground truth (crowd regions included) of each box.

    Args:
        boxes: (N, P, 4), of which the first `num_own` are the ground truth itself.
        valid: (N, P) bool.
        gt_boxes: (N, G, 4); gt_classes: (N, G), 0 in padding.
    """
    # Which are foreground is of no use here: from IoU 0 on all are, which needs no search for ties.
    _, _, max_overlap, gt_index = ops.match_anchors(boxes, gt_boxes, gt_classes > 0, None, 0, -1)
    if num_own:
        # A ground truth is its own match, also where another has the same box.
        gt_index[:, :num_own] = torch.arange(num_own, device=boxes.device)
    gt_class = torch.where(max_overlap > 0, gt_classes.gather(1, gt_index), 0)
    # A box beside every ground truth has overlap 0; so has every box of an empty image.
    max_overlap = torch.where(valid, max_overlap.clamp(min=0), -1.0)
    return RoIPool(boxes, max_overlap, gt_index, gt_class)


def draw_rois(
    max_overlap: Tensor,
    batch_size: int,
    max_foreground: int,
    fg_thresh: float,
    bg_thresh_hi: float,
    bg_thresh_lo: float,
) -> tuple[Tensor, Tensor]:
    """Random slots of the pool: (N, S) indices, foreground first, and which of them count."""
    foreground = max_overlap >= fg_thresh
    background = (max_overlap < bg_thresh_hi) & (max_overlap >= bg_thresh_lo) & ~foreground
    background &= max_overlap >= 0
    key = torch.rand(max_overlap.shape, device=max_overlap.device)
    size = min(batch_size, max_overlap.shape[1])
    fg_key = torch.where(foreground, key, -1.0)
    fg_chosen, fg_index = fg_key.topk(min(max_foreground, size), dim=1)
    # Chosen foreground sorts before background, everything else behind it.
    order = torch.where(background, key, -1.0).scatter_add(
        1, fg_index, torch.where(fg_chosen >= 0, 3.0, 0.0)
    )
    chosen, index = order.topk(size, dim=1)
    return index, chosen >= 0


def bbox_targets(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_index: Tensor,
    foreground: Tensor,
    weights: tuple[float, ...],
) -> Tensor:
    """Deltas (N, S, 4) from boxes (N, S, 4) to their matched ground truth; 0 off foreground."""
    matched = gt_boxes.gather(1, gt_index.unsqueeze(-1).expand(-1, -1, 4))
    deltas = box_utils.bbox_transform_inv(boxes, matched, weights)
    return torch.where(foreground.unsqueeze(-1), deltas, 0.0)
