"""Progress: a bar on a terminal; elsewhere a line now and then, with what is left."""

from __future__ import annotations

import logging
import sys

from utils import progress
from utils.logging import log_to_file, setup_logging
from utils.progress import StepBar


def test_lines_come_every_few_seconds_with_the_remaining_time(monkeypatch, caplog):
    clock = iter([0.0, 4.0, 12.0, 15.0, 24.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False)
    with caplog.at_level(logging.INFO), progress.Progress(6) as bar:
        for count in (1, 2, 1, 2):
            bar.advance(count)
    assert [record.message for record in caplog.records] == [
        "3 of 6 images, 0.25 a second, ETA 0:00:12",
        "6 images in 40.0 s (0.1 a second)",
    ]


def test_steps_are_a_bar_on_a_terminal_below_the_log_lines(monkeypatch, capsys, tmp_path):
    logger = setup_logging("bar")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    handler = log_to_file(tmp_path / "log.txt")
    bar = StepBar(total=10, first=4)
    try:
        bar.advance()
        bar.show(loss="1.234", lr="0.02")
        logger.info("a report")
        bar.advance()
    finally:
        bar.close()
        logging.getLogger().removeHandler(handler)
    shown = capsys.readouterr()
    assert "6/10" in shown.err
    assert "loss=1.234, lr=0.02" in shown.err
    assert "a report" in shown.out + shown.err
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert line.endswith("INFO bar: a report")


def test_steps_are_silent_elsewhere(capsys):
    bar = StepBar(total=2)
    bar.advance()
    bar.show(loss="1")
    bar.close()
    assert capsys.readouterr().err == ""
