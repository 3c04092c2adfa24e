"""Feature-pyramid arithmetic: which level an RoI belongs to."""

from __future__ import annotations

import torch
from torch import Tensor

import utils.boxes as box_utils


def map_rois_to_fpn_levels(
    rois: Tensor, k_min: int, k_max: int, canonical_scale: float = 224, canonical_level: int = 4
) -> Tensor:
    """Pyramid level of each RoI by its size (FPN paper, eq. 1).

    Args:
        rois: (..., 4) boxes in network-input pixels.
        k_min, k_max: finest and coarsest level in use.
        canonical_scale, canonical_level: a box of side 224 belongs to level 4.

    Returns:
        (...,) int64 levels in [k_min, k_max].
    """
    side = torch.sqrt(box_utils.boxes_area(rois).clamp(min=0))
    level = torch.floor(canonical_level + torch.log2(side / canonical_scale + 1e-6))
    return level.clamp(k_min, k_max).to(torch.int64)
