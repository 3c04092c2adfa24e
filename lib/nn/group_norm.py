"""Group normalisation together with the addition and the ReLU that follow it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops


def group_norm(
    norm: nn.GroupNorm, x: Tensor, relu: bool = False, residual: Tensor | None = None
) -> Tensor:
    """act(norm(x) + residual), act being ReLU or nothing.

    On CUDA one operator (`ops.group_norm`), which under autocast leaves x in its half type and in
    its memory format: torch's own runs in float32 there and copies channels_last maps to another
    layout and back. On the CPU, and for torch.compile and torch.export, the plain expression.

    Args:
        x: (N, C, H, W); residual: of its shape.
    """
    if x.is_cuda and not torch.compiler.is_compiling():
        residual = None if residual is None else residual.to(x.dtype)
        return ops.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, relu, residual)
    out = norm(x)
    if residual is not None:
        out = out.add_(residual)
    return F.relu_(out) if relu else out
