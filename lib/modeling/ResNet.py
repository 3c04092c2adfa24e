"""Residual networks: backbone bodies (C4, C5) and the res5 head of C4 models.

Function names are Detectron's: `ResNet.ResNet50_conv4_body` and so on in `MODEL.CONV_BODY`,
`ResNet.ResNet_roi_conv5_head` in `FAST_RCNN.ROI_BOX_HEAD`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

import nn as mynn
import ops
from core.config import cfg
from modeling.blobs import conv_norm_blobs
from modeling.roi_head import RoIHead

BLOCK_COUNTS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def ResNet50_conv4_body() -> ResNetBody:
    return ResNetBody(BLOCK_COUNTS[50][:3])


def ResNet50_conv5_body() -> ResNetBody:
    return ResNetBody(BLOCK_COUNTS[50])


def ResNet101_conv4_body() -> ResNetBody:
    return ResNetBody(BLOCK_COUNTS[101][:3])


def ResNet101_conv5_body() -> ResNetBody:
    return ResNetBody(BLOCK_COUNTS[101])


def ResNet152_conv5_body() -> ResNetBody:
    return ResNetBody(BLOCK_COUNTS[152])


class ResNetBody(nn.Module):
    """Stem and residual stages `res1` … `res{n}`.

    Args:
        block_counts: blocks of res2, res3, …; three entries end at stride 16, four at 32.

    Attributes:
        block_counts: as given (FPN names its blobs by them).
        dim_out: channels of the output.
        spatial_scale: output size over input size.
        stage_dims: channels of res2, res3, … .
    """

    def __init__(self, block_counts: tuple[int, ...]) -> None:
        super().__init__()
        self.block_counts = block_counts
        self.num_stages = len(block_counts) + 1
        self.res1 = Stem(cfg.RESNETS.STEM_OUT_CHANNELS)
        dim_in, dim_inner = cfg.RESNETS.STEM_OUT_CHANNELS, inner_width()
        dim_out, stride = cfg.RESNETS.RES2_OUT_CHANNELS, 4
        self.stage_dims = []
        for stage, count in enumerate(block_counts, start=2):
            dilation = cfg.RESNETS.RES5_DILATION if stage == 5 else 1
            first_stride = 2 if stage > 2 and dilation == 1 else 1
            blocks = residual_stage(dim_in, dim_out, dim_inner, count, first_stride, dilation)
            self.add_module(f"res{stage}", blocks)
            self.stage_dims.append(dim_out)
            stride *= first_stride
            dim_in, dim_out, dim_inner = dim_out, 2 * dim_out, 2 * dim_inner
        self.dim_out = self.stage_dims[-1]
        self.spatial_scale = 1.0 / stride
        self._freeze()

    def _freeze(self) -> None:
        for stage in range(1, min(cfg.RESNETS.FREEZE_AT, self.num_stages) + 1):
            for parameter in getattr(self, f"res{stage}").parameters():
                parameter.requires_grad = False

    def stages(self, x: Tensor) -> list[Tensor]:
        """Outputs of res2, res3, … for images x (N, 3, H, W), fine to coarse."""
        x, out = self.res1(x), []
        for stage in range(2, self.num_stages + 1):
            x = getattr(self, f"res{stage}")(x)
            out.append(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)[-1]

    def detectron_weight_mapping(self) -> tuple[dict[str, str], list[str]]:
        norm = self.res1.norm_name
        stem = "conv1_gn" if norm == "gn1" else "res_conv1_bn"
        mapping = {
            "res1.conv1.weight": "conv1_w",
            f"res1.{norm}.weight": f"{stem}_s",
            f"res1.{norm}.bias": f"{stem}_b",
        }
        orphans = ["pred_w", "pred_b"] if norm == "gn1" else ["conv1_b", "fc1000_w", "fc1000_b"]
        for stage, count in enumerate(self.block_counts, start=2):
            stage_mapping, stage_orphans = stage_blobs(f"res{stage}", f"res{stage}", count)
            mapping.update(stage_mapping)
            orphans.extend(stage_orphans)
        return mapping, orphans


class ResNet_roi_conv5_head(RoIHead):
    """The res5 stage on pooled RoIs, average pooled: the box head of C4 models.

    `forward` returns (R, 2048); in training, where the mask head may share the stage, it returns
    `(pooled, res5_feat)` with res5_feat (R, 2048, 7, 7).
    """

    def __init__(self, dim_in: int, roi_xform_func: Callable, spatial_scale: float) -> None:
        super().__init__(roi_xform_func, spatial_scale, cfg.FAST_RCNN, "rois")
        self.res5 = roi_res5_stage(dim_in, cfg.FAST_RCNN.ROI_XFORM_RESOLUTION // 7)
        self.dim_out = 8 * cfg.RESNETS.RES2_OUT_CHANNELS

    def detectron_weight_mapping(self) -> tuple[dict[str, str], list[str]]:
        return stage_blobs("res5", "res5", 3)

    def forward(self, x, rpn_ret):
        res5_feat = self.res5(self.pool(x, rpn_ret))
        pooled = F.avg_pool2d(res5_feat, 7).flatten(1)
        if cfg.MODEL.SHARE_RES5 and self.training:
            return pooled, res5_feat
        return pooled


def inner_width() -> int:
    """Inner width of res2's bottlenecks; it doubles with each stage."""
    return cfg.RESNETS.NUM_GROUPS * cfg.RESNETS.WIDTH_PER_GROUP


