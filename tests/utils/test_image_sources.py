"""Finding images, reading them ahead, and refusing what is too large before it is decoded."""

from __future__ import annotations

import io
import struct
import threading
import zlib

import cv2
import numpy as np
import pytest

from core.errors import UserError
from utils.image_sources import (
    MAX_SIDE,
    images_in,
    images_named,
    read_ahead,
    read_photos,
    refuse_giant,
)


@pytest.fixture
def tree(tmp_path):
    """b.png, a.JPG, notes.txt, and deeper/c.png."""
    for name in ("b.png", "a.JPG", "deeper/c.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(cv2.imencode(path.suffix.lower(), np.full((4, 6, 3), 9, np.uint8))[1])
    (tmp_path / "notes.txt").write_text("")
    return tmp_path


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    start = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", start) + chunk(b"IEND", b"")


def test_folders_give_their_images_by_name(tree):
    assert [p.name for p in images_in(tree)] == ["a.JPG", "b.png"]
    assert [p.name for p in images_in(tree, recursive=True)] == ["a.JPG", "b.png", "c.png"]


def test_folders_without_images_are_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} holds no images.*--recursive"):
        images_in(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        images_in(tmp_path / "no")


def test_names_patterns_and_lists_can_be_mixed(tree):
    listed = io.StringIO(f"{tree}/a.JPG\n\n {tree}/x.jpg \n")
    found = images_named([f"{tree}/**/*.png", "-", "plain.jpg"], listed)
    assert [p.name for p in found] == ["b.png", "c.png", "a.JPG", "x.jpg", "plain.jpg"]


def test_a_name_that_looks_like_a_pattern_is_a_name_where_such_a_file_is(tmp_path):
    odd = tmp_path / "shot [1].jpg"
    odd.touch()
    assert images_named([str(odd)], io.StringIO()) == [odd]


def test_patterns_and_lists_without_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"\*\.gif matches no file"):
        images_named([f"{tmp_path}/*.gif"], io.StringIO())
    with pytest.raises(UserError, match="one a line"):
        images_named(["-"], io.StringIO("\n"))


@pytest.mark.parametrize(
    "size", [(30_000, 10), (10, MAX_SIDE + 1), (15_000, 15_000), (60_000, 60_000)]
)
def test_giants_are_refused_by_their_header(size):
    with pytest.raises(UserError, match=r"photo is .*shrink it"):
        refuse_giant(io.BytesIO(png_header(*size)), "photo")


def test_other_sizes_and_files_pass():
    assert refuse_giant(io.BytesIO(png_header(MAX_SIDE, 10)), "photo")
    assert not refuse_giant(io.BytesIO(b"text"), "photo")
    assert not refuse_giant(io.BytesIO(png_header(9, 9)), "photo", formats=["JPEG"])


def test_photos_come_in_order_and_bad_ones_as_sentences(tree):
    (tree / "text.jpg").write_text("not an image")
    (tree / "wide.png").write_bytes(png_header(30_000, 20))
    paths = [tree / n for n in ("a.JPG", "text.jpg", "b.png", "no.png", "wide.png")] * 3
    read = list(read_photos(paths, threads=2))
    assert [index for index, _ in read] == list(range(15))
    for index, found in read:
        if paths[index].name in ("a.JPG", "b.png"):
            assert found.shape == (4, 6, 3)
        else:
            assert str(paths[index]) in str(found)
    assert "30000 x 20" in str(read[4][1])


def test_reading_ahead_stays_within_its_limit_and_ends_with_its_reader():
    made = []

    def items():
        for i in range(1000):
            made.append(i)
            yield i

    ahead = read_ahead(items(), 3)
    assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
    ahead.close()
    # 5 taken, 3 in the queue, one in the hand.
    assert len(made) <= 9
    assert not any(thread.name == "read ahead" for thread in threading.enumerate())
