"""The benchmark of training steps, on networks and images small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmark as script
import utils.boxes as box_utils
from core import benchmark_models, benchmark_train

BASELINES = Path(__file__).resolve().parents[2] / "configs/baselines"
SMALL = ["TRAIN.SCALES", "(96,)", "TRAIN.MAX_SIZE", "160", "RESNETS.WIDTH_PER_GROUP", "8"]
SMALL += ["TRAIN.BATCH_SIZE_PER_IM", "40"]


def run(tmp_path, config: str, *flags: object) -> dict:
    args = ["train", "--device", "cpu", "--cfg", BASELINES / config, "--output", tmp_path / "x"]
    args += ["--batches", 1, "--amp", "off", "--steps", 2, *flags, "--set", *SMALL]
    assert not script.main([str(arg) for arg in args])
    return json.loads((tmp_path / "x").read_text())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(benchmark_train, "BATCHES", 1)
    monkeypatch.setattr(benchmark_train, "NEAR", 7)
    monkeypatch.setattr(benchmark_models, "MATRIX_SIDE", {"cpu": 64})


def test_the_script_measures_steps_beside_torchvision(cfg, tmp_path, capsys):
    report = run(tmp_path, "e2e_mask_rcnn_R-50-FPN_1x.yaml", "--profile")
    ours, peer = report["rows"]
    assert (ours["name"], peer["name"]) == ("ours", "torchvision")
    for row in (ours, peer):
        assert row["timing"]["repeats"] == 2
        assert row["images_per_second"] == pytest.approx(1e3 / row["timing"]["median"])
        assert row["notes"]["RoIs"] == 40
        # not more than the quota, of which the boxes near the objects fill more than the half
        assert 6 <= row["notes"]["foreground"] <= 10
    printed = capsys.readouterr().out
    assert "x peer" in printed and "torchvision" in printed
    assert "aten::convolution" in printed and "everything else" in printed  # of --profile
    assert sum(stage["share"] for stage in report["stages"]) == pytest.approx(1)


def test_a_model_that_torchvision_has_not_is_measured_alone(cfg, tmp_path):
    rows = run(tmp_path, "e2e_faster_rcnn_R-50-C4_1x.yaml")["rows"]
    assert [row["name"] for row in rows] == ["ours"]
    assert rows[0]["floor_ms"] > 0


@pytest.mark.parametrize("kind", ["retinanet_R-50-FPN_1x", "e2e_keypoint_rcnn_R-50-FPN_1x"])
def test_batches_suit_torchvisions_other_models(cfg, kind):
    benchmark_models.configure(BASELINES / f"{kind}.yaml", SMALL)
    batches = benchmark_train.draw_scenes(1)
    trainer = benchmark_train.TorchvisionTrainer(batches, torch.device("cpu"), "off", False)
    assert len(trainer.steps(1)) == 1


def test_the_anchors_that_retinanet_learns_from_are_counted(cfg, tmp_path):
    ours, peer = run(tmp_path, "retinanet_R-50-FPN_1x.yaml")["rows"]
    for row in (ours, peer):
        assert 1 <= row["notes"]["foreground anchors"] < 200


@pytest.mark.parametrize(
    ("kind", "stage_3"),
    [("e2e_mask_rcnn_X-101-32x8d-FPN_1x", 23), ("e2e_faster_rcnn_R-101-FPN_1x", 23)],
)
def test_torchvision_has_the_other_backbones(cfg, kind, stage_3):
    benchmark_models.configure(BASELINES / f"{kind}.yaml", [])
    layers = benchmark_models.torchvision_model(96, 160).backbone.body["layer3"]
    assert len(layers) == stage_3
    assert layers[0].conv2.groups == cfg.RESNETS.NUM_GROUPS


def test_boxes_near_the_objects_are_foreground():
    for scene in benchmark_models.draw_batches(4, 2, near=40)[3]:
        height, width = scene.image.shape[:2]
        assert height > width  # every fourth batch stands
        boxes = torch.from_numpy(scene.entry["boxes"])
        overlaps = box_utils.bbox_overlaps(torch.from_numpy(scene.near)[None], boxes[None])[0]
        assert (overlaps.max(dim=1).values >= 0.5).float().mean() > 0.95
        for mask, box, area in zip(
            scene.masks, scene.entry["boxes"], scene.entry["seg_areas"], strict=True
        ):
            rows, columns = np.nonzero(mask)
            found = [columns.min(), rows.min(), columns.max(), rows.max()]
            assert np.abs(found - box).max() <= 2
            assert 0.4 * area < mask.sum() < area
