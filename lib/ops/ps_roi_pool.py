"""Position-sensitive RoI pooling (R-FCN, section 2) over one or several levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _roi


def ps_roi_pool(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    grid_size: int,
    spatial_scale: float | Sequence[float],
    levels: Tensor | None = None,
) -> Tensor:
    """Mean of each cell of each RoI, every cell over channels of its own.

    Differentiable in every level's features. On each axis x0 = round(x1) * scale and
    size = max((round(x2) + 1) * scale - x0, 0.1), halves rounded away from zero; cell p of n holds
    the pixels from floor(x0 + p * size / n) up to, not including, ceil(x0 + (p + 1) * size / n)
    that lie on the map.

    Args:
        features: (N, C * grid_size ** 2, H, W), or one such per level with the same N, channels and
            dtype; channel (c * grid_size + py) * grid_size + px serves cell (py, px) of output
            channel c. float64, float32, float16 or bfloat16 (half types accumulate in float32),
            NCHW or channels_last, both used as they are. At most 8 levels.
        rois: (R, 5) [batch index, x1, y1, x2, y2] in network-input pixels, float32 (float64 is kept
            for float64 features).
        grid_size: cells of an RoI on each axis.
        spatial_scale: feature pixels per network-input pixel; one per level for several levels.
        levels: (R,) int64, the index into `features` of each RoI; may be left out with one level.

    Returns:
        (R, C, grid_size, grid_size) in RoI order, with dtype and memory format of the features. A
        cell without pixels gives 0 and no gradient, and so does a whole RoI with a batch index or
        level out of range (negative: a padding row) or a coordinate that is not finite. An
        inverted RoI is 0.1 pixels wide. The gradient is summed in float32 (float64 for float64),
        on CUDA in a fixed order only under `torch.use_deterministic_algorithms(True)`.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
    """
    features, scales = _roi.as_levels(features, spatial_scale)
    return torch.ops.detectron.ps_roi_pool(features, rois, levels, scales, grid_size)


@torch.library.register_fake("detectron::ps_roi_pool")
def _ps_roi_pool_fake(features, rois, levels, scales, grid_size):
    channels = features[0].shape[1] // (grid_size * grid_size)
    return _roi.fake_pooled(features, rois, channels, grid_size, grid_size)


@torch.library.register_fake("detectron::ps_roi_pool_backward")
def _ps_roi_pool_backward_fake(grad, rois, levels, scales, sizes, channels_last):
    return _roi.fake_maps(grad, sizes, channels_last)
