"""A narrow RetinaNet for tests, and its logits by anchor and class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.config import assert_and_infer_cfg, merge_cfg_from_file, merge_cfg_from_list

CONFIG = Path(__file__).resolve().parent.parent / "configs/demo/overfit_retinanet_R-50-FPN_gn.yaml"
NARROW = {
    "RESNETS.STEM_OUT_CHANNELS": 8,
    "RESNETS.RES2_OUT_CHANNELS": 16,
    "RESNETS.WIDTH_PER_GROUP": 8,
    "GROUP_NORM.NUM_GROUPS": 4,
    "FPN.DIM": 16,
    "RETINANET.NUM_CONVS": 2,
    "RETINANET.ANCHOR_SCALE": 4,
}
OPTION_SETS = {
    "sigmoid": {},
    "softmax": {"RETINANET.SOFTMAX": True},
    "shared tower": {"RETINANET.SHARE_CLS_BBOX_TOWER": True},
    "boxes by class": {"RETINANET.CLASS_SPECIFIC_BBOX": True},
}


def narrow_retinanet(options: Mapping[str, Any] | None = None, num_classes: int = 4) -> nn.Module:
    """The demo's RetinaNet at its smallest, in training mode; the fixture `cfg` must be in use."""
    from core.config import cfg
    from modeling.model_builder import Generalized_RCNN

    merge_cfg_from_file(CONFIG)
    merge_cfg_from_list([x for pair in {**NARROW, **(options or {})}.items() for x in pair])
    cfg.MODEL.NUM_CLASSES = num_classes
    assert_and_infer_cfg()
    torch.manual_seed(0)
    return Generalized_RCNN().train()


def by_anchor(maps: Tensor, anchors: int) -> np.ndarray:
    """Maps (N, A * C, H, W) as (N, H * W * A, C) float64, the anchor varying fastest."""
    n, channels, h, w = maps.shape
    parts = maps.detach().double().numpy().reshape(n, anchors, channels // anchors, h, w)
    return parts.transpose(0, 3, 4, 1, 2).reshape(n, h * w * anchors, -1)
