"""ImageNet weights for the ResNet stages of a model, from any of the three kinds of file.

- Caffe-converted `.pth` (torchvision's names, for BGR images of 0 to 255): as they are;
- torchvision's own `.pth` (`resnet50-<hash>.pth`, for RGB of 0 to 1): the first convolution is
  converted; these networks have their stride in the 3x3 (RESNETS.STRIDE_1X1 False);
- Detectron's `.pkl`, by blob names.

Batch norm is folded into the affine layers: s = gamma / sqrt(var + eps), b = beta - mean * s.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from core.config import cfg
from core.errors import UserError
from utils.detectron_weight_helper import load_blobs
from utils.net import first_names
from utils.weights import read_detectron_blobs, read_torch_file

logger = logging.getLogger(__name__)

_BN_EPS = 1e-5
# The name under which torchvision publishes its weights; Caffe-converted ones are `resnet50_caffe`.
_TORCHVISION_FILE = re.compile(r"resnet\d+-[0-9a-f]{8}\.pth")
_RGB_MEAN, _RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_pretrained_imagenet_weights(model: nn.Module) -> None:
    """Load the file `RESNETS.IMAGENET_PRETRAINED_WEIGHTS` into every `res1` to `res5` of a model.

    Args:
        model: a detector with the parameter names of this family.
    Raises:
        UserError: the file is missing, damaged, or of another network; says what to do.
    """
    path = _weight_file()
    names = [n for n in model.state_dict() if _stage_name(n) is not None]
    if path.suffix == ".pkl":
        report = load_blobs(model, read_detectron_blobs(path))
        lacking = [n for n in report.missing + report.mismatched if _stage_name(n) is not None]
        if lacking:
            raise _other_network(path, lacking)
    else:
        _load_torch_names(model, names, path)
    logger.info("loaded ImageNet weights of %d parameters from %s", len(names), path)


def _weight_file() -> Path:
    named = cfg.RESNETS.IMAGENET_PRETRAINED_WEIGHTS
    alternative = "set MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS False to do without"
    if not named:
        raise UserError(
            "MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS is True but RESNETS.IMAGENET_PRETRAINED_"
            f"WEIGHTS names no file: name one, or {alternative}"
        )
    # Relative to the working directory, or to the repository, as configs write it.
    for path in (Path(named), Path(cfg.ROOT_DIR) / named):
        if path.is_file():
            return path
    raise UserError(
        f"ImageNet weights {named} (RESNETS.IMAGENET_PRETRAINED_WEIGHTS) are missing: run "
        f"`python tools/download_imagenet_weights.py -t {Path(named).name}`, or {alternative}"
    )


def _load_torch_names(model: nn.Module, names: list[str], path: Path) -> None:
    source = read_torch_file(path)
    if not isinstance(source, Mapping) or "conv1.weight" not in source:
        raise UserError(f"{path} holds no ResNet: its names should begin with conv1.weight")
    source = dict(source)
    if _TORCHVISION_FILE.fullmatch(path.name):
        _convert_to_bgr(source)
        if cfg.RESNETS.STRIDE_1X1:
            logger.warning(
                "%s was trained with the stride in the 3x3 convolutions: set RESNETS.STRIDE_1X1 "
                "False, or its features are poor",
                path,
            )
    weights = _fold_batch_norm(source)
    own = model.state_dict()
    wanted = {n: _stage_name(n) for n in names}
    lacking = [
        f"{n} ({w})"
        for n, w in wanted.items()
        if w not in weights or weights[w].shape != own[n].shape
    ]
    blocks = {w.rpartition(".conv")[0] for w in wanted.values() if ".conv" in w}
    in_file = {w.rpartition(".conv")[0] for w in weights if ".conv" in w}
    if lacking or in_file - blocks:
        raise _other_network(path, lacking or sorted(in_file - blocks))
    with torch.no_grad():
        for name, source_name in wanted.items():
            own[name].copy_(weights[source_name])


def _other_network(path: Path, names: list[str]) -> UserError:
    return UserError(
        f"{path} (RESNETS.IMAGENET_PRETRAINED_WEIGHTS) is of another network than "
        f"MODEL.CONV_BODY {cfg.MODEL.CONV_BODY} (see {first_names(names)}): name the file "
        "of the same depth and normalisation"
    )


def _stage_name(name: str) -> str | None:
    """torchvision's name of a parameter of a ResNet stage; None for other parameters.

    `Conv_Body.conv_body.res2.0.bn1.weight` is `layer1.0.bn1.weight`, and of `res1` (the stem)
    `res1.conv1.weight` is `conv1.weight`.
    """
    match = re.search(r"(?:^|\.)res([1-5])\.(\S+)", name)
    if match is None:
        return None
    stage, rest = int(match[1]), match[2]
    return rest if stage == 1 else f"layer{stage - 1}.{rest}"


def _fold_batch_norm(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Statistics become affine scale (`weight`) and shift (`bias`); files without any are folded
    already."""
    weights = {n: v.float() for n, v in source.items() if "running" not in n}
    for name, mean in source.items():
        if name.endswith(".running_mean"):
            layer = name.removesuffix(".running_mean")
            variance = source[f"{layer}.running_var"].float()
            scale = weights[f"{layer}.weight"] / torch.sqrt(variance + _BN_EPS)
            weights[f"{layer}.weight"] = scale
            weights[f"{layer}.bias"] = weights[f"{layer}.bias"] - mean.float() * scale
    return weights


def _convert_to_bgr(source: dict[str, Tensor]) -> None:
    """Make the stem take what this family feeds: BGR of 0 to 255 minus PIXEL_MEANS.

    The small difference of the two means goes into batch norm's mean (exact but for the border).
    """
    std = 255 * torch.tensor(_RGB_STD)
    offset = torch.tensor(cfg.PIXEL_MEANS).reshape(3).flip(0) - 255 * torch.tensor(_RGB_MEAN)
    scaled = source["conv1.weight"] / std[None, :, None, None]
    shift = (scaled.sum(dim=(2, 3)) * offset.float()).sum(dim=1)
    source["conv1.weight"] = scaled.flip(1)
    source["bn1.running_mean"] = source["bn1.running_mean"] - shift
