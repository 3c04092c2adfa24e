"""Keypoint heads: features of pooled RoIs, and one heat map a keypoint.

A head is a class `(dim_in, roi_xform_func, spatial_scale)` with `dim_out`,
`detectron_weight_mapping()` and `forward(x, rpn_ret) -> (R, dim_out, ?, ?)`;
`rpn_ret['keypoint_rois']` is (R, 5). Configs name it in `KRCNN.ROI_KEYPOINTS_HEAD`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

import nn as mynn
from core.config import cfg
from core.errors import UserError
from modeling.blobs import layer_blobs
from modeling.ResNet import roi_res5_stage, stage_blobs
from modeling.roi_head import RoIHead


class keypoint_outputs(nn.Module):
    """Heat-map logits (R, NUM_KEYPOINTS, S, S) of RoI features, S being HEATMAP_SIZE.

    An optional deconvolution with ReLU (USE_DECONV), the predictor (a deconvolution with
    USE_DECONV_OUTPUT, else 1x1), and bilinear upsampling by UP_SCALE.

    Raises:
        UserError: in forward, when that makes maps of another size.
    """

    def __init__(self, dim_in: int) -> None:
        super().__init__()
        kernel, num_keypoints = cfg.KRCNN.DECONV_KERNEL, cfg.KRCNN.NUM_KEYPOINTS
        deconv = {"kernel_size": kernel, "stride": 2, "padding": kernel // 2 - 1}
        self.deconv = None
        if cfg.KRCNN.USE_DECONV:
            self.deconv = nn.ConvTranspose2d(dim_in, cfg.KRCNN.DECONV_DIM, **deconv)
            nn.init.normal_(self.deconv.weight, std=0.01)
            nn.init.zeros_(self.deconv.bias)
            dim_in = cfg.KRCNN.DECONV_DIM
        if cfg.KRCNN.USE_DECONV_OUTPUT:
            self.classify = nn.ConvTranspose2d(dim_in, num_keypoints, **deconv)
        else:
            self.classify = nn.Conv2d(dim_in, num_keypoints, 1)
        mynn.init.conv_fill(cfg.KRCNN.CONV_INIT, 0.001)(self.classify.weight.data)
        nn.init.zeros_(self.classify.bias)
        self.upsample = None
        if cfg.KRCNN.UP_SCALE > 1:
            self.upsample = mynn.BilinearInterpolation2d(num_keypoints, cfg.KRCNN.UP_SCALE)

    def detectron_weight_mapping(self) -> tuple[dict[str, str | None], list[str]]:
        mapping: dict[str, str | None] = {}
        if self.deconv is not None:
            mapping |= layer_blobs("deconv", "kps_deconv")
        mapping |= layer_blobs(
            "classify", "kps_score" if self.upsample is None else "kps_score_lowres"
        )
        if self.upsample is not None:  # fixed weights: nothing to load
            mapping |= {"upsample.upconv.weight": None, "upsample.upconv.bias": None}
        return mapping, []

    def forward(self, x: Tensor) -> Tensor:
        if self.deconv is not None:
            x = mynn.conv_norm(self.deconv, None, x, relu=True)
        x = mynn.conv_norm(self.classify, None, x).float()
        x = x if self.upsample is None else self.upsample(x)
        # Targets are bins of the configured size: bins outside the map would crash the device.
        if x.shape[2] != cfg.KRCNN.HEATMAP_SIZE:
            raise UserError(
                f"KRCNN.HEATMAP_SIZE is {cfg.KRCNN.HEATMAP_SIZE}, but the heat maps are "
                f"{x.shape[2]}x{x.shape[3]} after {cfg.KRCNN.ROI_KEYPOINTS_HEAD}: change it, or "
                "KRCNN.ROI_XFORM_RESOLUTION, USE_DECONV, USE_DECONV_OUTPUT or UP_SCALE"
            )
        return x


def keypoint_loss(
    logits: Tensor, bins: Tensor, weights: Tensor, normalizer: float | None, loss_weight: float
) -> Tensor:
    """`loss_kps`: cross entropy over the bins of each heat map.

    Args:
        logits: (R, K, S, S); bins: (R, K) int64 in [0, S * S); weights: (R, K), 1 for keypoints
            that count.
        normalizer: None divides by the number of keypoints that count; a number divides by it.
        loss_weight: KRCNN.LOSS_WEIGHT.
    """
    per_point = F.cross_entropy(logits.flatten(0, 1).flatten(1), bins.flatten(), reduction="none")
    total = (per_point * weights.flatten()).sum()
    count = weights.sum().clamp(min=1) if normalizer is None else normalizer
    return loss_weight * total / count


class roi_pose_head_v1convX(RoIHead):
    """NUM_STACKED_CONVS convolutions of CONV_HEAD_DIM channels, with ReLU."""

    def __init__(self, dim_in: int, roi_xform_func, spatial_scale) -> None:
        super().__init__(roi_xform_func, spatial_scale, cfg.KRCNN, "keypoint_rois")
        self.dim_out = cfg.KRCNN.CONV_HEAD_DIM
        kernel = cfg.KRCNN.CONV_HEAD_KERNEL
        layers: list[nn.Module] = []
        for _ in range(cfg.KRCNN.NUM_STACKED_CONVS):
            conv = nn.Conv2d(dim_in, self.dim_out, kernel, padding=kernel // 2)
            mynn.init.conv_fill(cfg.KRCNN.CONV_INIT, 0.01)(conv.weight.data)
            nn.init.zeros_(conv.bias)
            layers += [conv, nn.ReLU(inplace=True)]
            dim_in = self.dim_out
        self.conv_fcn = nn.Sequential(*layers)

    def detectron_weight_mapping(self) -> tuple[dict[str, str], list[str]]:
        mapping: dict[str, str] = {}
        for i in range(cfg.KRCNN.NUM_STACKED_CONVS):
            mapping |= layer_blobs(f"conv_fcn.{2 * i}", f"conv_fcn{i + 1}")
        return mapping, []

    def forward(self, x, rpn_ret) -> Tensor:
        return mynn.conv_stack(self.conv_fcn, self.pool(x, rpn_ret))


class ResNet_roi_conv5_head_for_keypoints(RoIHead):
    """A res5 stage of its own (C4 models)."""

    def __init__(self, dim_in: int, roi_xform_func, spatial_scale) -> None:
        super().__init__(roi_xform_func, spatial_scale, cfg.KRCNN, "keypoint_rois")
        dilation = cfg.KRCNN.DILATION
        stride = 1 if dilation > 1 else cfg.KRCNN.ROI_XFORM_RESOLUTION // 7
        self.res5 = roi_res5_stage(dim_in, stride, dilation)
        self.dim_out = 8 * cfg.RESNETS.RES2_OUT_CHANNELS

    def detectron_weight_mapping(self) -> tuple[dict[str, str], list[str]]:
        return stage_blobs("res5", "_[pose]_res5", 3)

    def forward(self, x, rpn_ret) -> Tensor:
        return self.res5(self.pool(x, rpn_ret))
