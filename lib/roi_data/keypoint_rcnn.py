"""RoIs and targets of the keypoint head, for all images of a mini-batch at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeypointTargets(NamedTuple):
    """A fixed number Q of RoI slots an image.

    Attributes:
        boxes: (N, Q, 4) float32, original-image pixels.
        valid: (N, Q) bool.
        bins: (N, Q, K) int64, row-major index into the S x S heat map.
        weights: (N, Q, K) float32, 1 for visible keypoints inside the RoI.
    """

    boxes: Tensor
    valid: Tensor
    bins: Tensor
    weights: Tensor


@torch.no_grad()
def keypoint_targets(
    pool: Tensor,
    max_overlap: Tensor,
    gt_index: Tensor,
    gt_keypoints: Tensor,
    *,
    fg_thresh: float,
    max_rois: int,
    heatmap_size: int,
) -> KeypointTargets:
    """Draw RoIs around people and label their keypoints.

    Args:
        pool: (N, P, 4) float32, ground truth and proposals, original-image pixels.
        max_overlap: (N, P) best IoU, -1 in empty slots; gt_index: (N, P) whose it is.
        gt_keypoints: (N, G, K, 3) x, y, visibility, original-image pixels.
        fg_thresh: IoU from which a box shows its person.
        max_rois: the foreground quota of an image.
        heatmap_size: S.

    A box takes part if a visible keypoint of its person lies inside it. Drawn from the whole pool,
    independently of the box head's RoIs.
    """
    num_keypoints = gt_keypoints.shape[2]
    index = gt_index.view(*gt_index.shape, 1, 1).expand(-1, -1, num_keypoints, 3)
    inside = visible_inside(gt_keypoints.gather(1, index), pool)
    usable = (max_overlap >= fg_thresh) & inside.any(dim=2)
    key = torch.where(usable, torch.rand(usable.shape, device=pool.device), -1.0)
    chosen, slot = key.topk(min(max_rois, key.shape[1]), dim=1)
    valid = chosen >= 0
    boxes = pool.gather(1, slot.unsqueeze(-1).expand(-1, -1, 4))
    points = gt_keypoints.gather(
        1, gt_index.gather(1, slot).view(*slot.shape, 1, 1).expand(-1, -1, num_keypoints, 3)
    )
    bins, weights = keypoints_to_bins(points, boxes, heatmap_size)
    return KeypointTargets(boxes, valid, bins, weights * valid.unsqueeze(-1))


def visible_inside(points: Tensor, boxes: Tensor) -> Tensor:
    """(..., K) bool: keypoints (..., K, 3) that are visible and inside their box (..., 4)."""
    x, y, visibility = points.unbind(-1)
    x1, y1, x2, y2 = boxes.unsqueeze(-2).unbind(-1)
    return (visibility > 0) & (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)


def keypoints_to_bins(points: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Heat-map bins and weights of keypoints.

    Args:
        points: (..., K, 3) x, y, visibility; boxes: (..., 4), same frame; size: S.

    Returns:
        bins (..., K) int64 and weights (..., K) float32: floor((x - x1) * S / (x2 - x1)) along
        each axis, the right and lower edges belonging to the last bin; weight 0 (and bin 0) for
        points that are invisible or outside.
    """
    x, y, visibility = points.unbind(-1)
    x1, y1, x2, y2 = boxes.unsqueeze(-2).unbind(-1)
    column = ((x - x1) * (size / (x2 - x1))).floor()
    row = ((y - y1) * (size / (y2 - y1))).floor()
    column = torch.where(x == x2, size - 1.0, column)
    row = torch.where(y == y2, size - 1.0, row)
    valid = (visibility > 0) & (column >= 0) & (row >= 0) & (column < size) & (row < size)
    bins = torch.where(valid, row * size + column, 0.0)
    return bins.long(), valid.float()
