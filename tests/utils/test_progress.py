"""Progress without a terminal: a line now and then, with what is left."""

from __future__ import annotations

import logging

from utils import progress


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
