"""The benchmark of growth, on networks and images small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest

import benchmark as script
from core import benchmark_growth
from core.benchmark import Timing
from core.benchmark_growth import INFER, MEMORY, TRAIN, Point, Size, excess
from core.config import cfg as config

MASK_RCNN = Path(__file__).resolve().parents[2] / "configs/baselines/e2e_mask_rcnn_R-50-FPN_1x.yaml"
SMALL = ["RESNETS.WIDTH_PER_GROUP", "8", "TEST.DETECTIONS_PER_IM", "5", "FPN.DIM", "32"]
SMALL += ["FAST_RCNN.MLP_HEAD_DIM", "32", "MRCNN.DIM_REDUCED", "16"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_script_measures_and_draws_each_series(device, cfg, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_growth, "WARM_UP", 0)
    monkeypatch.setattr(benchmark_growth, "Size", lambda **_: Size(96, 2, 40, 1))
    args = ["growth", "--device", device, "--cfg", MASK_RCNN, "--steps", 2, "--sides", 96, 64]
    args += ["--objects", 2, 300, "--rois", 40, "--batches", 1, 2, "--set", *SMALL]
    args += ["--output", tmp_path / "x", "--plot", tmp_path / "x.png"]
    assert not script.main([str(arg) for arg in args])
    series = json.loads((tmp_path / "x").read_text())["series"]
    sizes = {axis: [p["size"] for p in s["points"]] for axis, s in series.items()}
    base = {"side": 96, "objects": 2, "rois": 40, "batch": 1}
    assert sizes["side"] == [base | {"side": 64}, base]  # smallest first
    assert sizes["objects"] == [base, base | {"objects": 300}]
    assert sizes["batch"] == [base, base | {"batch": 2}]
    one, two = series["batch"]["points"]
    assert two["train_flops"] == pytest.approx(2 * one["train_flops"], rel=0.1)
    assert two["infer_flops"] > 1.5 * one["infer_flops"] > 0
    for point in series["side"]["points"]:
        assert point["train"]["repeats"] == point["infer"]["repeats"] == 2
        assert (point["peak_gib"] is None) == (device == "cpu")
    assert series["objects"]["points"][1]["infer"] is None  # inference sees no ground truth
    assert config.TRAIN.SCALES == (800,) and config.TEST.SCALE == 800  # as before
    printed = capsys.readouterr().out
    assert "ground truths an image" in printed and "x work" in printed
    picture = cv2.imread(str(tmp_path / "x.png"))
    assert picture.std() > 10 and (tmp_path / "x.png").stat().st_size < 150_000


def test_growth_is_told_from_that_of_the_work():
    def point(batch: int, ms: float, flops: int, gib: float) -> Point:
        return Point(Size(batch=batch), Timing(ms, ms, ms, 2), flops, gib, None, None)

    points = [point(1, 10, 100, 2), point(2, 30, 200, 3), point(4, 80, 400, 4)]
    assert excess(points, TRAIN) == pytest.approx(2)  # 8 times as long for 4 times the work
    assert excess(points, MEMORY) == pytest.approx(0.5)
    assert benchmark_growth.figures_of(points) == [TRAIN, MEMORY]
    assert INFER not in benchmark_growth.table({"batch": points})


def test_a_missing_folder_for_the_picture_is_named(capsys):
    assert script.main(["growth", "--plot", "nowhere/x.png"]) == 2
    assert "--plot nowhere/x.png: there is no folder nowhere" in capsys.readouterr().err
