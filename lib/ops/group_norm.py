"""Group normalisation (Wu and He 2018) with the addition and the ReLU that follow it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _roi


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """act(weight * (x - mean) / sqrt(variance + eps) + bias + residual), by image and group.

    Differentiable in x, weight, bias and residual, once. On CUDA two passes over a large map and
    one over a small one, and as many for the gradient; the result of half types is rounded once.

    Args:
        x: (N, C, H, W) float64, float32, float16 or bfloat16, contiguous or channels_last, both
            used as they are.
        num_groups: of neighbouring channels; a divisor of C.
        weight, bias: (C,) float32 (float64 for float64 maps; others are converted).
        eps: added to the variance.
        relu: whether negative results become 0.
        residual: like x, what is added before the ReLU.

    Returns:
        (N, C, H, W) with dtype and memory format of x. Mean and variance, and all sums of the
        gradient, are of float32 (float64 for float64) in a fixed order: they repeat bit for bit.
        They are taken as distances from values of the map itself, so that a mean far larger than
        the deviation costs no accuracy.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.ops.detectron.group_norm(
        x, weight.to(wide), bias.to(wide), residual, num_groups, eps, relu
    )[0]


def _like(x: Tensor) -> Tensor:
    """A map without values, in the layout that the kernels give it."""
    last = _roi.is_channels_last([x])
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)


@torch.library.register_fake("detectron::group_norm")
def _group_norm_fake(x, weight, bias, residual, groups, eps, relu):
    moments = weight.new_empty((x.shape[0], groups))
    return _like(x), moments, torch.empty_like(moments)


@torch.library.register_fake("detectron::group_norm_backward")
def _group_norm_backward_fake(grad, x, weight, bias, mean, rstd, out, groups, relu):
    parameter = weight.new_empty(weight.shape)
    residual = x.new_empty((0,)) if out is None else _like(x)
    return _like(x), parameter, torch.empty_like(parameter), residual
