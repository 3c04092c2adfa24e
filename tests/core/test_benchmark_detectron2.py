"""detectron2 as a peer of the benchmark, by a stand-in: what it is handed and what it adds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import detectron2_stand_in
import numpy as np
import pytest
import torch

import benchmark as script
from core import (
    benchmark_commands,
    benchmark_detectron2,
    benchmark_infer,
    benchmark_models,
    benchmark_train,
)
from core.benchmark import Timing
from core.benchmark_detectron2 import Detectron2Detector, Detectron2Trainer, zoo_file
from core.benchmark_models import Rate, draw_batches, format_rates

BASELINES = Path(__file__).resolve().parents[2] / "configs/baselines"
MASK, FASTER, RETINA = (
    "e2e_mask_rcnn_R-50-FPN_1x", "e2e_faster_rcnn_R-50-FPN_1x", "retinanet_R-50-FPN_1x"
)  # fmt: skip
SMALL = ["RESNETS.WIDTH_PER_GROUP", "8", "TRAIN.SCALES", "(96,)", "TRAIN.MAX_SIZE", "160"]
SMALL += ["TRAIN.BATCH_SIZE_PER_IM", "40", "TEST.SCALE", "96", "TEST.MAX_SIZE", "160"]
SMALL += ["TEST.DETECTIONS_PER_IM", "5", "TEST.RPN_POST_NMS_TOP_N", "100"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(cfg, monkeypatch):
    detectron2_stand_in.install(monkeypatch)
    monkeypatch.setattr(benchmark_train, "BATCHES", 1)
    monkeypatch.setattr(benchmark_train, "NEAR", 14)
    monkeypatch.setattr(benchmark_models, "MATRIX_SIDE", {"cpu": 64})
    # What is measured of it has tests of its own.
    monkeypatch.setattr(benchmark_train, "torchvision_model", lambda *_: None)


def configure(kind: str, *options: str) -> None:
    benchmark_models.configure(BASELINES / f"{kind}.yaml", [*SMALL, *options])


@pytest.mark.parametrize("kind", [MASK, FASTER, RETINA])
def test_images_and_objects_are_handed_over_as_the_documentation_asks(cfg, kind):
    configure(kind)
    batches = draw_batches(4, 1, near=14)
    lying, standing = batches[0][0], batches[3][0]
    trainer = Detectron2Trainer([[lying, standing]], CPU, "off")
    assert len(trainer.steps(2)) == 2
    for inputs in trainer.model.seen:
        for given, scene in zip(inputs, (lying, standing), strict=True):
            assert given.keys() == {"image", "instances"}
            image, instances = given["image"], given["instances"]
            assert image.dtype == torch.uint8 and min(image.shape[1:]) == 96
            bgr = scene.image.mean(axis=(0, 1))
            np.testing.assert_allclose(image.float().mean(dim=(1, 2)), bgr, atol=1)
            assert instances.image_size == tuple(image.shape[1:])
            masks = {"gt_masks"} if kind == MASK else set()
            assert instances.fields.keys() == {"gt_boxes", "gt_classes"} | masks
            scale = image.shape[2] / scene.image.shape[1]
            boxes = instances.gt_boxes.tensor
            np.testing.assert_allclose(boxes, scene.entry["boxes"] * scale, atol=1e-3)
            assert instances.gt_classes.dtype == torch.int64
            assert (instances.gt_classes.numpy() == scene.entry["gt_classes"] - 1).all()
            if kind != MASK:
                continue
            for box, (polygon,) in zip(boxes, instances.gt_masks.polygons, strict=True):
                corners = polygon.reshape(-1, 2)
                np.testing.assert_allclose(box, [*corners.min(0), *corners.max(0)], atol=1e-3)


def test_boxes_near_the_objects_are_among_the_proposals(cfg):
    configure(MASK)
    trainer = Detectron2Trainer(draw_batches(1, 2, near=14), CPU, "off")
    counts = trainer.counts()
    assert counts["RoIs"] == 40
    assert counts["foreground"] > 0.9 * 14  # the first in the list of proposals
    assert trainer.counts() == counts  # nothing of the counting is left behind


def test_the_anchors_that_its_retinanet_learns_from_are_counted(cfg):
    configure(RETINA)
    counts = Detectron2Trainer(draw_batches(1, 2, objects=3), CPU, "off").counts()
    assert counts == {"foreground anchors": 3}  # not the ignored, not the background


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", [MASK, RETINA])
def test_its_models_are_measured_in_bf16_on_any_device(cfg, kind, device):
    configure(kind)
    trainer = Detectron2Trainer(draw_batches(2, 2, near=14), torch.device(device), "bf16")
    assert trainer.counts() and len(trainer.steps(3)) == 3
    batches = draw_batches(2, 2, one_size=True)
    assert Detectron2Detector(batches, torch.device(device), "bf16", True).run() == 4 * 5


def test_its_model_is_set_as_the_config_asks_and_the_same_each_time(cfg):
    configure(MASK, "TEST.DETECTIONS_PER_IM", "7")
    one, two = (benchmark_detectron2.detectron2_model(CPU, t) for t in (0.1, 0.2))
    heads, retina = two.config.MODEL.ROI_HEADS, two.config.MODEL.RETINANET
    assert heads.SCORE_THRESH_TEST == retina.SCORE_THRESH_TEST == 0.2
    assert heads.NUM_CLASSES == retina.NUM_CLASSES == 80
    assert heads.BATCH_SIZE_PER_IMAGE == 40
    assert two.config.TEST.DETECTIONS_PER_IMAGE == 7
    assert (one.backbone.conv3.weight == two.backbone.conv3.weight).all()
    assert (one.backbone.conv3.norm.weight == benchmark_models.BRANCH_SCALE).all()


@pytest.mark.parametrize("paste", [True, False])
@pytest.mark.parametrize("kind", [MASK, FASTER, RETINA])
def test_the_threshold_lets_the_usual_number_through(cfg, kind, paste):
    configure(kind)
    batches = draw_batches(2, 2, one_size=True)
    detector = Detectron2Detector(batches, CPU, "off", paste)
    assert detector.run() == 4 * 5
    assert set(detector.model.pasted) == {paste}
    for inputs, batch in zip(detector.model.seen[-2:], batches, strict=True):
        for given, scene in zip(inputs, batch, strict=True):
            assert given.keys() == {"image", "height", "width"}
            assert given["image"].dtype == torch.uint8
            assert sorted(given["image"].shape[1:])[0] == 96
            assert (given["height"], given["width"]) == scene.image.shape[:2]
    finished = detector.model(detector.model.seen[-1])[0]["instances"].image_size
    assert finished == batches[-1][0].image.shape[:2]


@pytest.mark.parametrize(
    "kind",
    [
        "e2e_keypoint_rcnn_R-50-FPN_1x",
        "e2e_mask_rcnn_R-101-FPN_1x",
        "e2e_faster_rcnn_R-50-C4_1x",
        "../gn_baselines/e2e_mask_rcnn_R-50-FPN_2x_gn",
        "rpn_R-50-FPN_1x",
    ],
)
def test_a_model_without_a_counterpart_is_not_compared(cfg, capsys, kind):
    benchmark_models.configure(BASELINES / f"{kind}.yaml", [])
    assert zoo_file() is None
    assert benchmark_commands.detectron2_peer(Detectron2Trainer) == {}
    assert capsys.readouterr().out == ""


def test_where_it_is_not_installed_one_line_says_so(cfg, monkeypatch, capsys):
    configure(MASK)
    assert benchmark_commands.detectron2_peer(Detectron2Trainer) == {
        "detectron2": Detectron2Trainer
    }
    for name in [name for name in sys.modules if name.startswith("detectron2.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "detectron2", None)  # as if there were none
    assert benchmark_commands.detectron2_peer(Detectron2Trainer) == {}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("detectron2 is not measured: ")


class Broken(Detectron2Trainer):
    def losses(self, batch):
        raise RuntimeError("not compiled with GPU support")


def test_it_is_one_more_row_of_training_and_a_failure_costs_its_own_row_only(
    tmp_path, monkeypatch, capsys, caplog
):
    others = {"broken": Broken, "detectron2": Detectron2Trainer}
    monkeypatch.setattr(benchmark_commands, "detectron2_peer", lambda _: others)
    args = ["train", "--device", "cpu", "--cfg", BASELINES / f"{FASTER}.yaml", "--batches", 1]
    args += ["--output", tmp_path / "x", "--amp", "off", "--steps", 2, "--set", *SMALL]
    assert not script.main([str(arg) for arg in args])
    ours, peer = json.loads((tmp_path / "x").read_text())["rows"]
    assert (ours["name"], peer["name"]) == ("ours", "detectron2")
    assert peer["notes"]["RoIs"] == 40 and peer["timing"]["repeats"] == 2
    assert "  detectron2  " in capsys.readouterr().out
    assert "broken is left out: not compiled with GPU support" in caplog.text


def test_it_is_one_more_row_of_inference_with_masks_pasted_and_without(cfg, monkeypatch):
    configure(MASK)
    # In place of this project's own, for speed.
    monkeypatch.setattr(benchmark_infer, "OwnDetector", Detectron2Detector)
    monkeypatch.setattr(benchmark_infer, "torchvision_model", lambda *_: None)
    cases = benchmark_infer.InferCases((1,), ("off",), rounds=2, batches=1)
    rates = list(benchmark_infer.infer_rates(CPU, cases, {"detectron2": Detectron2Detector}))
    assert [(rate.name, rate.precision) for rate in rates] == [
        ("ours", "fp32"), ("detectron2", "fp32"),
        ("ours", "fp32, not pasted"), ("detectron2", "fp32, not pasted"),
    ]  # fmt: skip
    assert all(rate.notes == {"detections": 5} for rate in rates)


def test_the_ratio_is_to_the_fastest_of_the_peers():
    def rate(name: str, milliseconds: float) -> Rate:
        return Rate(name, "bf16", 2, Timing(milliseconds, 1, 1, 2), None, None, {})

    rates = [rate("ours", 10), rate("torchvision", 40), rate("detectron2", 20)]
    ratios = [line.split()[-1] for line in format_rates(rates).splitlines()[2:]]
    assert ratios == ["2.00", "0.50", "1.00"]
