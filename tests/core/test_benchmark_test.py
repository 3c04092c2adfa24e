"""The benchmark of a whole test, small enough to run as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import benchmark as script
from core import benchmark_models, benchmark_test
from core.errors import UserError
from datasets.dataset_catalog import resolve_dataset
from datasets.demo_shapes import make_demo_data
from datasets.json_dataset import JsonDataset

CONFIG = Path(__file__).resolve().parents[2] / ("configs/demo/e2e_mask_rcnn_R-50-FPN_gn_demo.yaml")
SMALL = ["TEST.SCALE", "64", "TEST.MAX_SIZE", "96", "TEST.DETECTIONS_PER_IM", "10"]
SMALL += ["RESNETS.WIDTH_PER_GROUP", "16", "DATA_LOADER.NUM_THREADS", "0"]


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory) -> Path:
    return make_demo_data(tmp_path_factory.mktemp("demo"), num_train=1, num_val=3)


def test_the_script_measures_a_test_from_files_to_scores(demo_data, cfg, tmp_path, capsys):
    flags = ["test", "--dataset", demo_data, "--cfg", CONFIG, "--images", 7, "--bs", 2]
    flags += ["--device", "cpu", "--output", tmp_path / "test.json", "--set", *SMALL]
    assert not script.main([str(flag) for flag in flags])
    printed = capsys.readouterr().out
    for part in ("pure forward", "whole test", "alone: suppression", "alone: paste and encode"):
        assert part in printed
    report = json.loads((tmp_path / "test.json").read_text())
    assert report["settings"]["images"] == 7
    assert report["detections_per_image"] == pytest.approx(10, abs=0.5)
    assert report["share_of_pure_rate"] == report["test_rate"] / report["pure_rate"]
    assert report["share_of_pasted_rate"] == report["test_rate"] / report["pasted_rate"]
    assert sum(report["waits"].values()) == pytest.approx(report["test_seconds"])
    assert report["evaluation_seconds"] == report["waits"]["evaluate"]
    stages = {"decode", "forward", "suppression", "mask head", "paste and encode", "evaluate"}
    assert set(report["stages"]) == stages
    assert min(report["stages"].values()) > 0


def test_repeated_images_keep_their_annotations(demo_data, cfg, tmp_path):
    once = JsonDataset(resolve_dataset(str(demo_data)).test_names[0])
    dataset = benchmark_test.repeat_dataset(once, 7, tmp_path)
    first, repeated = once.get_roidb(gt=True), dataset.get_roidb(gt=True)
    assert [e["image"] for e in repeated] == [first[i % 3]["image"] for i in range(7)]
    assert [len(e["boxes"]) for e in repeated] == [len(first[i % 3]["boxes"]) for i in range(7)]
    ids = [a["id"] for a in dataset.COCO.dataset["annotations"]]
    assert len(set(ids)) == len(ids)


def test_a_model_that_finds_too_little_is_said(demo_data, cfg, monkeypatch):
    monkeypatch.setattr(benchmark_models, "CANDIDATES", (1,))
    name = benchmark_test.configure(str(demo_data), CONFIG, SMALL)
    with pytest.raises(UserError, match="not 10: raise TEST.RPN_POST_NMS_TOP_N"):
        benchmark_test.benchmark_test(name, torch.device("cpu"), num_images=2, batch_size=2)
