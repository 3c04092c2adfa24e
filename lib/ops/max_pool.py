"""3x3 max pooling with stride 2 that does not note where the largest values were."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library, _roi  # noqa: F401


def max_pool(x: Tensor) -> Tensor:
    """`F.max_pool2d(x, 3, stride=2, padding=1)`.

    On CUDA, where x has no gradient to be sent back, without the int64 place of every value that
    torch writes beside it: with half types these are four times the values' own bytes.

    Args:
        x: (N, C, H, W) floating point, NCHW or channels_last, both used as they are.

    Returns:
        (N, C, ceil(H / 2), ceil(W / 2)) with x's dtype and memory format. NaN is the largest.
    """
    differentiated = torch.is_grad_enabled() and x.requires_grad
    if not x.is_cuda or differentiated or torch.compiler.is_compiling():
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    return torch.ops.detectron.max_pool(x)


@torch.library.register_fake("detectron::max_pool")
def _max_pool_fake(x: Tensor) -> Tensor:
    last = _roi.is_channels_last([x])
    shape = (*x.shape[:2], (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2)
    return torch.empty(
        shape,
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
