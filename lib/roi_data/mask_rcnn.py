"""Mask targets: which object an RoI shows, rasterised on the model's device."""

from __future__ import annotations

import torch
from torch import Tensor

import ops
import utils.boxes as box_utils


class GroundTruthMasks:
    """The masks of a mini-batch as the loader packs them.

    Args:
        gt_poly_coords: (T, 2) float32 vertices, original-image pixels.
        gt_poly_offsets: (polygons + 1,) int64 vertex ranges.
        gt_object_offsets: (N * G + 1,) int64 polygon ranges of object n * G + g.
        gt_poly_boxes: (N, G, 4) float32 extents of the masks.
        gt_has_mask: (N, G) bool.
        gt_bitmasks: (B, H, W) uint8 decoded masks of the objects that came as RLE.
        gt_bitmask_index: (N, G) int64, -1 where there is none.
    """

    def __init__(
        self,
        *,
        gt_poly_coords: Tensor,
        gt_poly_offsets: Tensor,
        gt_object_offsets: Tensor,
        gt_poly_boxes: Tensor,
        gt_has_mask: Tensor,
        gt_bitmasks: Tensor,
        gt_bitmask_index: Tensor,
    ) -> None:
        self.coords = gt_poly_coords
        self.poly_offsets = gt_poly_offsets
        self.object_offsets = gt_object_offsets
        self.boxes = gt_poly_boxes
        self.has_mask = gt_has_mask
        self.bitmasks = gt_bitmasks
        self.bitmask_index = gt_bitmask_index


@torch.no_grad()
def mask_targets(
    rois: Tensor,
    foreground: Tensor,
    gt_boxes: Tensor,
    gt_own: Tensor,
    masks: GroundTruthMasks,
    resolution: int,
) -> tuple[Tensor, Tensor]:
    """Binary masks of the objects that foreground RoIs show.

    Args:
        rois: (N, Q, 4) float32, original-image pixels.
        foreground: (N, Q) bool.
        gt_boxes: (N, G, 4) float32, original-image pixels.
        gt_own: (N, G) bool, objects that are neither padding nor crowd.
        masks: of the mini-batch.
        resolution: M, side of the targets.

    Returns:
        targets (N * Q, M, M) uint8 and valid (N * Q,) bool: False off foreground and where the
        object has no usable mask (Detectron's all -1 targets).
    """
    num_images, num_objects = gt_own.shape
    index = choose_objects(rois, gt_boxes, gt_own, masks)
    valid = foreground & masks.has_mask.gather(1, index)
    flat = index + torch.arange(num_images, device=index.device).unsqueeze(1) * num_objects
    flat = torch.where(valid, flat, -1).flatten()
    boxes = rois.reshape(-1, 4)
    targets = ops.polygons_to_masks(
        masks.coords,
        masks.poly_offsets,
        masks.object_offsets,
        boxes,
        flat,
        resolution,
    )
    if masks.bitmasks.shape[0]:
        bitmask = masks.bitmask_index.gather(1, index).flatten()
        bitmask = torch.where(valid.flatten(), bitmask, -1)
        cropped = crop_bitmasks(masks.bitmasks, bitmask.clamp(min=0), boxes, resolution)
        targets = torch.where((bitmask >= 0).view(-1, 1, 1), cropped, targets)
    return targets, valid.flatten()


def choose_objects(
    rois: Tensor, gt_boxes: Tensor, gt_own: Tensor, masks: GroundTruthMasks
) -> Tensor:
    """(N, Q) int64: for each RoI the object whose mask's extent overlaps it most.

    An object without a usable mask is judged by its box, lest its RoIs learn a neighbour's mask.
    """
    extents = torch.where(masks.has_mask.unsqueeze(-1), masks.boxes, gt_boxes)
    overlaps = box_utils.bbox_overlaps(rois, extents)
    return torch.where(gt_own.unsqueeze(1), overlaps, -1.0).argmax(dim=2)


def crop_bitmasks(bitmasks: Tensor, index: Tensor, rois: Tensor, resolution: int) -> Tensor:
    """Masks (R, M, M) uint8: bitmask `index[r]` of (B, H, W) at the bins of RoI r.

    The grid is that of the polygon targets: M bins over max(x2 - x1, 1), where pixel p covers
    [p, p + 1).
    """
    height, width = bitmasks.shape[1:]
    start, end = rois[:, :2], rois[:, 2:]
    size = (end - start).clamp(min=1)
    step = (torch.arange(resolution, device=rois.device) + 0.5) / resolution
    x = (start[:, 0:1] + step * size[:, 0:1]).floor().long()
    y = (start[:, 1:2] + step * size[:, 1:2]).floor().long()
    inside = ((y >= 0) & (y < height)).unsqueeze(2) & ((x >= 0) & (x < width)).unsqueeze(1)
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    return bitmasks[index.view(-1, 1, 1), y.unsqueeze(2), x.unsqueeze(1)] * inside
