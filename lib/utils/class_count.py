"""How many classes the model in a weight file tells apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from core.config import cfg
from core.errors import UserError
from utils.net import read_ckpt
from utils.weights import read_detectron_blobs

# The layer with the class scores, by the kind of model.
_LAYERS = {
    "box head": ("Box_Outs.cls_score.bias", "cls_score_b"),
    "R-FCN": ("Box_Outs.conv_cls.bias", "conv_cls_b"),
    "RetinaNet": ("RetinaNet_Outs.cls_pred.bias", "retnet_cls_pred_fpn{level}_b"),
}


def count_classes(path: str | Path) -> int:
    """Classes, with the background, of a model of the merged config, from its weights.

    Args:
        path: Detectron's `.pkl`, or a checkpoint.
    Raises:
        UserError: the file is unusable, or has no layer that scores classes.
    """
    is_detectron = Path(path).suffix == ".pkl"
    weights: Mapping[str, Tensor | np.ndarray]
    weights = read_detectron_blobs(path) if is_detectron else read_ckpt(path)["model"]
    for kind, names in _LAYERS.items():
        name = names[is_detectron].format(level=cfg.FPN.RPN_MIN_LEVEL)
        if name in weights:
            return _classes(kind, len(weights[name]))
    raise UserError(f"{path} does not tell its number of classes: say whose they are (dataset=...)")


def _classes(kind: str, channels: int) -> int:
    if kind == "R-FCN":
        return channels // cfg.RFCN.PS_GRID_SIZE**2
    if kind == "RetinaNet":
        retinanet = cfg.RETINANET
        anchors = retinanet.SCALES_PER_OCTAVE * len(retinanet.ASPECT_RATIOS)
        return channels // anchors + (0 if retinanet.SOFTMAX else 1)
    return channels
