"""Weights of Detectron's `.pkl` files, blob by blob, into a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from core.config import cfg
from core.errors import UserError
from utils.load_report import LoadReport, first_names
from utils.model_zoo import local_weights
from utils.net import is_class_predictor
from utils.weights import read_detectron_file

logger = logging.getLogger(__name__)


def load_detectron_weight(
    net: nn.Module, path: str | Path, *, new_classes: bool = False
) -> LoadReport:
    """Load a Detectron `.pkl` (trained model or ImageNet weights) into a model.

    Parameters whose blob the file lacks keep their values. Logs the report.

    Args:
        net: has `detectron_weight_mapping` -> (parameter name -> blob name or None, orphans).
        path: the file, or `zoo://<config name>` for a published model.
        new_classes: predictor layers made for another number of classes keep their initialisation
            (fine-tuning) instead of being an error.
    Raises:
        UserError: the file is unusable, has no blob of this model, or other shapes.
    """
    path = local_weights(path)
    file = read_detectron_file(path)
    report = load_blobs(net, file.blobs, new_classes=new_classes)
    report.config = file.config
    if report.mismatched:
        raise UserError(
            f"{path} is of another model: shapes differ in {first_names(report.mismatched)}: use "
            "the config and number of classes (data set) it was trained with"
        )
    if not report.loaded:
        raise UserError(
            f"{path} has no blob of this model (it lacks {first_names(report.missing)}): use the "
            "config it was trained with"
        )
    report.log(path)
    return report


def use_box_weights_of(report: LoadReport) -> None:
    """Make inference decode boxes as the model of a Detectron file was trained to code them.

    Models whose config has no MODEL.BBOX_REG_WEIGHTS are older than the key and had none; this
    changes `cfg`, frozen or not. Files without a config say nothing.
    """
    model = None if report.config is None else report.config.get("MODEL")
    if report.config is None or "BBOX_REG_WEIGHTS" in (model or {}):
        return
    logger.info("MODEL.BBOX_REG_WEIGHTS is (1, 1, 1, 1): the model is older than the key")
    frozen = cfg.MODEL.is_frozen()
    cfg.MODEL.freeze(False)
    cfg.MODEL.BBOX_REG_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
    cfg.MODEL.freeze(frozen)


def load_blobs(
    net: nn.Module, blobs: Mapping[str, np.ndarray], *, new_classes: bool = False
) -> LoadReport:
    """Copy blobs into the parameters they are mapped to; nothing is copied if shapes differ."""
    mapping, _ = net.detectron_weight_mapping
    own = net.state_dict()
    report, sources, used = LoadReport(), {}, set()
    for name in own:
        blob = mapping.get(name)
        if blob is None:
            report.without_blob.append(name)
            continue
        # Blobs of a shared or copied stage stand under the name of their origin.
        stored = blob if blob in blobs else blob.rpartition("]_")[2]
        value = blobs.get(stored)
        used.add(stored)
        if value is None:
            report.missing.append(f"{name} ({blob})")
        elif tuple(value.shape) == tuple(own[name].shape):
            sources[name] = value
            report.loaded.append(f"{name} ({stored})")
        elif new_classes and is_class_predictor(name, own, {name: value}):
            report.skipped.append(f"{name} ({stored})")
        else:
            report.mismatched.append(
                f"{name} {tuple(own[name].shape)} ({stored}, in the file {tuple(value.shape)})"
            )
    report.unused = [b for b in blobs if b not in used and not b.endswith("_momentum")]
    if not report.mismatched:
        with torch.no_grad():
            for name, value in sources.items():
                own[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))
    return report
