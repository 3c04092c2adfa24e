"""RoICrop: bilinear crops of RoIs (spatial transformer networks) over one or several levels.

For one level this is `affine_grid` and `grid_sample(align_corners=True)`, but grid_sample takes
one grid an image and one map a call: RoIs would have to be grouped by image and level, which waits
for the device, and their crops put back in order. The operator reads all levels where they lie, and
with `max_pool` keeps one value of four instead of writing crops of twice the size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _roi


def roi_crop(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float],
    levels: Tensor | None = None,
    max_pool: bool = False,
) -> Tensor:
    """Bilinear samples at evenly spaced points of each RoI, its corners included.

    Differentiable in every level's features. On each axis point i of n lies at
    x1 + i / (n - 1) * (x2 - x1) in feature pixels (n = 1: in the middle), where pixel centres are
    whole numbers; pixels outside the map count as zeros.

    Args:
        features: (N, C, H, W), or one such per level with the same N, C and dtype; float64,
            float32, float16 or bfloat16 (half types accumulate in float32), NCHW or channels_last,
            both used as they are. At most 8 levels.
        rois: (R, 5) [batch index, x1, y1, x2, y2] in network-input pixels, float32 (float64 is kept
            for float64 features).
        output_size: values, one number or (height, width).
        spatial_scale: feature pixels per network-input pixel; one per level for several levels.
        levels: (R,) int64, the index into `features` of each RoI; may be left out with one level.
        max_pool: sample twice as finely and keep the largest of each 2 x 2 points
            (Detectron.pytorch's CROP_RESIZE_WITH_MAX_POOL); the gradient goes to the first of
            equal values.

    Returns:
        (R, C, height, width) in RoI order, with dtype and memory format of the features. A RoI with
        a batch index or level out of range (negative: a padding row) or a coordinate that is not
        finite gives zeros and no gradient. An inverted RoI is a mirrored crop. The gradient is
        summed in float32 (float64 for float64), on CUDA in a fixed order only under
        `torch.use_deterministic_algorithms(True)`.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
    """
    features, scales = _roi.as_levels(features, spatial_scale)
    size = _roi.as_size(output_size)
    return torch.ops.detectron.roi_crop(features, rois, levels, scales, *size, max_pool)[0]


@torch.library.register_fake("detectron::roi_crop")
def _roi_crop_fake(features, rois, levels, scales, pooled_h, pooled_w, max_pool):
    shape = (features[0].shape[1], pooled_h, pooled_w)
    if max_pool:
        choice = _roi.fake_pooled(features, rois, *shape, dtype=torch.uint8)
    else:
        choice = torch.empty(0, dtype=torch.uint8, device=rois.device)
    return _roi.fake_pooled(features, rois, *shape), choice


@torch.library.register_fake("detectron::roi_crop_backward")
def _roi_crop_backward_fake(grad, choice, rois, levels, scales, sizes, max_pool, channels_last):
    return _roi.fake_maps(grad, sizes, channels_last)