def roi_res5_stage(dim_in: int, first_stride: int, dilation: int = 1) -> nn.Sequential:
    """A res5 stage for pooled RoIs (box, mask and keypoint heads of C4 models)."""
    dim_out = 8 * cfg.RESNETS.RES2_OUT_CHANNELS
    return residual_stage(dim_in, dim_out, 8 * inner_width(), 3, first_stride, dilation)


def residual_stage(
    dim_in: int, dim_out: int, dim_inner: int, count: int, first_stride: int, dilation: int
) -> nn.Sequential:
    """`count` bottlenecks, the first with `first_stride`; `dilation` is that of all 3x3 convs."""
    blocks = [Bottleneck(dim_in, dim_out, dim_inner, first_stride, dilation)]
    blocks += [Bottleneck(dim_out, dim_out, dim_inner, 1, dilation) for _ in range(count - 1)]
    return nn.Sequential(*blocks)


def _conv(dim_in: int, dim_out: int, kernel: int, **kwargs) -> nn.Conv2d:
    conv = nn.Conv2d(dim_in, dim_out, kernel, bias=False, **kwargs)
    if cfg.RESNETS.USE_GN:  # trained from scratch: Caffe2's default filler, as Detectron
        mynn.init.XavierFill(conv.weight.data)
    return conv


def _norm(channels: int) -> nn.Module:
    return group_norm(channels) if cfg.RESNETS.USE_GN else mynn.AffineChannel2d(channels)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with the configured number of groups (or channels per group).

    Raises:
        ValueError: when the channels do not divide into the groups.
    """
    per_group = cfg.GROUP_NORM.DIM_PER_GP
    groups = channels // per_group if per_group > 0 else cfg.GROUP_NORM.NUM_GROUPS
    if groups == 0 or channels % groups:
        key = "GROUP_NORM.DIM_PER_GP" if per_group > 0 else "GROUP_NORM.NUM_GROUPS"
        raise ValueError(f"{channels} channels do not divide into {groups} groups: set {key}")
    return nn.GroupNorm(groups, channels, eps=cfg.GROUP_NORM.EPSILON)


class Stem(nn.Module):
    """7x7 convolution with stride 2, norm, ReLU, 3x3 max pooling with stride 2."""

    def __init__(self, dim_out: int) -> None:
        super().__init__()
        self.norm_name = "gn1" if cfg.RESNETS.USE_GN else "bn1"
        self.conv1 = _conv(3, dim_out, 7, stride=2, padding=3)
        self.add_module(self.norm_name, _norm(dim_out))

    def forward(self, x: Tensor) -> Tensor:
        x = mynn.conv_norm_stem(self.conv1, getattr(self, self.norm_name), x)
        return ops.max_pool(x)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with a shortcut (He et al. 2015, fig. 5 right).

    The stride sits in the first 1x1 (STRIDE_1X1, MSRA's models) or in the 3x3.
    """

    def __init__(
        self, dim_in: int, dim_out: int, dim_inner: int, stride: int, dilation: int
    ) -> None:
        super().__init__()
        stride_1x1, stride_3x3 = (stride, 1) if cfg.RESNETS.STRIDE_1X1 else (1, stride)
        self.norm_name = "gn" if cfg.RESNETS.USE_GN else "bn"
        conv1 = _conv(dim_in, dim_inner, 1, stride=stride_1x1)
        conv2 = _conv(
            dim_inner,
            dim_inner,
            3,
            stride=stride_3x3,
            padding=dilation,
            dilation=dilation,
            groups=cfg.RESNETS.NUM_GROUPS,
        )
        conv3 = _conv(dim_inner, dim_out, 1)
        for index, conv in enumerate((conv1, conv2, conv3), start=1):
            self.add_module(f"conv{index}", conv)
            self.add_module(f"{self.norm_name}{index}", _norm(conv.out_channels))
        self.downsample = None
        if stride != 1 or dim_in != dim_out:
            shortcut = _conv(dim_in, dim_out, 1, stride=stride)
            self.downsample = nn.Sequential(shortcut, _norm(dim_out))

    def forward(self, x: Tensor) -> Tensor:
        norms = [getattr(self, f"{self.norm_name}{index}") for index in (1, 2, 3)]
        out = mynn.conv_norm(self.conv1, norms[0], x, relu=True)
        out = mynn.conv_norm(self.conv2, norms[1], out, relu=True)
        shortcut = x if self.downsample is None else mynn.conv_norm(*self.downsample, x)
        return mynn.conv_norm(self.conv3, norms[2], out, relu=True, residual=shortcut)


def stage_blobs(module: str, blob: str, count: int) -> tuple[dict[str, str], list[str]]:
    """Blob names of a residual stage, and the zero biases that Detectron's files carry with it."""
    norm = "gn" if cfg.RESNETS.USE_GN else "bn"
    mapping: dict[str, str] = {}
    orphans = []
    for i in range(count):
        branches = [(f"conv{k}", f"{norm}{k}", f"branch2{'abc'[k - 1]}") for k in (1, 2, 3)]
        if i == 0:
            branches.append(("downsample.0", "downsample.1", "branch1"))
        for conv, norm_module, branch in branches:
            name = f"{blob}_{i}_{branch}"
            mapping.update(
                conv_norm_blobs(
                    f"{module}.{i}.{conv}", f"{module}.{i}.{norm_module}", name, f"{name}_{norm}"
                )
            )
            orphans.append(f"{name}_b")
    return mapping, orphans
