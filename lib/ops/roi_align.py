"""RoIAlign (Mask R-CNN, section 3) over one feature map or all levels of a pyramid in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _roi


def roi_align(
    features: Tensor | Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float | Sequence[float],
    sampling_ratio: int,
    levels: Tensor | None = None,
    aligned: bool = False,
) -> Tensor:
    """Mean of bilinear samples in each cell of each RoI; differentiable in every level's features.

    Args:
        features: (N, C, H, W), or one such per level with the same N, C and dtype; float64,
            float32, float16 or bfloat16 (half types accumulate in float32), NCHW or channels_last,
            both used as they are. At most 8 levels.
        rois: (R, 5) [batch index, x1, y1, x2, y2] in network-input pixels, float32 (float64 is kept
            for float64 features).
        output_size: cells, one number or (height, width).
        spatial_scale: feature pixels per network-input pixel; one per level for several levels.
        sampling_ratio: samples per cell and axis; 0: adaptive, ceil(RoI size / cells).
        levels: (R,) int64, the index into `features` of each RoI; may be left out with one level.
        aligned: shift by half a pixel and allow RoIs smaller than a pixel. Detectron: False.

    Returns:
        (R, C, height, width) in RoI order, with dtype and memory format of the features. A RoI with
        a batch index or level out of range (negative: a padding row) or a coordinate that is not
        finite gives zeros and no gradient. Samples more than a pixel outside the map count as
        zeros. Inverted RoIs are widened to one feature pixel (`aligned=False`). The gradient is
        added up in float (double for double) in a fixed order: it repeats bit for bit. On the GPU
        the weights of a bfloat16 gradient are rounded to 17 bits.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
    """
    features, scales = _roi.as_levels(features, spatial_scale)
    size = _roi.as_size(output_size)
    return torch.ops.detectron.roi_align(
        features, rois, levels, scales, *size, sampling_ratio, aligned
    )


@torch.library.register_fake("detectron::roi_align")
def _roi_align_fake(features, rois, levels, scales, pooled_h, pooled_w, sampling_ratio, aligned):
    return _roi.fake_pooled(features, rois, features[0].shape[1], pooled_h, pooled_w)


@torch.library.register_fake("detectron::roi_align_backward")
def _roi_align_backward_fake(
    grad, rois, levels, scales, sizes, sampling_ratio, aligned, channels_last
):
    return _roi.fake_maps(grad, sizes, channels_last)


def _setup(ctx, inputs, output) -> None:
    features, rois, levels, scales, _, _, sampling_ratio, aligned = inputs
    ctx.save_for_backward(rois, levels)
    ctx.sizes = _roi.sizes_of(features)
    ctx.options = (scales, sampling_ratio, aligned)
    ctx.channels_last = _roi.is_channels_last(features)


def _backward(ctx, grad):
    rois, levels = ctx.saved_tensors
    scales, sampling_ratio, aligned = ctx.options
    grads = torch.ops.detectron.roi_align_backward(
        grad, rois, levels, scales, ctx.sizes, sampling_ratio, aligned, ctx.channels_last
    )
    return grads, None, None, None, None, None, None, None


def _setup_backward(ctx, inputs, output) -> None:
    grad, rois, levels, scales, _, sampling_ratio, aligned, _ = inputs
    ctx.save_for_backward(rois, levels)
    ctx.options = (scales, *grad.shape[2:], sampling_ratio, aligned)


def _double_backward(ctx, grads):
    """RoIAlign is linear in the features: the gradient of its gradient is RoIAlign itself."""
    rois, levels = ctx.saved_tensors
    scales, *options = ctx.options
    pooled = torch.ops.detectron.roi_align(grads, rois, levels, scales, *options)
    return pooled, None, None, None, None, None, None, None


torch.library.register_autograd("detectron::roi_align", _backward, setup_context=_setup)
torch.library.register_autograd(
    "detectron::roi_align_backward", _double_backward, setup_context=_setup_backward
)
