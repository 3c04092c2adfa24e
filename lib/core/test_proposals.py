"""The network on given RoIs: file proposals, those that are nearly alike computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.config import cfg


def run_on_proposals(
    net: nn.Module, data: Tensor, im_info: Tensor, rois: Tensor, dedup: float
) -> dict[str, Any]:
    """The network's output (as in eval mode) for RoIs (R, 5) in network pixels.

    dedup: RoIs of one image that are equal after `rint(roi * dedup)` are computed once, from the
        first of them; all of them get its scores and its box. 0 or less: each by itself.
        Source: Detectron's DEDUP_BOXES, which Fast R-CNN took over from SPP-net.
    """
    if not len(rois):  # nothing to look at: do without the backbone
        slots = 2 if cfg.MODEL.CLS_AGNOSTIC_BBOX_REG else cfg.MODEL.NUM_CLASSES
        shapes = {"cls_score": cfg.MODEL.NUM_CLASSES, "bbox_pred": 4 * slots}
        empty = {key: rois.new_zeros(0, columns) for key, columns in shapes.items()}
        return {"rois": rois, **empty, "blob_conv": None}
    if dedup <= 0:
        return net(data, im_info, rois=rois)
    first, group = unique_rois(rois, dedup)
    out = net(data, im_info, rois=rois[first])
    return {**out, **{key: out[key][group] for key in ("rois", "cls_score", "bbox_pred")}}


def unique_rois(rois: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The first of each set of RoIs that are equal after rint(coordinates * scale).

    Args:
        rois: (R, 5) batch index and box; RoIs of different images are never equal.

    Returns:
        index (U,) int64 of those first ones, and (R,) int64, which of them stands for each RoI.
    """
    cells = torch.cat([rois[:, :1], torch.round(rois[:, 1:] * scale)], dim=1).long()
    _, group = torch.unique(cells, dim=0, return_inverse=True)
    order = torch.arange(len(rois), device=rois.device)
    count = int(group.max()) + 1 if len(rois) else 0
    index = order.new_full((count,), len(rois)).scatter_reduce(0, group, order, "amin")
    return index, group
