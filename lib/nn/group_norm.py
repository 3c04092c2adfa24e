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

    One operator (`ops.group_norm`), which under autocast leaves x in its half type and in its
    memory format: torch's own runs in float32 there, and on CUDA copies channels_last maps to
    another layout and back. For torch.export (strict=False), and where the norm has hooks, it is
    the plain expression.

    Args:
        x: (N, C, H, W); residual: of its shape.
    """
    if not (_exporting() or hooked(norm)):
        residual = None if residual is None else residual.to(x.dtype)
        return ops.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, relu, residual)
    out = norm(x)
    out = out if residual is None else out + residual
    return F.relu(out) if relu else out


def _exporting() -> bool:
    """Whether torch.export (strict=False) looks on, whose programs get plain expressions."""
    # Under torch.compile torch.compiler.is_exporting() is true as well (torch 2.11).
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def hooked(*modules: nn.Module | None) -> bool:
    """Whether somebody looks at what goes through one of these: it must be called then."""
    return any(
        module is not None
        and bool(
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        )
        for module in modules
    )
