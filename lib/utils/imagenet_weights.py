"""ImageNet weights for the backbone of a model, from any of the three kinds of file.

- Caffe-converted `.pth` (torchvision's names, for BGR images of 0 to 255): as they are;
- torchvision's own `.pth` (`resnet50-<hash>.pth`, for RGB of 0 to 1): the first convolution is
  converted; these ResNets have their stride in the 3x3 (RESNETS.STRIDE_1X1 False);
- Detectron's and Caffe's `.pkl`, by blob names.

RESNETS.IMAGENET_PRETRAINED_WEIGHTS names the file and IMAGENET_PRETRAINED_PIXELS the images it was
trained on. Batch norm is folded into the affine layers: s = gamma / sqrt(var + eps),
b = beta - mean * s.
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
from utils.load_report import first_names
from utils.weights import read_detectron_blobs, read_torch_file

logger = logging.getLogger(__name__)

_BN_EPS = 1e-5
# The names under which torchvision publishes its weights; Caffe-converted ones are `…_caffe.pth`.
_TORCHVISION_FILE = re.compile(r"(resnet|resnext|wide_resnet|vgg)\w*-[0-9a-f]{8}\.pth")
_RGB_MEAN, _RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_VGG16_BLOCKS = (2, 2, 3, 3, 3)  # convolutions


def load_pretrained_imagenet_weights(model: nn.Module) -> None:
    """Load the file `RESNETS.IMAGENET_PRETRAINED_WEIGHTS` into a model's ImageNet layers.

    These are every `res1` to `res5`, in the body and in heads, or VGG's convolutions and, with a
    VGG box head, fc6 and fc7.

    Args:
        model: a detector with the parameter names of this family.
    Raises:
        UserError: the file is missing, damaged, or of another network; says what to do.
    """
    path = _weight_file()
    wanted = {n: w for n in model.state_dict() if (w := _torchvision_name(n)) is not None}
    if path.suffix == ".pkl":
        _load_blobs(model, wanted, path)
    else:
        _load_torch_names(model, wanted, path)
    logger.info("loaded ImageNet weights of %d parameters from %s", len(wanted), path)


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


def _load_blobs(model: nn.Module, wanted: Mapping[str, str], path: Path) -> None:
    mapping, _ = model.detectron_weight_mapping
    # Other layers than ImageNet's may bear its names, such as fc6 of a box head.
    names = {mapping[n] for n in wanted if mapping[n] is not None}
    names |= {name.rpartition("]_")[2] for name in names}
    blobs = {name: b for name, b in read_detectron_blobs(path).items() if name in names}
    report = load_blobs(model, blobs)
    lacking = [n for n in report.missing + report.mismatched if n.split(" ")[0] in wanted]
    if lacking:
        raise _other_network(path, lacking)


def _load_torch_names(model: nn.Module, wanted: Mapping[str, str], path: Path) -> None:
    if "conv2.weight" in wanted.values():  # VGG_CNN_M_1024's own name
        raise UserError(
            f"{path} (RESNETS.IMAGENET_PRETRAINED_WEIGHTS) is no .pkl, but weights of "
            f"{cfg.MODEL.CONV_BODY} are known only as Caffe's .pkl: name one"
        )
    source = read_torch_file(path)
    is_vgg = "features.0.weight" in wanted.values()
    kind, first = ("VGG", "features.0") if is_vgg else ("ResNet", "conv1")
    if not isinstance(source, Mapping) or f"{first}.weight" not in source:
        raise UserError(f"{path} holds no {kind}: its names should begin with {first}.weight")
    source = dict(source)
    if _is_rgb(path):
        _convert_to_bgr(source, first)
        if not is_vgg and cfg.RESNETS.STRIDE_1X1:
            logger.warning(
                "%s was trained with the stride in the 3x3 convolutions: set RESNETS.STRIDE_1X1 "
                "False, or its features are poor",
                path,
            )
    weights = _fold_batch_norm(source)
    own = model.state_dict()
    lacking = [
        f"{n} ({w})"
        for n, w in wanted.items()
        if w not in weights or weights[w].shape != own[n].shape
    ]
    unused = sorted(_layers(weights) - _layers(wanted.values()))
    if lacking or unused:
        raise _other_network(path, lacking or unused)
    with torch.no_grad():
        for name, source_name in wanted.items():
            own[name].copy_(weights[source_name])


def _layers(names) -> set[str]:
    """What tells networks of different depth apart: residual blocks, or VGG's convolutions."""
    names = list(names)
    blocks = {n.rpartition(".conv")[0] for n in names if ".conv" in n}
    return blocks | {n.rpartition(".")[0] for n in names if n.startswith("features.")}


def _is_rgb(path: Path) -> bool:
    pixels = cfg.RESNETS.IMAGENET_PRETRAINED_PIXELS
    return pixels == "rgb1" or (pixels == "auto" and bool(_TORCHVISION_FILE.fullmatch(path.name)))


def _other_network(path: Path, names: list[str]) -> UserError:
    return UserError(
        f"{path} (RESNETS.IMAGENET_PRETRAINED_WEIGHTS) is of another network than "
        f"MODEL.CONV_BODY {cfg.MODEL.CONV_BODY} (see {first_names(names)}): name the file "
        "of the same depth and normalisation"
    )


def _torchvision_name(name: str) -> str | None:
    """torchvision's name of a parameter that ImageNet weights are for; None for other parameters.

    `Conv_Body.conv_body.res2.0.bn1.weight` is `layer1.0.bn1.weight`, and of `res1` (the stem)
    `res1.conv1.weight` is `conv1.weight`. Layers of VGG_CNN_M_1024, which torchvision lacks, keep
    their own names.
    """
    if match := re.search(r"(?:^|\.)res([1-5])\.(\S+)", name):
        stage, rest = int(match[1]), match[2]
        return rest if stage == 1 else f"layer{stage - 1}.{rest}"
    if match := re.fullmatch(r"Box_Head\.fc([67])\.(\w+)", name):
        return f"classifier.{0 if match[1] == '6' else 3}.{match[2]}"
    if match := re.fullmatch(r"Conv_Body\.conv(\d)_(\d)\.(\w+)", name):
        block, index = int(match[1]) - 1, int(match[2]) - 1
        # In a sequence of convolutions, each with its ReLU, and a pooling after each block.
        return f"features.{2 * (sum(_VGG16_BLOCKS[:block]) + index) + block}.{match[3]}"
    match = re.fullmatch(r"Conv_Body\.(conv\d\.\w+)", name)
    return match and match[1]


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


def _convert_to_bgr(source: dict[str, Tensor], first: str) -> None:
    """Make the first convolution take what this family feeds: BGR of 0 to 255 minus PIXEL_MEANS.

    The small difference of the two means goes into its bias, or into the mean of the batch norm
    after it (exact but for the border).
    """
    std = 255 * torch.tensor(_RGB_STD)
    offset = torch.tensor(cfg.PIXEL_MEANS).reshape(3).flip(0) - 255 * torch.tensor(_RGB_MEAN)
    scaled = source[f"{first}.weight"] / std[None, :, None, None]
    shift = (scaled.sum(dim=(2, 3)) * offset.float()).sum(dim=1)
    source[f"{first}.weight"] = scaled.flip(1)
    if f"{first}.bias" in source:
        source[f"{first}.bias"] = source[f"{first}.bias"] + shift
    else:
        source["bn1.running_mean"] = source["bn1.running_mean"] - shift
