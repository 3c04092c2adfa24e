"""The top-down step of a feature pyramid: a map plus the next coarser one, upsampled by 2."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library, _roi  # noqa: F401


def upsample_add(lateral: Tensor, top: Tensor) -> Tensor:
    """lateral + top upsampled (nearest neighbour) in one pass, rounded once; differentiable.

    Args:
        lateral: (N, C, 2 H, 2 W) float64, float32, float16 or bfloat16, NCHW or channels_last.
        top: (N, C, H, W) of the same dtype.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
        NotImplementedError: the gradient is differentiated again.
    """
    return torch.ops.detectron.upsample_add(lateral, top)


@torch.library.register_fake("detectron::add_upsampled")
def _add_upsampled_fake(lateral: Tensor, top: Tensor) -> Tensor:
    return _empty(lateral, lateral.shape)


@torch.library.register_fake("detectron::sum_2x2")
def _sum_2x2_fake(map: Tensor) -> Tensor:
    images, channels, height, width = map.shape
    return _empty(map, (images, channels, height // 2, width // 2))


def _empty(like: Tensor, size: tuple[int, ...]) -> Tensor:
    last = _roi.is_channels_last([like])
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)
