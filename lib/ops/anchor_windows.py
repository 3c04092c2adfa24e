"""What a 3x3 convolution reads at the cells of some anchors, over one or several levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _roi


def anchor_windows(features: Sequence[Tensor], index: Tensor, num_anchors: int) -> Tensor:
    """The 3x3 windows of the feature maps around the cells that anchors belong to.

    With them a region proposal network is a matrix product at the few anchors that it learns from.
    Differentiable in every level's features.

    Args:
        features: (N, C, H, W) of each level, at most 8, with the same N, C and dtype; float64,
            float32, float16 or bfloat16, NCHW or channels_last, both used as they are.
        index: (N, S) int64, S at most 2,048: anchors of all levels side by side, of each level by
            row, column and anchor of the cell (H * W * num_anchors).
        num_anchors: of a cell.

    Returns:
        (N, S, 9, C) in the features' dtype, the window's pixels by row and column: zeros where it
        reaches outside of the map, and for an index that no anchor has. The gradient is summed in
        float32 (float64 for float64) in the order of the slots and rounded once: it repeats bit
        for bit.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
        NotImplementedError: the gradient is differentiated again.
    """
    return torch.ops.detectron.anchor_windows(features, index, num_anchors)


@torch.library.register_fake("detectron::anchor_windows")
def _anchor_windows_fake(features, index, num_anchors):
    return features[0].new_empty((*index.shape, 9, features[0].shape[1]))


@torch.library.register_fake("detectron::anchor_windows_backward")
def _anchor_windows_backward_fake(grad, index, num_anchors, sizes, channels_last):
    return _roi.fake_maps(grad, sizes, channels_last)
