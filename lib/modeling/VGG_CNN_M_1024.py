"""VGG_CNN_M_1024 (Chatfield et al. 2014, CNN-M with 1024 features): body and box head.

Configs name them `VGG_CNN_M_1024.VGG_CNN_M_1024_conv5_body` and `…_roi_fc_head`. Parameters have
the names of Detectron's blobs: `conv1.weight` is `conv1_w`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

import nn as mynn
from modeling.VGG16 import VGG_fc_head, caffe_filled, own_layer_blobs


class VGG_CNN_M_1024_conv5_body(nn.Module):
    """`forward` maps images (N, 3, H, W) to conv5 (N, 512, H / 16, W / 16), after its ReLU.

    The first two convolutions and the poolings do not pad, so that the map lacks a few pixels of
    H / 16. The gradient always stops after the first pooling, whatever FREEZE_AT says.

    Attributes:
        dim_out: channels of the output.
        spatial_scale: output size over input size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = caffe_filled(nn.Conv2d(3, 96, 7, stride=2)).requires_grad_(False)
        self.conv2 = caffe_filled(nn.Conv2d(96, 256, 5, stride=2))
        self.conv3 = caffe_filled(nn.Conv2d(256, 512, 3, padding=1))
        self.conv4 = caffe_filled(nn.Conv2d(512, 512, 3, padding=1))
        self.conv5 = caffe_filled(nn.Conv2d(512, 512, 3, padding=1))
        self.dim_out = 512
        self.spatial_scale = 1.0 / 16.0

    def detectron_weight_mapping(self) -> tuple[dict[str, str], list[str]]:
        return own_layer_blobs(self), ["fc8_w", "fc8_b"]

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2):
            x = mynn.conv_norm(conv, None, x, relu=True)
            x = F.local_response_norm(x, size=5, alpha=5e-4, beta=0.75, k=2.0)
            x = F.max_pool2d(x, kernel_size=3, stride=2)
        for conv in (self.conv3, self.conv4, self.conv5):
            x = mynn.conv_norm(conv, None, x, relu=True)
        return x


class VGG_CNN_M_1024_roi_fc_head(VGG_fc_head):
    """`forward` returns (R, 1024)."""

    resolution = 6
    fc_dims = (4096, 1024)
