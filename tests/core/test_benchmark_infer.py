"""The benchmark of inference, on a network and images small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import benchmark as script
from core import benchmark_commands

BASELINES = Path(__file__).resolve().parents[2] / "configs/baselines"
SMALL = ["TEST.SCALE", "96", "TEST.MAX_SIZE", "160", "RESNETS.WIDTH_PER_GROUP", "8"]
SMALL += ["TEST.DETECTIONS_PER_IM", "5"]
SMALL += ["TEST.RPN_POST_NMS_TOP_N", "100"]


def run(config: str, *flags: object) -> int:
    args = ["infer", "--device", "cpu", "--cfg", BASELINES / config, *flags, "--set", *SMALL]
    return script.main([str(arg) for arg in args])


def test_the_script_measures_inference_beside_torchvision(cfg, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_commands, "CPU_BATCHES", 1)
    flags = ["--batches", 1, "--rounds", 2, "--output", tmp_path / "x.json"]
    assert not run("e2e_mask_rcnn_R-50-FPN_1x.yaml", *flags)
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    pasted, bare = "fp32", "fp32, not pasted"
    assert [(row["name"], row["precision"]) for row in rows] == [
        ("ours", pasted), ("torchvision", pasted), ("ours", bare), ("torchvision", bare)
    ]  # fmt: skip
    for row in rows:
        assert row["notes"]["detections"] == pytest.approx(5, abs=0.5)
        assert row["floor_ms"] > 0
    assert "not pasted" in capsys.readouterr().out


def test_retinanet_keeps_as_many_detections_as_torchvisions(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_commands, "CPU_BATCHES", 1)
    flags = ["--batches", 1, "--rounds", 2, "--output", tmp_path / "x.json"]
    assert not run("retinanet_R-50-FPN_1x.yaml", *flags)
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["ours", "torchvision"]
    for row in rows:
        assert row["notes"]["detections"] == pytest.approx(5, abs=0.5)


def test_a_model_that_detects_nothing_is_refused(cfg, capsys):
    assert run("rpn_R-50-FPN_1x.yaml") == 2
    assert "not a model that makes detections by itself" in capsys.readouterr().err
