"""RoIs and targets of the keypoint head, for all images of a mini-batch at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.config import cfg
from roi_data.fast_rcnn import roi_pool_of


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


@dataclass(frozen=True)
class KeypointQuota:
    """How many visible keypoints a mini-batch on file proposals must have in its RoIs.

    Source: Detectron redraws such mini-batches (KRCNN.MIN_KEYPOINT_COUNT_FOR_VALID_MINIBATCH), but
    not end-to-end, where the proposals are not known in the loader.
    """

    more_than: int
    fg_thresh: float
    max_rois: int  # foreground RoIs of an image

    @classmethod
    def from_cfg(cls) -> KeypointQuota | None:
        """That of the config; None for models that need none."""
        if cfg.MODEL.FASTER_RCNN or not cfg.MODEL.KEYPOINTS_ON:
            return None
        max_rois = round(cfg.TRAIN.FG_FRACTION * cfg.TRAIN.BATCH_SIZE_PER_IM)
        least = cfg.KRCNN.MIN_KEYPOINT_COUNT_FOR_VALID_MINIBATCH
        return cls(least, cfg.TRAIN.FG_THRESH, max_rois)

    def met_by(self, batch: Mapping[str, Any]) -> bool:
        """Whether keypoint_targets() will find more than that in a mini-batch, whatever it draws.

        Where an image has more RoIs than are drawn, those with the fewest points count.
        """
        gt = [batch[key] for key in ("gt_boxes", "gt_classes", "gt_crowd")]
        none = gt[0][:, :0], gt[2][:, :0]
        given = batch.get("proposals", none[0]), batch.get("proposals_valid", none[1])
        pool = roi_pool_of(*given, *gt)
        points = batch["gt_keypoints"]
        index = pool.gt_index[..., None, None].expand(-1, -1, *points.shape[2:])
        count = visible_inside(points.gather(1, index), pool.boxes).sum(dim=2)
        count = torch.where(pool.max_overlap >= self.fg_thresh, count, 0)
        fewest = torch.where(count > 0, count, torch.iinfo(count.dtype).max).sort(dim=1).values
        fewest = fewest[:, : self.max_rois]
        return int(fewest[fewest < torch.iinfo(count.dtype).max].sum()) > self.more_than


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
