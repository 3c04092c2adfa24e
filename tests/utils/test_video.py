"""Videos: what is written can be read, and what is cut off says so."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from core.errors import UserError
from utils.video import VideoReader, VideoWriter


def frame(i: int, height: int = 60, width: int = 80) -> np.ndarray:
    picture = np.full((height, width, 3), 40, np.uint8)
    cv2.circle(picture, (5 + 3 * i, 30), 5, (0, 200, 250), -1)
    return picture


def write(path: Path, count: int, **size: int) -> Path:
    with VideoWriter(path, fps=12) as video:
        for i in range(count):
            video.write(frame(i, **size))
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_a_video_comes_back(tmp_path, suffix):
    path = write(tmp_path / f"new/out{suffix}", 20)
    assert list(path.parent.iterdir()) == [path]
    with VideoReader(path) as video:
        assert video.fps == pytest.approx(12)
        assert video.frame_count == 20
        frames = list(video)
    assert [number for number, _ in frames] == list(range(20))
    assert all(np.abs(f - frame(i).astype(int)).mean() < 5 for i, f in frames)
    assert video.missing() == ""


def test_odd_sizes_lose_a_row_and_a_column(tmp_path):
    path = write(tmp_path / "odd.mp4", 3, height=61, width=81)
    with VideoReader(path) as video:
        assert next(iter(video))[1].shape == (60, 80, 3)


def test_a_video_that_is_cut_off_says_where(tmp_path):
    path = write(tmp_path / "cut.avi", 40)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with VideoReader(path) as video:
        read = len(list(video))
    assert 5 < read < 35
    assert f"cut.avi ends after {read} of 40 frames" in video.missing()


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_what_is_no_video_is_named(tmp_path, content):
    path = write(tmp_path / "a.mp4", 20)
    # An mp4's table of contents stands at its end.
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(UserError, match=r"a\.mp4 cannot be opened: it is truncated"):
        VideoReader(path)
    with pytest.raises(UserError, match=r"b\.mp4 does not exist"):
        VideoReader(tmp_path / "b.mp4")


def test_a_suffix_that_is_no_videos_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"\.mp4, \.mov"):
        VideoWriter(tmp_path / "out.gif", 10)


def test_a_failure_leaves_no_half_video(tmp_path):
    with pytest.raises(ZeroDivisionError), VideoWriter(tmp_path / "a.mp4", 10) as video:
        video.write(frame(0))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_what_is_interrupted_is_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4", 10) as video:
        video.write(frame(0))
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
