"""The first convolution of a residual network, 7x7 with stride 2 on images, in half precision.

cuDNN's fast kernels for tensor cores want channels by the eight; for 3 it falls back to slow ones.
The same sums are a 4x4 convolution with stride 1 when the pixels of each 2x2 cell become channels
of one position (space to depth): 16, with a channel of zeros for each pixel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from nn.affine import AffineChannel2d
from nn.convolution import conv_norm
from nn.group_norm import group_norm, hooked


def conv_norm_stem(conv: nn.Conv2d, norm: AffineChannel2d | nn.GroupNorm, x: Tensor) -> Tensor:
    """relu(norm(conv(x))), as `conv_norm` computes it, but for the order of conv's sums.

    Half precision on CUDA takes the convolution of cells; what else there is, images with gradient,
    compilers and modules with hooks among it, takes `conv_norm`.

    Args:
        conv: 7x7 with stride 2 and padding 3, without bias.
        x: (N, C, H, W), C at most 4.

    Returns:
        (N, C_out, ceil(H / 2), ceil(W / 2))
    """
    half = _half_type(x)
    if half is None or hooked(conv, norm) or x.shape[1] != conv.in_channels:
        return conv_norm(conv, norm, x, relu=True)
    cells, weight = image_cells(x, half), cell_weight(conv.weight)
    if isinstance(norm, nn.GroupNorm):
        return group_norm(norm, ops.conv_act(cells, weight), relu=True)
    return ops.conv_act(cells, weight, scale=norm.weight, bias=norm.bias, relu=True)


def image_cells(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Images by 2x2 cells, with a border of 2 empty cells above and left, 1 below and right.

    Args:
        x: (N, C, H, W), C at most 4; an odd height or width is filled up with zeros.

    Returns:
        (N, 16, ceil(H / 2) + 3, ceil(W / 2) + 3) in dtype, channels_last. Channels are
        (row in the cell, column in the cell, one of 4 for each pixel).
    """
    height, width = x.shape[2:]
    if height % 2 or width % 2:
        x = F.pad(x, (0, width % 2, 0, height % 2))
    pixels = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # n, channel, cell y, y, cell x, x
    n, channels, height, _, width, _ = pixels.shape
    cells = x.new_zeros(n, height + 3, width + 3, 2, 2, 4, dtype=dtype)
    inside = cells[:, 2:-1, 2:-1, :, :, :channels]
    inside.copy_(pixels.permute(0, 2, 4, 3, 5, 1))  # one kernel moves and casts
    return cells.flatten(3).permute(0, 3, 1, 2)


def cell_weight(weight: Tensor) -> Tensor:
    """The weight for `image_cells` that sums as `weight` does with stride 2 and padding 3.

    The border of the cells is 4 pixels, not 3: their grid is then that of the image's even rows and
    columns. So the weight gets its 8th row and column in front.

    Args:
        weight: (C_out, C, 7, 7), C at most 4.

    Returns:
        (C_out, 16, 4, 4), channels_last, differentiable.
    """
    padded = F.pad(weight, (1, 0, 1, 0, 0, 4 - weight.shape[1]))
    taps = padded.unflatten(3, (4, 2)).unflatten(2, (4, 2))  # out, channel, cell y, y, cell x, x
    return taps.permute(0, 2, 4, 3, 5, 1).flatten(3).permute(0, 3, 1, 2)


def _half_type(x: Tensor) -> torch.dtype | None:
    """The half type that a convolution of x on CUDA runs in; None for whatever else."""
    if not x.is_cuda or x.requires_grad or torch.compiler.is_compiling():
        return None
    dtype = x.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    return dtype if dtype in (torch.float16, torch.bfloat16) else None
