"""Box heads: features of pooled RoIs, and the class and box predictions on top of them.

A head is a class `(dim_in, roi_xform_func, spatial_scale)` with an attribute `dim_out`, a method
`detectron_weight_mapping()` and `forward(x, rpn_ret) -> (R, dim_out)`; `rpn_ret['rois']` is
(R, 5). Configs name it `file.ClassName` in `FAST_RCNN.ROI_BOX_HEAD`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nn as mynn
from core.config import cfg
from modeling.blobs import conv_norm_blobs, layer_blobs
from modeling.ResNet import group_norm
from modeling.roi_head import RoIHead


class fast_rcnn_outputs(nn.Module):
    """Class scores (R, C) and box deltas (R, 4C; 8 when class-agnostic) of RoI features.

    In eval mode the scores are softmax probabilities, in training they are logits.
    """

    def __init__(self, dim_in: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(dim_in, cfg.MODEL.NUM_CLASSES)
        slots = 2 if cfg.MODEL.CLS_AGNOSTIC_BBOX_REG else cfg.MODEL.NUM_CLASSES
        self.bbox_pred = nn.Linear(dim_in, 4 * slots)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def detectron_weight_mapping(self) -> tuple[dict[str, str], list[str]]:
        return layer_blobs("cls_score", "cls_score") | layer_blobs("bbox_pred", "bbox_pred"), []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        cls_score, bbox_pred = self.cls_score(x).float(), self.bbox_pred(x).float()
        if not self.training:
            cls_score = F.softmax(cls_score, dim=1)
        return cls_score, bbox_pred


def fast_rcnn_losses(
    cls_score: Tensor,
    bbox_pred: Tensor,
    labels: Tensor,
    valid: Tensor,
    bbox_targets: Tensor,
    regressed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`loss_cls`, `loss_bbox` and `accuracy_cls` of R RoI slots.

    Args:
        cls_score: (R, C) logits.
        bbox_pred: (R, 4C) deltas, or (R, 8) when class-agnostic.
        labels: (R,) int64, 0 background.
        valid: (R,) bool; empty slots count for nothing.
        bbox_targets: (R, 4) deltas of the foreground, in the columns of its class.
        regressed: (R,) bool, which of the foreground learns deltas; all of it by default.

    Returns:
        Cross entropy, mean over the RoIs; smooth L1 (beta 1), sum over the foreground divided
        by the RoIs; the share of RoIs whose best class is right.
    """
    used = valid.float()
    count = used.sum().clamp(min=1)
    cross_entropy = F.cross_entropy(cls_score, labels, reduction="none")
    slots = bbox_pred.view(len(labels), -1, 4)
    slot = labels.clamp(max=slots.shape[1] - 1)  # class-agnostic: slot 1 serves every class
    pred = slots.gather(1, slot.view(-1, 1, 1).expand(-1, 1, 4)).squeeze(1)
    smooth_l1 = F.smooth_l1_loss(pred, bbox_targets, reduction="none").sum(dim=1)
    foreground = (labels > 0) & valid if regressed is None else regressed
    with torch.no_grad():
        accuracy = ((cls_score.argmax(dim=1) == labels) * used).sum() / count
    return (
        (cross_entropy * used).sum() / count,
        (smooth_l1 * foreground).sum() / count,
        accuracy,
    )


class roi_2mlp_head(RoIHead):
    """Two fully connected layers with ReLU."""

    def __init__(self, dim_in: int, roi_xform_func, spatial_scale) -> None:
        super().__init__(roi_xform_func, spatial_scale, cfg.FAST_RCNN, "rois")
        self.dim_out = cfg.FAST_RCNN.MLP_HEAD_DIM
        self.fc1 = _linear(dim_in * cfg.FAST_RCNN.ROI_XFORM_RESOLUTION**2, self.dim_out)
        self.fc2 = _linear(self.dim_out, self.dim_out)

    def detectron_weight_mapping(self) -> tuple[dict[str, str], list[str]]:
        return layer_blobs("fc1", "fc6") | layer_blobs("fc2", "fc7"), []

    def forward(self, x, rpn_ret) -> Tensor:
        # flatten() of a channels_last map still runs channel-major, as Detectron's weights do.
        x = self.pool(x, rpn_ret).flatten(1)
        return F.relu_(self.fc2(F.relu_(self.fc1(x))))


class roi_Xconv1fc_head(RoIHead):
    """NUM_STACKED_CONVS 3x3 convolutions and one fully connected layer, with ReLU."""

    use_gn = False

    def __init__(self, dim_in: int, roi_xform_func, spatial_scale) -> None:
        super().__init__(roi_xform_func, spatial_scale, cfg.FAST_RCNN, "rois")
        hidden = cfg.FAST_RCNN.CONV_HEAD_DIM
        layers: list[nn.Module] = []
        for _ in range(cfg.FAST_RCNN.NUM_STACKED_CONVS):
            conv = nn.Conv2d(dim_in, hidden, 3, padding=1, bias=not self.use_gn)
            mynn.init.MSRAFill(conv.weight.data)
            if self.use_gn:
                layers += [conv, group_norm(hidden), nn.ReLU(inplace=True)]
            else:
                nn.init.zeros_(conv.bias)
                layers += [conv, nn.ReLU(inplace=True)]
            dim_in = hidden
        self.convs = nn.Sequential(*layers)
        self.dim_out = cfg.FAST_RCNN.MLP_HEAD_DIM
        self.fc = _linear(dim_in * cfg.FAST_RCNN.ROI_XFORM_RESOLUTION**2, self.dim_out)

    def detectron_weight_mapping(self) -> tuple[dict[str, str], list[str]]:
        mapping = layer_blobs("fc", "fc6")
        for i in range(cfg.FAST_RCNN.NUM_STACKED_CONVS):
            blob = f"head_conv{i + 1}"
            if self.use_gn:
                conv, norm = f"convs.{3 * i}", f"convs.{3 * i + 1}"
                mapping |= conv_norm_blobs(conv, norm, blob, f"{blob}_gn")
            else:
                mapping |= layer_blobs(f"convs.{2 * i}", blob)
        return mapping, []

    def forward(self, x, rpn_ret) -> Tensor:
        x = mynn.conv_stack(self.convs, self.pool(x, rpn_ret))
        return F.relu_(self.fc(x.flatten(1)))


class roi_Xconv1fc_gn_head(roi_Xconv1fc_head):
    """roi_Xconv1fc_head with group normalisation after each convolution."""

    use_gn = True


def _linear(dim_in: int, dim_out: int) -> nn.Linear:
    layer = nn.Linear(dim_in, dim_out)
    mynn.init.XavierFill(layer.weight.data)
    nn.init.zeros_(layer.bias)
    return layer
