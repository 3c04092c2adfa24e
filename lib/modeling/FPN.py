"""Feature pyramid on a residual network (`FPN.fpn_ResNet50_conv5_body` in `MODEL.CONV_BODY`)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

import nn as mynn
from core.config import cfg
from modeling import ResNet
from modeling.blobs import conv_norm_blobs, layer_blobs

LOWEST_BACKBONE_LVL = 2  # res2, stride 4
HIGHEST_BACKBONE_LVL = 5  # res5, stride 32


def fpn_ResNet50_conv5_body() -> fpn:
    return fpn(ResNet.ResNet50_conv5_body)


def fpn_ResNet101_conv5_body() -> fpn:
    return fpn(ResNet.ResNet101_conv5_body)


def fpn_ResNet152_conv5_body() -> fpn:
    return fpn(ResNet.ResNet152_conv5_body)


def fpn_ResNet50_conv5_P2only_body() -> fpn_P2only:
    return fpn_P2only(ResNet.ResNet50_conv5_body)


def fpn_ResNet101_conv5_P2only_body() -> fpn_P2only:
    return fpn_P2only(ResNet.ResNet101_conv5_body)


def fpn_ResNet152_conv5_P2only_body() -> fpn_P2only:
    return fpn_P2only(ResNet.ResNet152_conv5_body)


def get_min_max_levels() -> tuple[int, int]:
    """Finest and coarsest pyramid level that the RPN or the RoI heads use.

    Whichever of the two is not MULTILEVEL uses the finest alone.
    """
    levels = []
    if cfg.FPN.MULTILEVEL_RPN:
        levels += [cfg.FPN.RPN_MIN_LEVEL, cfg.FPN.RPN_MAX_LEVEL]
    if cfg.FPN.MULTILEVEL_ROIS:
        levels += [cfg.FPN.ROI_MIN_LEVEL, cfg.FPN.ROI_MAX_LEVEL]
    return (min(levels), max(levels)) if levels else (LOWEST_BACKBONE_LVL, LOWEST_BACKBONE_LVL)


class fpn(nn.Module):
    """Top-down pyramid with lateral connections (Lin et al. 2017).

    `forward` maps images (N, 3, H, W) to a list of (N, FPN.DIM, H / s, W / s), coarse to fine.
    P6 is P5 subsampled by 2. With EXTRA_CONV_LEVELS (RetinaNet, section 4) the levels above P5 are
    convolutions with stride 2 instead: P6 of C5, P7 of the rectified P6, and so on.

    Attributes:
        dim_out: channels of every level.
        spatial_scale: list, output size over input size of each level, coarse to fine.
    """

    def __init__(self, conv_body_func) -> None:
        super().__init__()
        self.min_level, self.max_level = get_min_max_levels()
        self.dim_out = cfg.FPN.DIM
        conv_body = conv_body_func()
        # Channels of the backbone's stages in use, coarse to fine.
        dims = conv_body.stage_dims[::-1][: HIGHEST_BACKBONE_LVL + 1 - self.min_level]
        self.conv_top = _conv_norm(dims[0], self.dim_out, 1)
        self.topdown_lateral_modules = nn.ModuleList(
            topdown_lateral_module(dim, self.dim_out) for dim in dims[1:]
        )
        self.posthoc_modules = nn.ModuleList(
            _conv_norm(self.dim_out, self.dim_out, 3) for _ in dims
        )
        # Outputs above the coarsest level in use: in Detectron's files, but nothing to be trained.
        self.num_unused = max(0, HIGHEST_BACKBONE_LVL - self.max_level)
        self.posthoc_modules[: self.num_unused].requires_grad_(False)
        extra_levels = self.max_level - HIGHEST_BACKBONE_LVL if cfg.FPN.EXTRA_CONV_LEVELS else 0
        self.extra_pyramid_modules = nn.ModuleList(
            _extra_conv(self.dim_out if i else dims[0], self.dim_out) for i in range(extra_levels)
        )
        # Last, as in the family's checkpoints: optimizer states go by the order of parameters.
        self.conv_body = conv_body
        self.spatial_scale = [1.0 / 2**k for k in range(self.max_level, self.min_level - 1, -1)]

    def forward(self, x: Tensor) -> list[Tensor]:
        stages = self.conv_body.stages(x)[::-1]
        inner = [mynn.conv_norm(*_parts(self.conv_top), stages[0])]
        for module, lateral in zip(self.topdown_lateral_modules, stages[1:], strict=False):
            inner.append(module(inner[-1], lateral))
        levels = list(zip(self.posthoc_modules, inner, strict=True))
        out = [mynn.conv_norm(*_parts(module), x) for module, x in levels[self.num_unused :]]
        for i, conv in enumerate(self.extra_pyramid_modules):
            out.insert(0, mynn.conv_norm(conv, None, F.relu(out[0]) if i else stages[0]))
        if self.max_level > HIGHEST_BACKBONE_LVL and not self.extra_pyramid_modules:
            out.insert(0, F.max_pool2d(out[0], kernel_size=1, stride=2))
        return out

    def detectron_weight_mapping(self) -> tuple[dict[str, str], list[str]]:
        body_mapping, orphans = self.conv_body.detectron_weight_mapping()
        mapping = {f"conv_body.{name}": blob for name, blob in body_mapping.items()}
        # Detectron names a stage's output by its last block: res5_2_sum, res4_5_sum, …
        counts = list(enumerate(self.conv_body.block_counts, start=2))[::-1]
        sums = [f"res{stage}_{count - 1}_sum" for stage, count in counts]
        mapping |= _module_blobs("conv_top", f"fpn_inner_{sums[0]}")
        for i in range(len(self.topdown_lateral_modules)):
            lateral = f"topdown_lateral_modules.{i}.conv_lateral"
            mapping |= _module_blobs(lateral, f"fpn_inner_{sums[i + 1]}_lateral")
        for i in range(len(self.posthoc_modules)):
            mapping |= _module_blobs(f"posthoc_modules.{i}", f"fpn_{sums[i]}")
        for i in range(len(self.extra_pyramid_modules)):
            blob = f"fpn_{HIGHEST_BACKBONE_LVL + 1 + i}"
            mapping |= layer_blobs(f"extra_pyramid_modules.{i}", blob)
        return mapping, orphans


class fpn_P2only(fpn):
    """A pyramid whose finest level alone is used, as one map, with FPN.FPN_ON False.

    `forward` returns (N, FPN.DIM, H / 4, W / 4); `spatial_scale` is a number.
    """

    def __init__(self, conv_body_func) -> None:
        super().__init__(conv_body_func)
        self.spatial_scale = self.spatial_scale[-1]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[-1]


class topdown_lateral_module(nn.Module):
    """Nearest-neighbour upsampling by 2 of the coarser level plus a 1x1 of the finer stage."""

    def __init__(self, dim_lateral: int, dim_out: int) -> None:
        super().__init__()
        self.conv_lateral = _conv_norm(dim_lateral, dim_out, 1)
        if cfg.FPN.ZERO_INIT_LATERAL:
            conv = self.conv_lateral[0] if cfg.FPN.USE_GN else self.conv_lateral
            nn.init.zeros_(conv.weight)

    def forward(self, top: Tensor, lateral: Tensor) -> Tensor:
        return mynn.conv_norm_lateral(*_parts(self.conv_lateral), lateral, top)


def _conv_norm(dim_in: int, dim_out: int, kernel: int) -> nn.Module:
    conv = nn.Conv2d(dim_in, dim_out, kernel, padding=kernel // 2, bias=not cfg.FPN.USE_GN)
    mynn.init.XavierFill(conv.weight.data)
    if cfg.FPN.USE_GN:
        return nn.Sequential(conv, ResNet.group_norm(dim_out))
    nn.init.zeros_(conv.bias)
    return conv


def _parts(module: nn.Module) -> tuple[nn.Conv2d, nn.GroupNorm | None]:
    """Convolution and norm of a module of _conv_norm()."""
    return tuple(module) if isinstance(module, nn.Sequential) else (module, None)


def _extra_conv(dim_in: int, dim_out: int) -> nn.Conv2d:
    """Of a level above P5; it never has group normalisation."""
    conv = nn.Conv2d(dim_in, dim_out, 3, stride=2, padding=1)
    mynn.init.XavierFill(conv.weight.data)
    nn.init.zeros_(conv.bias)
    return conv


def _module_blobs(module: str, blob: str) -> dict[str, str]:
    if cfg.FPN.USE_GN:
        return conv_norm_blobs(f"{module}.0", f"{module}.1", blob, f"{blob}_gn")
    return layer_blobs(module, blob)
