"""Measuring the loader: its speed beside torchvision's, and the memory of its processes."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch

import benchmark as script
from core import benchmark, benchmark_data, benchmark_memory
from core.benchmark_data import Rate, format_rates
from core.benchmark_memory import MIB, MemorySettings, ProcessMemory, process_memory
from tiny_data import tiny_dataset, tiny_files

__all__ = ["tiny_dataset", "tiny_files"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(benchmark, "REPEATS", (2, 3))
    monkeypatch.setattr(benchmark_data, "_SECONDS_PER_STAGE", 0.0)
    yield
    torch.set_num_threads(threads)


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, args)])
    return script.main()


def test_data_prints_tables_and_writes_json(
    cfg, tiny_dataset, tiny_files, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "data.json"
    args = ("--images", 8, "--bs", 2, "--processes", 1, "--output", file)
    assert run(monkeypatch, "data", "--dataset", tiny_files.spec, *args) == 0
    printed = capsys.readouterr().out
    assert "cv2.imread" in printed and "images/s" in printed
    report = json.loads(file.read_text())
    stages = {row["name"]: row for row in report["stages"]}
    assert {"read", "decode", "sample", "collate"} <= stages.keys()
    assert stages["decode"]["peers"].keys() == {"cv2.imread (reads too)", "torchvision.io (RGB)"}
    (rate,) = report["rates"]
    assert rate["processes"] == 1 and rate["ours"] > 0 and rate["torchvision"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("data", "--dataset", "nothing"), "unknown data set 'nothing'"),
        (("data", "--dataset", "coco2017", "--bs", 0), "--bs must be at least 1"),
        (("data", "--dataset", "coco2017", "--processes", 0), "--processes must be at least 1"),
        (("memory", "--epochs", 0), "--epochs must be at least 1"),
    ],
)
def test_wrong_flags_are_named(cfg, monkeypatch, capsys, args, message):
    assert run(monkeypatch, *args) == 2
    assert message in capsys.readouterr().err


def test_rates_are_compared_with_torchvisions():
    line = format_rates([Rate(4, 300.0, 100.0, 90.0)]).splitlines()[1]
    assert line.split() == ["4", "300.0", "100.0", "3.00", "90.0"]


def test_memory_counts_a_process_own_pages():
    before = process_memory(os.getpid(), "before")
    block = bytearray(os.urandom(1)) * (40 * MIB)
    after = process_memory(os.getpid(), "after")
    assert after.rss >= after.pss >= after.pss_data > 0
    for kind in ("rss", "pss", "pss_data", "uss"):
        grown = getattr(after, kind) - getattr(before, kind)
        assert 0.9 * len(block) < grown < 1.2 * len(block), kind


class _Sender(list):
    send = list.append

    def close(self):
        pass


def test_every_process_is_measured_after_every_epoch(cfg):
    sender = _Sender()
    benchmark_memory._load(MemorySettings(images=40, workers=2, epochs=2, batch_size=8), sender)
    (measured,) = sender
    assert [[p["name"] for p in epoch] for epoch in measured["epochs"]] == [
        ["main", "loader 0", "loader 1"]
    ] * 2
    # At least boxes (16 bytes), a class (4) and 8 vertices (128) an object
    assert measured["annotation_bytes"] > 40 * 7 * 148


def test_what_annotations_take_is_the_difference_to_few_images(monkeypatch):
    def processes(main, loader):
        names = ["main", "loader 0", "loader 1"]
        sizes = [main, loader, loader]
        return [
            vars(ProcessMemory(name, 5 * size, 2 * size, size, size))
            for name, size in zip(names, sizes, strict=True)
        ]

    def measured(settings):
        if settings.images < 100:
            return {"annotation_bytes": 10 * MIB, "epochs": [processes(50 * MIB, 20 * MIB)]}
        return {
            "annotation_bytes": 110 * MIB,
            "epochs": [processes(90 * MIB, 60 * MIB), processes(95 * MIB, 60 * MIB)],
        }

    monkeypatch.setattr(benchmark_memory, "_in_fresh_process", measured)
    report = benchmark_memory.measure_memory(MemorySettings(images=1000, workers=2), lambda _: None)
    assert report["annotation_bytes"] == 100 * MIB
    assert report["copies_in_workers"] == [0.8, 0.8]
    assert report["copies_in_all"] == [1.2, 1.25]
    text = "\n".join(benchmark_memory.report_lines(report))
    assert "epoch 2: 2 loader processes hold 0.80 copies (at most 1.2 allowed)" in text
