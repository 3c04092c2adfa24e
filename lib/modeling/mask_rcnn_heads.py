"""Mask heads: features of pooled RoIs at mask resolution, and the mask predictor.

A head is a class `(dim_in, roi_xform_func, spatial_scale)` with `dim_out`,
`detectron_weight_mapping()` and `forward(x, rpn_ret) -> (R, dim_out, M, M)`;
`rpn_ret['mask_rois']` is (R, 5). Configs name it in `MRCNN.ROI_MASK_HEAD`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import nn as mynn
from core.config import cfg
from core.errors import UserError
from modeling.blobs import conv_norm_blobs, layer_blobs
from modeling.ResNet import group_norm, roi_res5_stage, stage_blobs
from modeling.roi_head import RoIHead


class mask_rcnn_outputs(nn.Module):
    """One mask a class (or one in all when class-agnostic) from RoI features.

    The predictor is a 1x1 convolution, followed by bilinear upsampling by MRCNN.UPSAMPLE_RATIO; or,
    with MRCNN.USE_FC_OUTPUT, one fully connected layer from the whole map to all M * M pixels. M is
    MRCNN.RESOLUTION, and features are M / UPSAMPLE_RATIO on a side.
    """

    def __init__(self, dim_in: int) -> None:
        super().__init__()
        self.num_masks = cfg.MODEL.NUM_CLASSES if cfg.MRCNN.CLS_SPECIFIC_MASK else 1
        self.resolution, ratio = cfg.MRCNN.RESOLUTION, cfg.MRCNN.UPSAMPLE_RATIO
        self.feature_size = self.resolution // ratio
        self.upsample = None
        if cfg.MRCNN.USE_FC_OUTPUT:
            pixels = self.resolution**2
            self.classify = nn.Linear(dim_in * self.feature_size**2, self.num_masks * pixels)
        else:
            self.classify = nn.Conv2d(dim_in, self.num_masks, 1)
            if ratio > 1:
                self.upsample = mynn.BilinearInterpolation2d(self.num_masks, ratio)
        name = cfg.MRCNN.CONV_INIT if cfg.MRCNN.CLS_SPECIFIC_MASK else "GaussianFill"
        mynn.init.conv_fill(name, 0.001)(self.classify.weight.data)
        nn.init.zeros_(self.classify.bias)

    def detectron_weight_mapping(self) -> tuple[dict[str, str | None], list[str]]:
        mapping: dict[str, str | None] = dict(layer_blobs("classify", "mask_fcn_logits"))
        if self.upsample is not None:  # fixed weights: nothing to load
            mapping |= dict.fromkeys(("upsample.upconv.weight", "upsample.upconv.bias"))
        return mapping, []

    def of_class(self, x: Tensor, labels: Tensor) -> Tensor:
        """Logits (R, M, M) of one class an RoI: features x (R, D, m, m), labels (R,) int64.

        A convolution's other rows are not computed: only one has a loss, or is pasted.

        Raises:
            UserError: the features are not M / UPSAMPLE_RATIO on a side.
        """
        if self.num_masks == 1:
            return self._logits(x).squeeze(1)
        if isinstance(self.classify, nn.Linear):
            index = labels.view(-1, 1, 1, 1).expand(-1, 1, self.resolution, self.resolution)
            return self._logits(x).gather(1, index).squeeze(1)
        self._check_size(x)
        weight, bias = self.classify.weight.flatten(1), self.classify.bias.unsqueeze(1)
        weight, bias = _Rows.apply(torch.cat([weight, bias], dim=1), labels).split(
            [weight.shape[1], 1], dim=1
        )
        weight = weight.to(x.dtype)
        # In the features' own memory format, or all their gradients would come in another one.
        if x.is_contiguous(memory_format=torch.channels_last):
            logits = torch.bmm(x.permute(0, 2, 3, 1).flatten(1, 2), weight.unsqueeze(2))
        else:
            logits = torch.bmm(weight.unsqueeze(1), x.flatten(2))
        logits = logits.view(len(x), 1, *x.shape[2:])
        logits = logits.float() + bias.view(-1, 1, 1, 1)
        return (logits if self.upsample is None else self.upsample(logits)).squeeze(1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Probabilities (R, C or 1, M, M) of features x (R, D, m, m), or with labels (R,) int64
        those of one class an RoI, (R, M, M); raises as of_class()."""
        return (self._logits(x) if labels is None else self.of_class(x, labels)).sigmoid()

    def _logits(self, x: Tensor) -> Tensor:
        self._check_size(x)
        if isinstance(self.classify, nn.Linear):
            logits = self.classify(x.flatten(1)).float()
            return logits.view(len(x), self.num_masks, self.resolution, self.resolution)
        logits = mynn.conv_norm(self.classify, None, x).float()
        return logits if self.upsample is None else self.upsample(logits)

    def _check_size(self, x: Tensor) -> None:
        if x.shape[2] != self.feature_size:
            raise UserError(
                f"{cfg.MRCNN.ROI_MASK_HEAD} makes maps of {x.shape[2]}x{x.shape[3]}, but "
                f"MRCNN.RESOLUTION {self.resolution} with MRCNN.UPSAMPLE_RATIO "
                f"{cfg.MRCNN.UPSAMPLE_RATIO} needs {self.feature_size}x{self.feature_size}: change "
                "one of them, or MRCNN.ROI_XFORM_RESOLUTION"
            )


