"""Weights of Detectron's `.pkl` files, blob by blob, into a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from core.errors import UserError
from utils.net import first_names, is_class_predictor
from utils.weights import read_detectron_blobs

logger = logging.getLogger(__name__)


@dataclass
class LoadReport:
    """What became of each parameter: `name (blob)`, or the name alone where it has no blob."""

    loaded: list[str] = field(default_factory=list)
    without_blob: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    new_classes: list[str] = field(default_factory=list)


def load_detectron_weight(
    net: nn.Module, path: str | Path, *, new_classes: bool = False
) -> LoadReport:
    """Load a Detectron `.pkl` (trained model or ImageNet weights) into a model.

    Parameters whose blob the file lacks keep their values; their names are logged.

    Args:
        net: has `detectron_weight_mapping` -> (parameter name -> blob name or None, orphans).
        new_classes: predictor layers made for another number of classes keep their initialisation
            (fine-tuning) instead of being an error.
    Raises:
        UserError: the file is unusable, has no blob of this model, or other shapes.
    """
    report = load_blobs(net, read_detectron_blobs(path), new_classes=new_classes)
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
    logger.info("%s: loaded %d parameters", path, len(report.loaded))
    if report.without_blob:
        logger.info("Detectron has no blob for %s", first_names(report.without_blob))
    for names, reason in (
        (report.missing, "not in the file"),
        (report.new_classes, "another number of classes"),
    ):
        if names:
            logger.warning(
                "%s: %d parameters keep their initialisation (%s): %s",
                path,
                len(names),
                reason,
                ", ".join(names),
            )
    return report


def load_blobs(
    net: nn.Module, blobs: Mapping[str, np.ndarray], *, new_classes: bool = False
) -> LoadReport:
    """Copy blobs into the parameters they are mapped to; nothing is copied if shapes differ."""
    mapping, _ = net.detectron_weight_mapping
    own = net.state_dict()
    report, sources = LoadReport(), {}
    for name in own:
        blob = mapping.get(name)
        if blob is None:
            report.without_blob.append(name)
            continue
        # Blobs of a shared or copied stage stand under the name of their origin.
        stored = blob if blob in blobs else blob.rpartition("]_")[2]
        value = blobs.get(stored)
        if value is None:
            report.missing.append(f"{name} ({blob})")
        elif tuple(value.shape) == tuple(own[name].shape):
            sources[name] = value
            report.loaded.append(f"{name} ({stored})")
        elif new_classes and is_class_predictor(name, own, {name: value}):
            report.new_classes.append(f"{name} ({stored})")
        else:
            report.mismatched.append(
                f"{name} {tuple(own[name].shape)} ({stored}, in the file {tuple(value.shape)})"
            )
    if not report.mismatched:
        with torch.no_grad():
            for name, value in sources.items():
                own[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))
    return report
