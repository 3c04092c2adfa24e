"""Convolutions with what follows them: frozen or group normalisation, residual, ReLU.

With frozen or no normalisation that is one operator on CUDA (`ops.conv_act`). On the CPU, where
oneDNN's convolutions add the bias themselves, for torch.compile, which makes one kernel of what
follows a convolution, and for torch.export it is the plain expression. For group normalisation see
nn.group_norm. Modules with hooks are called, so that the hooks are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from nn.affine import AffineChannel2d
from nn.group_norm import group_norm, hooked


def conv_norm(
    conv: nn.Conv2d | nn.ConvTranspose2d,
    norm: AffineChannel2d | nn.GroupNorm | None,
    x: Tensor,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """act(norm(conv(x)) + residual), act being ReLU or nothing.

    A frozen affine norm is folded into the convolution, which then has no bias of its own: scaling
    the weights costs a thousandth of scaling the feature map and stays differentiable with respect
    to the convolution's weight.

    Args:
        norm: None for a convolution with a bias.
        x: (N, C, H, W); residual: like the result.
    """
    if isinstance(norm, nn.GroupNorm):
        return group_norm(norm, conv(x), relu, residual)
    watched = hooked(conv, norm)
    if _fused(x) and not watched:
        return _conv_act(conv, norm, x, relu, residual)
    if norm is None:
        out = conv(x)
    elif watched:
        out = norm(conv(x))
    else:
        weight = conv.weight * norm.weight.view(-1, 1, 1, 1)
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        out = F.conv2d(x, weight, norm.bias, *geometry)
    if watched:  # who has been shown the output may keep it
        out = out if residual is None else out + residual
        return F.relu(out) if relu else out
    if residual is not None:
        out = out.add_(residual)
    return F.relu_(out) if relu else out


def conv_norm_lateral(conv: nn.Conv2d, norm: nn.GroupNorm | None, x: Tensor, top: Tensor) -> Tensor:
    """norm(conv(x)) plus top upsampled by 2, nearest neighbour: the step down of a pyramid.

    Args:
        x: (N, C, 2 H, 2 W); top: (N, C_out, H, W).
    """
    if norm is None and _fused(x) and not hooked(conv, norm):
        return _conv_act(conv, norm, x, False, top)
    out = conv_norm(conv, norm, x)
    if _fused(x) and out.dtype == top.dtype:
        return ops.upsample_add(out, top)
    if torch.compiler.is_dynamo_compiling():
        # One kernel and, unlike interpolate() under autocast, in the maps' own type. Not the
        # operator: inductor writes out all that leads to one it meets first, here a backbone.
        blocks = out.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)) + top[:, :, :, None, :, None]
        return blocks.flatten(4, 5).flatten(2, 3)
    return out + F.interpolate(top, scale_factor=2, mode="nearest")


def conv_stack(layers: nn.Sequential, x: Tensor) -> Tensor:
    """`layers(x)` of convolutions that are each followed by ReLU, or by GroupNorm and ReLU."""
    for layer, following in zip(layers, layers[1:], strict=False):
        if isinstance(layer, nn.Conv2d):
            norm = following if isinstance(following, nn.GroupNorm) else None
            x = conv_norm(layer, norm, x, relu=True)
    return x


def _fused(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling()


def _conv_act(
    conv: nn.Conv2d | nn.ConvTranspose2d,
    norm: AffineChannel2d | None,
    x: Tensor,
    relu: bool,
    residual: Tensor | None,
) -> Tensor:
    return ops.conv_act(
        x,
        conv.weight,
        scale=None if norm is None else norm.weight,
        bias=conv.bias if norm is None else norm.bias,
        residual=residual,
        relu=relu,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        transposed=conv.transposed,
        groups=conv.groups,
    )