class _Rows(torch.autograd.Function):
    """rows[index] of rows (C, D), index (R,), whose gradient is a matrix product: that of indexing
    adds the rows of one class up one after another. It rounds what is added as products of the
    rows' type do (TF32)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(rows)
        return rows[index]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        chosen = index == torch.arange(ctx.count, device=index.device).unsqueeze(1)
        with torch.autocast(grad.device.type, enabled=False):
            return chosen.to(grad.dtype) @ grad, None


def mask_rcnn_loss(logits: Tensor, targets: Tensor, valid: Tensor, weight: float) -> Tensor:
    """`loss_mask`: binary cross entropy, mean over the pixels of the valid RoIs, times `weight`.

    Args:
        logits: (R, M, M) of each RoI's class; targets: (R, M, M) in {0, 1}; valid: (R,) bool.
    """
    per_pixel = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
    used = valid.float()
    pixels = (used.sum() * targets[0].numel()).clamp(min=1) if len(targets) else 1
    return weight * (per_pixel * used.view(-1, 1, 1)).sum() / pixels


class mask_rcnn_fcn_head_v1upXconvs(RoIHead):
    """`num_convs` 3x3 convolutions and a 2x2 deconvolution with stride 2, all with ReLU."""

    num_convs: int
    use_gn = False

    def __init__(self, dim_in: int, roi_xform_func, spatial_scale) -> None:
        super().__init__(roi_xform_func, spatial_scale, cfg.MRCNN, "mask_rois")
        self.dim_out = cfg.MRCNN.DIM_REDUCED
        fill = mynn.init.conv_fill(cfg.MRCNN.CONV_INIT, 0.001)
        # The GN head pads by the dilation but does not dilate, as Detectron's.
        padding = cfg.MRCNN.DILATION
        dilation = 1 if self.use_gn else cfg.MRCNN.DILATION
        layers: list[nn.Module] = []
        for _ in range(self.num_convs):
            conv = nn.Conv2d(
                dim_in,
                self.dim_out,
                3,
                padding=padding,
                dilation=dilation,
                bias=not self.use_gn,
            )
            fill(conv.weight.data)
            if self.use_gn:
                layers += [conv, group_norm(self.dim_out), nn.ReLU(inplace=True)]
            else:
                nn.init.zeros_(conv.bias)
                layers += [conv, nn.ReLU(inplace=True)]
            dim_in = self.dim_out
        self.conv_fcn = nn.Sequential(*layers)
        self.upconv = nn.ConvTranspose2d(dim_in, self.dim_out, 2, stride=2)
        fill(self.upconv.weight.data)
        nn.init.zeros_(self.upconv.bias)

    def detectron_weight_mapping(self) -> tuple[dict[str, str], list[str]]:
        mapping = layer_blobs("upconv", "conv5_mask")
        for i in range(self.num_convs):
            if self.use_gn:
                conv, norm, blob = f"conv_fcn.{3 * i}", f"conv_fcn.{3 * i + 1}", f"_mask_fcn{i + 1}"
                mapping |= conv_norm_blobs(conv, norm, blob, f"{blob}_gn")
            else:
                mapping |= layer_blobs(f"conv_fcn.{2 * i}", f"_[mask]_fcn{i + 1}")
        return mapping, []

    def forward(self, x, rpn_ret) -> Tensor:
        x = mynn.conv_stack(self.conv_fcn, self.pool(x, rpn_ret))
        return mynn.conv_norm(self.upconv, None, x, relu=True)


class mask_rcnn_fcn_head_v1up4convs(mask_rcnn_fcn_head_v1upXconvs):
    num_convs = 4


class mask_rcnn_fcn_head_v1up(mask_rcnn_fcn_head_v1upXconvs):
    num_convs = 2


class mask_rcnn_fcn_head_v1up4convs_gn(mask_rcnn_fcn_head_v1upXconvs):
    num_convs = 4
    use_gn = True


class _Res5MaskHead(RoIHead):
    """A res5 stage and a 2x2 deconvolution with stride 2 (C4 models)."""

    def __init__(self, dim_in: int, roi_xform_func, spatial_scale, conv_init: str) -> None:
        super().__init__(roi_xform_func, spatial_scale, cfg.MRCNN, "mask_rois")
        self.dim_out = cfg.MRCNN.DIM_REDUCED
        dilation = cfg.MRCNN.DILATION
        # The stage halves 14x14 RoIs unless dilation stands in for the stride.
        stride = 1 if dilation > 1 else cfg.MRCNN.ROI_XFORM_RESOLUTION // 7
        self.res5 = roi_res5_stage(dim_in, stride, dilation)
        dim_res5 = 8 * cfg.RESNETS.RES2_OUT_CHANNELS
        self.upconv5 = nn.ConvTranspose2d(dim_res5, self.dim_out, 2, stride=2)
        mynn.init.conv_fill(conv_init, 0.001)(self.upconv5.weight.data)
        nn.init.zeros_(self.upconv5.bias)

    def upsample(self, res5_feat: Tensor) -> Tensor:
        return mynn.conv_norm(self.upconv5, None, res5_feat, relu=True)

    def forward(self, x, rpn_ret) -> Tensor:
        return self.upsample(self.res5(self.pool(x, rpn_ret)))


class mask_rcnn_fcn_head_v0up(_Res5MaskHead):
    """A res5 stage of its own."""

    def __init__(self, dim_in: int, roi_xform_func, spatial_scale) -> None:
        super().__init__(dim_in, roi_xform_func, spatial_scale, "GaussianFill")

    def detectron_weight_mapping(self) -> tuple[dict[str, str], list[str]]:
        mapping, orphans = stage_blobs("res5", "_[mask]_res5", 3)
        return layer_blobs("upconv5", "conv5_mask") | mapping, orphans


class mask_rcnn_fcn_head_v0upshare(_Res5MaskHead):
    """The box head's res5 stage, shared: training reuses its features of the foreground RoIs."""

    def __init__(self, dim_in: int, roi_xform_func, spatial_scale) -> None:
        super().__init__(dim_in, roi_xform_func, spatial_scale, cfg.MRCNN.CONV_INIT)

    def share_res5_module(self, res5: nn.Module) -> None:
        """Use the box head's stage from here on (state dicts carry it under both names)."""
        self.res5 = res5

    def detectron_weight_mapping(self) -> tuple[dict[str, str | None], list[str]]:
        mapping, orphans = stage_blobs("res5", "res5", 3)
        mapping = dict.fromkeys(mapping)  # loaded once, as the box head's
        return layer_blobs("upconv5", "conv5_mask") | mapping, orphans
