"""Training targets of the region proposal network, for all images of a mini-batch at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import utils.boxes as box_utils


class RPNTargets(NamedTuple):
    """Targets of N images and A anchors (all levels side by side).

    Attributes:
        labels: (N, A) int8, 1 foreground, 0 background, -1 not used.
        bbox_targets: (N, A, 4) float32 deltas of the sampled foreground; 0 elsewhere.
        bbox_weights: (N, A) float32, inside times outside weight: 1 / (used anchors of the
            image) on foreground, 0 elsewhere.
    """

    labels: Tensor
    bbox_targets: Tensor
    bbox_weights: Tensor


class AnchorMatches(NamedTuple):
    """What a ground truth means to each anchor, before sub-sampling; all (N, A).

    Attributes:
        inside: bool, the anchor lies inside its image.
        foreground: bool.
        max_overlap: float32, best IoU with a ground truth (-1 without any or outside).
        gt_index: int64, ground truth of that IoU.
    """

    inside: Tensor
    foreground: Tensor
    max_overlap: Tensor
    gt_index: Tensor


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
    matches = match_anchors(anchors, gt_boxes, gt_valid, im_info, positive_overlap, straddle_thresh)
    labels, inside_weight = sample_anchors(
        matches, negative_overlap, batch_size, int(fg_fraction * batch_size)
    )
    targets = torch.where(
        # Foreground that the background draw overwrote has none: its loss would be weighted by 0.
        inside_weight.unsqueeze(-1) > 0,
        box_utils.bbox_transform_inv(
            anchors, gt_boxes.gather(1, matches.gt_index.unsqueeze(-1).expand(-1, -1, 4))
        ),
        0.0,
    )
    used = (labels >= 0).sum(dim=1, keepdim=True).clamp(min=1)
    return RPNTargets(labels, targets, inside_weight / used)


def match_anchors(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    im_info: Tensor,
    positive_overlap: float,
    straddle_thresh: float,
) -> AnchorMatches:
    """Which anchors are foreground, and each anchor's best ground truth.

    Foreground has IoU >= positive_overlap with a ground truth or ties the best IoU of one.
    Arguments as for rpn_targets().
    """
    height, width = im_info[:, 0:1], im_info[:, 1:2]
    t = straddle_thresh
    if t >= 0:
        inside = (anchors[:, 0] >= -t) & (anchors[:, 1] >= -t)
        inside = inside & (anchors[:, 2] < width + t) & (anchors[:, 3] < height + t)
    else:
        inside = torch.ones(len(im_info), len(anchors), dtype=torch.bool, device=anchors.device)
    per_image = [
        _match_image(anchors, *image, positive_overlap)
        for image in zip(gt_boxes, gt_valid, inside, strict=True)
    ]
    foreground, max_overlap, gt_index = (torch.stack(x) for x in zip(*per_image, strict=True))
    return AnchorMatches(inside, foreground, max_overlap, gt_index)


def _match_image(
    anchors: Tensor, gt_boxes: Tensor, gt_valid: Tensor, inside: Tensor, positive_overlap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """match_anchors() of one image; one at a time, so that (A, G) stays small."""
    overlaps = box_utils.bbox_overlaps(anchors, gt_boxes)
    overlaps = torch.where(inside[:, None] & gt_valid, overlaps, -1.0)
    max_overlap, gt_index = overlaps.max(dim=1)
    best_of_gt = overlaps.amax(dim=0)
    ties = ((overlaps == best_of_gt) & gt_valid).any(dim=1)
    return inside & (ties | (max_overlap >= positive_overlap)), max_overlap, gt_index


def sample_anchors(
    matches: AnchorMatches, negative_overlap: float, batch_size: int, max_foreground: int
) -> tuple[Tensor, Tensor]:
    """Draw the anchors to learn from.

    Returns:
        labels (N, A) int8 in {-1, 0, 1}, and the inside weight (N, A) float32: 1 for sampled
        foreground that the background draw did not overwrite.
    """
    foreground = matches.foreground
    key = torch.where(foreground, torch.rand(foreground.shape, device=foreground.device), -1.0)
    chosen, index = key.topk(min(max_foreground, key.shape[1]), dim=1)
    foreground = torch.zeros_like(foreground).scatter(1, index, chosen >= 0)
    draws = batch_size - foreground.sum(dim=1, keepdim=True)
    candidates = matches.inside & (matches.max_overlap < negative_overlap)
    background = _draw_with_replacement(candidates, draws, batch_size)
    labels = torch.where(background, 0, torch.where(foreground, 1, -1)).to(torch.int8)
    return labels, (foreground & ~background).float()


def _draw_with_replacement(candidates: Tensor, draws: Tensor, most: int) -> Tensor:
    """Mark `draws` (N, 1) random candidates (N, A); all of them when there are no more than that.

    Shapes stay fixed: `most` draws are made and those beyond `draws` land on a spare column.
    """
    num_images, num_anchors = candidates.shape
    order = candidates.cumsum(dim=1)
    total = order[:, -1:]
    rank = (torch.rand(num_images, most, device=candidates.device) * total).long()
    rank = torch.minimum(rank, (total - 1).clamp(min=0)) + 1
    hit = torch.searchsorted(order, rank)  # first column whose count reaches the rank
    spare = torch.arange(most, device=candidates.device) >= draws
    hit = torch.where(spare | (total == 0), num_anchors, hit)
    marked = torch.zeros(
        num_images, num_anchors + 1, dtype=torch.bool, device=candidates.device
    ).scatter(1, hit, True)
    return torch.where(total <= draws, candidates, marked[:, :-1])
