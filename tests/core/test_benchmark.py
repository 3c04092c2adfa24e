"""The benchmark: its arithmetic, and that every measurement runs on inputs small enough to test."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import benchmark as script
from core import benchmark, benchmark_commands
from core.benchmark import Row, Timing, format_rows, measure
from core.benchmark_ops import FULL, SMALL, draw_boxes, ops_rows
from core.benchmark_roi_align import _Case

CPU = torch.device("cpu")
TINY = replace(
    FULL, images=2, height=96, width=128, channels=8, pooled=((24, 7), (8, 14)), nms=(50, 90),
    nms_problems=(4, 30), mask_rois=16, pasted=4,
)  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(benchmark, "REPEATS", (2, 3))
    monkeypatch.setattr(benchmark, "COPY_BYTES", {"cuda": 1 << 20, "cpu": 1 << 20})


# torchvision has nothing like them.
WITHOUT_PEER = (
    "polygons_to_masks",
    "image_batch",
    "roi_crop forward",
    "roi_crop fwd+bwd",
    "batched_soft_nms",
    "box_voting",
)


def test_every_row_of_the_full_benchmark_can_be_measured():
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    rows = list(ops_rows(device, TINY))
    cases = [(row.name, row.case) for row in rows]
    assert len(set(cases)) == len(cases)
    # 3 dtypes x 2 layouts x 2 numbers of RoIs x (forward, forward and backward)
    assert sum(row.name.startswith("roi_align") for row in rows) == 24
    for row in rows:
        assert row.ours.median > 0
        compared = row.as_dict(1e9)["speedup"]
        assert compared or row.name in WITHOUT_PEER, row.name
    bf16 = [r for r in rows if r.name.startswith("roi_align") and "bfloat16" in r.case]
    assert all("no bfloat16" in row.note and "torchvision float32" in row.peers for row in bf16)
    assert "roi_align fwd+bwd" in format_rows(rows, 1e9)


def test_measure_rotates_its_inputs_and_counts_its_calls():
    seen = []
    timing = measure(seen.append, CPU)
    assert seen[-timing.repeats :] == list(range(timing.repeats))
    assert timing.low <= timing.median <= timing.high


def test_the_floor_counts_each_sampled_pixel_once():
    # Two equal RoIs; cells of one feature pixel with 2 x 2 samples at pixels 2.25 to 3.75 touch the
    # pixels 2, 3 and 4 of either axis.
    features = [torch.zeros(1, 5, side, side, requires_grad=True) for side in (16, 8, 4, 2)]
    roi = torch.tensor([[0.0, 8, 8, 16, 16]]).repeat(2, 1)
    case = _Case([features] * 2, [roi] * 4, 2)
    forward, both = case.floor_bytes()
    read, written, boxes = 9 * 5 * 4, 2 * 5 * 4 * 4, 2 * 5 * 4
    assert forward == read + written + boxes
    maps = 5 * 4 * (16**2 + 8**2 + 4**2 + 2**2)
    assert both == forward + written + maps


def test_rows_state_speed_up_and_share_of_the_floor():
    row = Row("op", "case", Timing(2.0, 1, 3, 5), {"peer": Timing(5.0, 4, 6, 5)}, 1_000_000)
    values = row.as_dict(1e9)
    assert values["speedup"] == {"peer": 2.5}
    assert values["floor_ms"] == 1.0 and values["floor_fraction"] == 0.5
    line = format_rows([row], 1e9).splitlines()[2]
    assert "2.50" in line and "50 %" in line


def test_boxes_lie_in_the_image_and_spread_over_the_levels():
    boxes = draw_boxes(4000, 40, 800, 1216, np.random.default_rng(0))
    assert boxes.dtype == np.float32 and boxes.min() >= 0
    assert boxes[:, 2].max() <= 1215 and boxes[:, 3].max() <= 799
    side = np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2] + 1, axis=1))
    small = (side < 112).mean()
    assert 0.3 < small < 0.9 and (side > 224).mean() > 0.02


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, args)])
    return script.main()


def test_the_script_prints_a_table_and_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_commands, "SMALL", replace(TINY, dtypes=SMALL.dtypes))
    file = tmp_path / "ops.json"
    assert run(monkeypatch, "ops", "--device", "cpu", "--output", file) == 0
    printed = capsys.readouterr().out
    assert "batched_nms" in printed and "memory bandwidth" in printed
    report = json.loads(file.read_text())
    assert report["environment"]["torch"] == torch.__version__
    assert {"median", "low", "high", "repeats"} == report["rows"][0]["ours"].keys()


def test_a_missing_output_folder_is_named_before_anything_is_measured(monkeypatch, capsys):
    assert run(monkeypatch, "ops", "--device", "cpu", "--output", "nowhere/x.json") == 2
    assert "there is no folder nowhere" in capsys.readouterr().err
