"""Runs beside each other: what is read, condensed, shown and drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from compare_runs import main
from core.compare_runs import read_runs, summary, text_table, write_comparison
from core.errors import UserError


def write_run(folder, losses: dict[int, float], ap: dict[int, float], tail: str = ""):
    folder.mkdir(parents=True)
    lines = [
        {"step": s, "loss": v, "lr": 0.01, "time": 0.5, "eta_seconds": 9, "max_mem_mib": 100 + s}
        for s, v in losses.items()
    ]
    lines += [{"step": s, "set/box/AP": v} for s, v in ap.items()]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


@pytest.fixture
def runs(tmp_path):
    one = write_run(tmp_path / "runs/slow/a", {0: 4.0, 20: 2.0}, {20: 0.25, 10: 0.5})
    # Resumed from step 10, and killed while it wrote a line.
    two = write_run(tmp_path / "runs/fast/a", {0: 4.0, 20: 9.0, 10: 3.0} | {20: 1.0}, {}, '{"st')
    (two / "test").mkdir()
    (two / "test/metrics.json").write_text(json.dumps({"set": {"box": {"AP": 0.75}}}))
    return [one, two]


def test_the_table_has_a_column_for_each_run(runs):
    headers, rows = summary(read_runs(runs))
    assert headers == ["", "slow", "fast"]  # only what tells them apart
    assert {row[0]: row[1:] for row in rows} == {
        "steps": [21, 21],
        "loss": [3.0, pytest.approx(8 / 3)],  # means of the last reports
        "lr": [0.01, 0.01],
        "time": [0.5, 0.5],
        "max_mem_mib": [120, 120],
        "set/box/AP (best)": [0.5, None],
        "test set/box/AP": [None, 0.75],
    }


def test_the_script_prints_and_draws(runs, tmp_path, capsys):
    main([*map(str, runs), "--output", str(tmp_path / "c.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["slow", "fast"]
    assert ["loss", "3.0000", "2.6667"] in [line.split() for line in lines]
    assert ["set/box/AP", "(best)", "0.5000", "-"] in [line.split() for line in lines]
    picture = cv2.imread(str(tmp_path / "c.png"))
    assert min(picture.shape[:2]) > 300
    assert (picture.min(axis=2) < 250).any()
    write_comparison(read_runs(runs), tmp_path / "c.html")
    html = (tmp_path / "c.html").read_text()
    assert 'src="data:image/svg+xml' in html
    assert ">0.7500</td>" in html


def test_one_run_alone_is_named_by_its_folder(runs):
    assert text_table(read_runs(runs[:1])).splitlines()[0].split() == ["a"]


def test_the_script_fails_with_a_sentence(tmp_path):
    script = Path(__file__).resolve().parents[2] / "tools/compare_runs.py"
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert "log.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda run: (run / "log.jsonl").unlink(), "log.jsonl.*metrics.json"),
        (lambda run: (run / "log.jsonl").write_text('nonsense\n{"step": 1}\n'), "line 1"),
        (lambda run: (run / "metrics.json").write_text("[1]"), "metrics.json.*results"),
    ],
)
def test_bad_folders_are_one_sentence(runs, change, words):
    change(runs[0])
    with pytest.raises(UserError, match=words):
        read_runs(runs)


def test_other_suffixes_and_twins_are_refused(runs, tmp_path):
    with pytest.raises(UserError, match="html or .png"):
        write_comparison(read_runs(runs), tmp_path / "c.gif")
    with pytest.raises(UserError, match="twice"):
        read_runs([runs[0], runs[0]])
