"""Exported models find what the original finds, in images of sizes that were never traced."""

from __future__ import annotations

import sys
import types

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from core.errors import UserError
from core.export import RECORD, export_torch, load_exported
from core.export_onnx import export_onnx
from core.export_parity import Parity, compare
from core.predictor import Predictor
from datasets.demo_shapes import draw_image
from small_model import CONFIG, KEYPOINTS, save_small_model

SIZES = [(160, 192), (200, 90), (64, 64), (300, 300)]


class TinyBody(nn.Module):
    """A pyramid of one convolution a level: tracing a ResNet takes a minute, this a second."""

    def __init__(self) -> None:
        super().__init__()
        self.dim_out, self.min_level = 16, 2
        self.spatial_scale = [1 / 8, 1 / 4]
        self.levels = nn.ModuleList([nn.Conv2d(3, 16, 5, 4, 2), nn.Conv2d(16, 16, 3, 2, 1)])

    def detectron_weight_mapping(self):
        return {}, []

    def forward(self, x):
        maps = []
        for level in self.levels:
            x = level(x).relu() * 0.2
            maps.insert(0, x)
        return maps


ALL_HEADS = [*KEYPOINTS, "MODEL.MASK_ON", True]
BODY = ["MODEL.CONV_BODY", "tiny_body.TinyBody", "FPN.RPN_MAX_LEVEL", 3, "FPN.ROI_MAX_LEVEL", 3]


@pytest.fixture
def make_predictor(tmp_path, cfg, monkeypatch):
    module = types.ModuleType("modeling.tiny_body")
    module.TinyBody = TinyBody
    monkeypatch.setitem(sys.modules, "modeling.tiny_body", module)

    def make(extra=(), num_classes=4, device="cpu"):
        weights = tmp_path / "model.pth"
        options = save_small_model(weights, num_classes, [*BODY, *extra])
        return Predictor(CONFIG, weights, device=device, options=options)

    return make


def photos() -> list[np.ndarray]:
    return [cv2.resize(draw_image(0, i)[0], size[::-1]) for i, size in enumerate(SIZES)]


def test_torch_export_finds_the_same_in_every_size(make_predictor, tmp_path):
    predictor = make_predictor(ALL_HEADS, 2)
    files = export_torch(predictor, tmp_path / "out")
    assert [file.name for file in files] == ["detector.pt2", "mask.pt2", "keypoint.pt2"]
    # The heads' weights are not in both.
    assert files[1].stat().st_size < files[0].stat().st_size
    exported = load_exported(tmp_path / "out")
    parity = compare(predictor, exported, photos())
    assert parity.detections > 10
    # Proposals of equal scores may come in another order.
    assert parity.good
    assert (parity.score, parity.box, parity.mask, parity.keypoint) == (0, 0, 0, 0)
    assert exported.vocabulary == predictor.vocabulary


def test_onnx_finds_the_same_in_every_size(make_predictor, tmp_path):
    predictor = make_predictor(ALL_HEADS, 2)
    files = export_onnx(predictor, tmp_path / "out")
    assert [file.stem for file in files] == ["trunk", "box", "mask", "keypoint"]
    parity = compare(predictor, load_exported(tmp_path / "out"), photos())
    assert parity.detections > 10
    assert parity.good
    assert parity.score < 1e-3
    assert parity.box < 0.1


def test_parity_sees_what_differs(make_predictor):
    predictor = make_predictor()
    same = compare(predictor, predictor, photos())
    assert same.good
    assert same.unmatched == 0
    net = predictor.model
    other = Predictor.of_model(type(net)().eval(), predictor.vocabulary, device=predictor.device)
    other.model.load_state_dict(net.state_dict())
    with torch.no_grad():
        other.model.Box_Outs.cls_score.weight.mul_(1.5)
    assert not compare(predictor, other, photos()).good
    assert not Parity(detections=100, unmatched=2).good


@pytest.mark.parametrize(
    "options", [["MODEL.RPN_ONLY", True, "MODEL.MASK_ON", False], ["MODEL.FASTER_RCNN", False]]
)
def test_what_cannot_be_exported_says_so(cfg, tmp_path, options):
    from core.config import merge_cfg_from_list

    merge_cfg_from_list(options)
    with pytest.raises(UserError, match=f"{options[0]}.* cannot be exported"):
        export_torch(None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_an_export_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is no exported model.*{RECORD}"):
        load_exported(tmp_path)


def test_an_export_for_another_device_is_named(tmp_path):
    (tmp_path / RECORD).write_text("{device: cuda, format: torch}")
    with pytest.raises(UserError, match="exported for cuda"):
        load_exported(tmp_path, device="cpu")


@pytest.mark.gpu
def test_torch_export_on_a_gpu(make_predictor, tmp_path):
    predictor = make_predictor(device="cuda")
    export_torch(predictor, tmp_path / "out")
    parity = compare(predictor, load_exported(tmp_path / "out", device="cuda"), photos())
    assert parity.detections > 10
    assert parity.good
