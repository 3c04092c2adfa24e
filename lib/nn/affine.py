"""Frozen batch normalisation as a per-channel scale and shift."""

from __future__ import annotations

import torch
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
