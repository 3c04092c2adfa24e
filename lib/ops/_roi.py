"""What the RoI operators' wrappers, fake kernels and autograd formulas share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library  # noqa: F401


def as_levels(
    features: Tensor | Sequence[Tensor], spatial_scale: float | Sequence[float]
) -> tuple[list[Tensor], list[float]]:
    """Feature levels and their scales as the operators take them."""
    features = [features] if isinstance(features, Tensor) else list(features)
    scales = [spatial_scale] if isinstance(spatial_scale, (int, float)) else spatial_scale
    return features, [float(scale) for scale in scales]


def as_size(output_size: int | tuple[int, int]) -> tuple[int, int]:
    return (output_size, output_size) if isinstance(output_size, int) else output_size


def is_channels_last(features: Sequence[Tensor]) -> bool:
    """As the kernels decide it: one level that is unambiguously channels_last decides for all."""
    return any(
        f.is_contiguous(memory_format=torch.channels_last) and not f.is_contiguous()
        for f in features
    )


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def sizes_of(features: Sequence[Tensor]) -> list[int]:
    """[N, C, H of level 0, W of level 0, H of level 1, ...]: what backward knows of the maps."""
    return [*features[0].shape[:2], *(extent for f in features for extent in f.shape[2:])]


def fake_pooled(
    features: Sequence[Tensor],
    rois: Tensor,
    channels: int,
    pooled_h: int,
    pooled_w: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The operators' output without its values."""
    return torch.empty(
        (rois.shape[0], channels, pooled_h, pooled_w),
        dtype=dtype or features[0].dtype,
        device=features[0].device,
        memory_format=_format(is_channels_last(features)),
    )


def fake_maps(grad: Tensor, sizes: Sequence[int], channels_last: bool) -> list[Tensor]:
    """The gradients of the levels without their values; `sizes` as sizes_of() gives it."""
    images, channels, *extents = sizes
    return [
        torch.empty(
            (images, channels, height, width),
            dtype=grad.dtype,
            device=grad.device,
            memory_format=_format(channels_last),
        )
        for height, width in zip(extents[::2], extents[1::2], strict=True)
    ]
