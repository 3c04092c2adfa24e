"""Caffe2's fillers under their own names."""

from __future__ import annotations

import math

from torch import Tensor, nn


def XavierFill(tensor: Tensor) -> Tensor:
    """Uniform in +-sqrt(3 / fan_in), fan_in = numel / shape[0]; in place."""
    bound = math.sqrt(3.0 / (tensor.numel() / tensor.shape[0]))
    return nn.init.uniform_(tensor, -bound, bound)


def MSRAFill(tensor: Tensor) -> Tensor:
    """Normal with standard deviation sqrt(2 / fan_out), fan_out = numel / shape[1]; in place."""
    return nn.init.normal_(tensor, std=math.sqrt(2.0 / (tensor.numel() / tensor.shape[1])))


def conv_fill(name: str, std: float):
    """The filler a config names: 'GaussianFill' N(0, std) or 'MSRAFill'.

    Raises:
        ValueError: for any other name.
    """
    if name == "GaussianFill":
        return lambda tensor: nn.init.normal_(tensor, std=std)
    if name == "MSRAFill":
        return MSRAFill
    raise ValueError(f"unknown initialiser {name!r}: use 'GaussianFill' or 'MSRAFill'")
