"""Frozen batch normalisation as a per-channel scale and shift."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AffineChannel2d(nn.Module):
    """y = x * weight + bias per channel; what is left of batch norm in Detectron's models.

    Both parameters are frozen: they come with the ImageNet weights and are never trained.

    Args:
        num_features: channels C of the (N, C, H, W) input.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.weight = nn.Parameter(torch.ones(num_features), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(num_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, self.num_features, 1, 1)
        return torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))

    def extra_repr(self) -> str:
        return f"{self.num_features}"


def conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)), with a frozen affine norm folded into the convolution's weights.

    Scaling the weights costs a thousandth of scaling the feature map and stays differentiable
    with respect to the convolution's weight.
    """
    if not isinstance(norm, AffineChannel2d):
        return norm(conv(x))
    weight = conv.weight * norm.weight.view(-1, 1, 1, 1)
    return F.conv2d(x, weight, norm.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
