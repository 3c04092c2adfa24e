"""Trained detectors as ONNX graphs, and the runner that joins them.

ONNX has no operator for Detectron's proposal rule, nor RoIAlign over a pyramid with Detectron's
level rule. The graphs are therefore `trunk` (images to the RPN's outputs and feature maps), and
`box`, `mask`, `keypoint` (pooled features to outputs). Between them `onnx_model` uses the code that
the eager model uses.
"""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import onnxscript  # noqa: F401  (torch.onnx imports it in the middle of an export)
import torch
from torch import Tensor, nn
from torch.export import Dim

from core.config import cfg
from core.errors import UserError
from core.export import (
    HEADS,
    LARGEST_BATCH,
    as_list,
    example_images,
    free_size,
    refuse_unsupported,
    trace,
    write_record,
)
from core.predictor import Predictor
from modeling.model_builder import Generalized_RCNN
from modeling.rfcn_heads import rfcn_head
from modeling.roi_head import RoIHead
from utils.run_dir import make_folder


class _Trunk(nn.Module):
    """Images to the RPN's logits and deltas by level, and the backbone's maps, side by side."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, data: Tensor) -> tuple[Tensor, ...]:
        maps = self.net.Conv_Body(data)
        features = maps[::-1] if isinstance(maps, list) else [maps]
        logits, deltas = self.net.RPN.predict(features[self.net.rpn_maps])
        return (*logits, *deltas, *as_list(maps))


class _AfterPooling(nn.Module):
    """A head and its outputs, without the pooling in front."""

    def __init__(self, head: RoIHead, outs: nn.Module) -> None:
        super().__init__()
        self.head, self.outs = copy.copy(head), outs
        self.head.roi_xform = lambda pooled, *_, **__: pooled

    def forward(self, pooled: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.outs(self.head(pooled, {}))


def export_onnx(predictor: Predictor, folder: Path) -> list[Path]:
    """Write a Predictor's model, which is on the CPU, as ONNX graphs; returns the files.

    Raises:
        UserError: a model of this kind cannot be exported.
    """
    refuse_unsupported()
    net = predictor.model
    if predictor.device.type != "cpu":
        raise UserError("ONNX graphs are exported on the CPU: add --device cpu")
    heads = {name: pair for name, pair in HEADS.items() if hasattr(net, pair[0])}
    for head, _ in heads.values():
        # R-FCN's head works on the whole map and pools last.
        if isinstance(getattr(net, head), rfcn_head):
            raise UserError(
                f"{type(getattr(net, head)).__name__} cannot be exported to ONNX: only heads whose "
                "RoIs are pooled first can; --format torch holds the whole model"
            )
    make_folder(folder)
    images, rois = Dim("images", max=LARGEST_BATCH), Dim("rois", max=LARGEST_BATCH * 1000)
    data, _ = example_images(predictor.device)
    files = [folder / "trunk.onnx"]
    _export(_Trunk(net), data, {0: images, **free_size()}, files[0])
    for name, (head_name, outs_name) in heads.items():
        head = getattr(net, head_name)
        side = head.pooling["resolution"]
        files.append(folder / f"{name}.onnx")
        part = _AfterPooling(head, getattr(net, outs_name))
        _export(part, torch.zeros(3, net.Conv_Body.dim_out, side, side), {0: rois}, files[-1])
    write_record(folder, "onnx", predictor.vocabulary, predictor.device)
    return files


def _export(part: nn.Module, example: Tensor, free: dict[int, object], path: Path) -> None:
    # The exporter tells of each of its passes.
    chatty = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in chatty]
    for logger in chatty:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            graph = trace(part, (example,), (free,))
            program = torch.onnx.export(graph, dynamo=True, verbose=False)
    finally:
        for logger, level in zip(chatty, levels, strict=True):
            logger.setLevel(level)
    program.save(path)


class _Session(nn.Module):
    """An ONNX graph as a module: a tensor in, its outputs (one, or a tuple) out."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        if not path.is_file():
            raise UserError(f"{path} is missing: export the model again")
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        out = self.session.run(None, {self.input: np.ascontiguousarray(x.numpy())})
        tensors = tuple(torch.from_numpy(array) for array in out)
        return tensors if len(tensors) > 1 else tensors[0]


class _TrunkSession(_Session):
    """The trunk in the backbone's place; what it says for the RPN is kept for the RPN."""

    def __init__(self, path: Path, levels: int) -> None:
        super().__init__(path)
        self.levels = levels

    def forward(self, data: Tensor) -> list[Tensor] | Tensor:
        out = list(super().forward(data))
        self.logits, self.deltas = out[: self.levels], out[self.levels : 2 * self.levels]
        maps = out[2 * self.levels :]
        return maps if cfg.FPN.FPN_ON else maps[0]


class _Pooling(nn.Module):
    """A head's pooling, without the head."""

    def __init__(self, head: RoIHead) -> None:
        super().__init__()
        self.roi_xform, self.spatial_scale = head.roi_xform, head.spatial_scale
        self.pooling = head.pooling

    forward = RoIHead.pool


def onnx_model(folder: Path) -> nn.Module:
    """The configured `Generalized_RCNN`, its networks replaced by the graphs of an export.

    It is not safe to call from two threads at once; a Predictor takes care of that.
    """
    net = Generalized_RCNN()
    levels = len(net.RPN.level_names)
    net.Conv_Body = _TrunkSession(folder / "trunk.onnx", levels)
    trunk = net.Conv_Body
    net.RPN.predict = lambda features: (trunk.logits, trunk.deltas)
    for name, (head, outs) in HEADS.items():
        if hasattr(net, head):
            setattr(net, head, _Pooling(getattr(net, head)))
            setattr(net, outs, _Session(folder / f"{name}.onnx"))
    return net.eval()
