"""Cell anchors of Faster R-CNN and the field of them over a feature map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def generate_anchors(
    stride: int = 16,
    sizes: Sequence[float] = (32, 64, 128, 256, 512),
    aspect_ratios: Sequence[float] = (0.5, 1, 2),
) -> np.ndarray:
    """Anchors (len(aspect_ratios) * len(sizes), 4), float64, of the cell at the origin.

    The reference box (0, 0, stride - 1, stride - 1) is first reshaped to each aspect ratio
    (height / width; sides rounded), then scaled to each size; ratios vary slowest.
    Source: Faster R-CNN's anchor scheme as Detectron computes it.
    """
    centre = 0.5 * (stride - 1)
    width = np.round(np.sqrt(stride * stride / np.asarray(aspect_ratios, dtype=np.float64)))
    height = np.round(width * np.asarray(aspect_ratios, dtype=np.float64))
    scales = np.asarray(sizes, dtype=np.float64) / stride
    half_w = 0.5 * (np.outer(width, scales).ravel() - 1)
    half_h = 0.5 * (np.outer(height, scales).ravel() - 1)
    return np.stack([centre - half_w, centre - half_h, centre + half_w, centre + half_h], axis=1)


def anchor_field(cell_anchors: Tensor, stride: int, height: int, width: int) -> Tensor:
    """Anchors of every cell of a feature map.

    Args:
        cell_anchors: (A, 4) float32 anchors of the cell at the origin.
        stride: pixels of the network's input per cell.
        height, width: of the feature map, in cells.

    Returns:
        (height * width * A, 4) float32 on the device of cell_anchors; the anchor varies fastest,
        then the column.
    """
    x = torch.arange(width, dtype=torch.float32, device=cell_anchors.device) * stride
    y = torch.arange(height, dtype=torch.float32, device=cell_anchors.device) * stride
    shift_y, shift_x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack([shift_x, shift_y, shift_x, shift_y], dim=-1)
    return (shifts.reshape(-1, 1, 4) + cell_anchors).reshape(-1, 4)
