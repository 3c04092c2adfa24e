"""VGG16 (Simonyan & Zisserman 2015, configuration D): backbone body and fully connected box head.

Configs name them `VGG16.VGG16_conv5_body` and `VGG16.VGG16_roi_fc_head`. Parameters have the names
of Detectron's blobs: `conv1_1.weight` is `conv1_1_w`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

import nn as mynn
from core.config import cfg
from modeling.blobs import layer_blobs
from modeling.roi_head import RoIHead

# Channels of each block's 3x3 convolutions; 2x2 max pooling lies between the blocks.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
FROZEN_BLOCKS = 2  # Detectron's gradient always stops after pool2, whatever FREEZE_AT says


class VGG16_conv5_body(nn.Module):
    """`forward` maps images (N, 3, H, W) to conv5_3 (N, 512, H // 16, W // 16), after its ReLU.

    Attributes:
        dim_out: channels of the output.
        spatial_scale: output size over input size.
    """

    def __init__(self) -> None:
        super().__init__()
        dim_in = 3
        for block, widths in enumerate(BLOCKS, start=1):
            for index, width in enumerate(widths, start=1):
                conv = caffe_filled(nn.Conv2d(dim_in, width, 3, padding=1))
                conv.requires_grad_(block > FROZEN_BLOCKS)
                self.add_module(f"conv{block}_{index}", conv)
                dim_in = width
        self.dim_out = dim_in
        self.spatial_scale = 1.0 / 2 ** (len(BLOCKS) - 1)

    def detectron_weight_mapping(self) -> tuple[dict[str, str], list[str]]:
        return own_layer_blobs(self), ["fc8_w", "fc8_b"]

    def forward(self, x: Tensor) -> Tensor:
        for block, widths in enumerate(BLOCKS, start=1):
            if block > 1:
                x = F.max_pool2d(x, kernel_size=2, stride=2)
            for index in range(1, len(widths) + 1):
                conv = getattr(self, f"conv{block}_{index}")
                x = mynn.conv_norm(conv, None, x, relu=True)
        return x


class VGG_fc_head(RoIHead):
    """fc6 and fc7 with ReLU on RoIs pooled to the grid that ImageNet's fc6 was trained on.

    There is no dropout. FAST_RCNN.ROI_XFORM_RESOLUTION is not read: fc6 fixes the grid.

    Attributes:
        resolution: side of the pooled features.
        fc_dims: outputs of fc6 and fc7.
    """

    resolution: int
    fc_dims: tuple[int, int]

    def __init__(self, dim_in: int, roi_xform_func: Callable, spatial_scale: float) -> None:
        super().__init__(roi_xform_func, spatial_scale, cfg.FAST_RCNN, "rois")
        self.pooling["resolution"] = self.resolution
        hidden, self.dim_out = self.fc_dims
        self.fc6 = caffe_filled(nn.Linear(dim_in * self.resolution**2, hidden))
        self.fc7 = caffe_filled(nn.Linear(hidden, self.dim_out))

    def detectron_weight_mapping(self) -> tuple[dict[str, str], list[str]]:
        return own_layer_blobs(self), []

    def forward(self, x, rpn_ret: dict[str, Tensor]) -> Tensor:
        x = self.pool(x, rpn_ret).flatten(1)
        return F.relu_(self.fc7(F.relu_(self.fc6(x))))


class VGG16_roi_fc_head(VGG_fc_head):
    """`forward` returns (R, 4096)."""

    resolution = 7
    fc_dims = (4096, 4096)


def caffe_filled(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """The layer with Caffe2's default filling: XavierFill, biases 0."""
    mynn.init.XavierFill(layer.weight.data)
    nn.init.zeros_(layer.bias)
    return layer


def own_layer_blobs(module: nn.Module) -> dict[str, str]:
    """Blobs of a module whose layers have the names of their blobs."""
    mapping: dict[str, str] = {}
    for name, _ in module.named_children():
        mapping |= layer_blobs(name, name)
    return mapping
