"""Bilinear upsampling as a frozen deconvolution, as Caffe models carry it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BilinearInterpolation2d(nn.Module):
    """Upsampling by a whole factor with the weights of a deconvolution that does the same.

    The parameters (`upconv`, channels x channels, kernel 2 * up_scale) are frozen; they are there
    because checkpoints of the family have them.

    Args:
        channels: of input and output.
        up_scale: even factor.

    Raises:
        ValueError: the factor is odd.
    """

    def __init__(self, channels: int, up_scale: int) -> None:
        super().__init__()
        if up_scale % 2:
            raise ValueError(f"the upsampling factor must be even, not {up_scale}")
        kernel = 2 * up_scale
        self.up_scale = up_scale
        self.upconv = nn.ConvTranspose2d(
            channels, channels, kernel, stride=up_scale, padding=up_scale // 2
        )
        distance = (torch.arange(kernel) - (kernel - 1) / 2).abs() / up_scale
        weight = torch.zeros(channels, channels, kernel, kernel)
        weight[range(channels), range(channels)] = torch.outer(1 - distance, 1 - distance)
        self.upconv.weight = nn.Parameter(weight, requires_grad=False)
        self.upconv.bias = nn.Parameter(torch.zeros(channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) enlarged, in its own precision also under autocast.

        C may be less than `channels`, which are all treated alike.
        """
        # The diagonal alone: a full deconvolution would multiply by zeros channels times over.
        channels = x.shape[1]
        weight = self.upconv.weight.diagonal().permute(2, 0, 1).unsqueeze(1)[:channels]
        with torch.autocast(x.device.type, enabled=False):
            return F.conv_transpose2d(
                x,
                weight.to(x.dtype),
                stride=self.up_scale,
                padding=self.up_scale // 2,
                groups=channels,
            )
