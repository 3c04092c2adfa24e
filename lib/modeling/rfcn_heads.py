"""R-FCN (Dai et al. 2016): position-sensitive score maps in place of a box head.

`MODEL.TYPE: rfcn` takes any backbone; `ResNet50_rfcn` and `ResNet101_rfcn` put a 1x1 convolution to
1024 channels between backbone and score maps. FAST_RCNN.ROI_BOX_HEAD is not read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nn as mynn
from core.config import cfg
from modeling.blobs import layer_blobs
from modeling.roi_head import RoIHead

REDUCED_DIM = 1024


class rfcn_head(RoIHead):
    """Score maps of the whole image, pooled position-sensitively and averaged over the grid.

    `forward` returns the votes (R, C + 4 n) float32 of R RoIs: C class logits, then 4 deltas of n
    classes (2 when class-agnostic, the second for every class).

    Args:
        dim_in: channels of the maps.
        roi_xform_func, spatial_scale: as for every head (`modeling.roi_head`).
    """

    def __init__(self, dim_in: int, roi_xform_func, spatial_scale) -> None:
        super().__init__(roi_xform_func, spatial_scale, cfg.FAST_RCNN, "rois")
        cells = cfg.RFCN.PS_GRID_SIZE**2
        self.pooling |= {"method": "PSRoIPool", "resolution": cfg.RFCN.PS_GRID_SIZE}
        num_classes = cfg.MODEL.NUM_CLASSES
        slots = 2 if cfg.MODEL.CLS_AGNOSTIC_BBOX_REG else num_classes
        self.conv_dim_reduce = None
        if cfg.MODEL.TYPE != "rfcn":
            self.conv_dim_reduce = _conv1x1(dim_in, REDUCED_DIM)
            dim_in = REDUCED_DIM
        self.conv_cls = _conv1x1(dim_in, num_classes * cells)
        self.conv_bbox_pred = _conv1x1(dim_in, 4 * slots * cells)
        self.dim_out = num_classes + 4 * slots

    def detectron_weight_mapping(self) -> tuple[dict[str, str], list[str]]:
        mapping: dict[str, str] = {}
        for name, _ in self.named_children():
            mapping |= layer_blobs(name, name)
        return mapping, []

    def forward(self, x: list[Tensor] | Tensor, rpn_ret: dict[str, Tensor]) -> Tensor:
        scores = self._scores(x) if isinstance(x, Tensor) else [self._scores(level) for level in x]
        return self.pool(scores, rpn_ret).float().mean(dim=(2, 3))

    def _scores(self, x: Tensor) -> Tensor:
        """Both kinds of score maps side by side: one convolution and one pooling for the two."""
        if self.conv_dim_reduce is not None:
            x = mynn.conv_norm(self.conv_dim_reduce, None, x, relu=True)
        both = (self.conv_cls, self.conv_bbox_pred)
        weight, bias = (torch.cat([getattr(c, key) for c in both]) for key in ("weight", "bias"))
        return F.conv2d(x, weight, bias)


class rfcn_outputs(nn.Module):
    """Class scores (R, C) and box deltas (R, 4 n) out of the votes.

    In eval mode the scores are softmax probabilities, in training they are logits.
    """

    def detectron_weight_mapping(self) -> tuple[dict[str, str], list[str]]:
        return {}, []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        num_classes = cfg.MODEL.NUM_CLASSES
        cls_score, bbox_pred = x.split([num_classes, x.shape[1] - num_classes], dim=1)
        if not self.training:
            cls_score = F.softmax(cls_score, dim=1)
        return cls_score, bbox_pred


def _conv1x1(dim_in: int, dim_out: int) -> nn.Conv2d:
    conv = nn.Conv2d(dim_in, dim_out, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv
