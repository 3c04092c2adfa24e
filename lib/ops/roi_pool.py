"""RoIPoolF, the RoI max pooling of Fast R-CNN as Caffe2 rounds it, over one or several levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _roi


def roi_pool(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float],
    levels: Tensor | None = None,
) -> Tensor:
    """Largest value in each cell of each RoI; differentiable in every level's features.

    On each axis x0 = round(x1 * scale) and size = max(round(x2 * scale) - x0 + 1, 1), halves
    rounded away from zero; cell p of n holds the pixels from x0 + floor(p * size / n) up to, not
    including, x0 + ceil((p + 1) * size / n) that lie on the map.

    Args:
        features: (N, C, H, W), or one such per level with the same N, C and dtype; float64,
            float32, float16 or bfloat16, NCHW or channels_last, both used as they are. At most
            8 levels.
        rois: (R, 5) [batch index, x1, y1, x2, y2] in network-input pixels, float32 (float64 is kept
            for float64 features).
        output_size: cells, one number or (height, width).
        spatial_scale: feature pixels per network-input pixel; one per level for several levels.
        levels: (R,) int64, the index into `features` of each RoI; may be left out with one level.

    Returns:
        (R, C, height, width) in RoI order, with dtype and memory format of the features. A cell
        without pixels gives 0 and no gradient, and so does a whole RoI with a batch index or level
        out of range (negative: a padding row) or a coordinate that is not finite. An inverted RoI
        is the one pixel x0. A NaN in a cell is its largest value. The gradient goes to the first
        of equal values; it is summed in float32 (float64 for float64), on CUDA in a fixed order
        only under `torch.use_deterministic_algorithms(True)`.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
    """
    features, scales = _roi.as_levels(features, spatial_scale)
    size = _roi.as_size(output_size)
    return torch.ops.detectron.roi_pool(features, rois, levels, scales, *size)[0]


@torch.library.register_fake("detectron::roi_pool")
def _roi_pool_fake(features, rois, levels, scales, pooled_h, pooled_w):
    shape = (features[0].shape[1], pooled_h, pooled_w)
    argmax = _roi.fake_pooled(features, rois, *shape, dtype=torch.int32)
    return _roi.fake_pooled(features, rois, *shape), argmax


@torch.library.register_fake("detectron::roi_pool_backward")
def _roi_pool_backward_fake(grad, argmax, rois, levels, scales, sizes, channels_last):
    return _roi.fake_maps(grad, sizes, channels_last)
