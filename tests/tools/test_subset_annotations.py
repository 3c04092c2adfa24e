"""A subset of annotations is what was asked for, and never at the price of another file."""

from __future__ import annotations

import json

import pytest

import subset_annotations
from tiny_data import write_tiny_files


@pytest.fixture
def source(tmp_path):
    return write_tiny_files(tmp_path).annotations


def refused(capsys, *args: object) -> str:
    assert subset_annotations.main([str(arg) for arg in args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_the_first_images_with_objects_are_kept_with_all_else(source, tmp_path):
    target = tmp_path / "new/sub.json"
    assert subset_annotations.main([str(source), str(target), "--images", "1"]) == 0
    whole, part = (json.loads(file.read_text()) for file in (source, target))
    (image,) = part["images"]
    assert image in whole["images"] and part["categories"] == whole["categories"]
    expected = [a for a in whole["annotations"] if a["image_id"] == image["id"]]
    assert part["annotations"] == expected and expected
    assert [file.name for file in target.parent.iterdir()] == ["sub.json"]


def test_the_source_is_not_replaced_under_any_name(source, tmp_path, capsys):
    before = source.read_bytes()
    (tmp_path / "link.json").symlink_to(source)
    (tmp_path / "folder").mkdir()
    for target in (source, tmp_path / "link.json", tmp_path / "folder/.." / source.name):
        line = refused(capsys, source, target, "--images", 1)
        assert f"{target} would overwrite {source}" in line
    assert source.read_bytes() == before


@pytest.mark.parametrize("target", ["", "file/sub.json", "/proc/nope/sub.json", "x" * 300])
def test_a_place_that_cannot_be_written_to_is_one_sentence(source, tmp_path, capsys, target):
    (tmp_path / "file").touch()
    line = refused(capsys, source, tmp_path / target, "--images", 1)
    assert f"cannot write {tmp_path / target}" in line


@pytest.mark.parametrize("number", [0, -1])
def test_no_images_are_refused(source, tmp_path, capsys, number):
    line = refused(capsys, source, tmp_path / "sub.json", "--images", number)
    assert f"--images must be at least 1, not {number}" in line
    assert not (tmp_path / "sub.json").exists()


def test_a_write_that_fails_leaves_what_was_there(source, tmp_path, monkeypatch, capsys):
    target = tmp_path / "sub.json"
    target.write_text("before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.weights.os.replace", full)
    assert "No space left" in refused(capsys, source, target, "--images", 1)
    assert target.read_text() == "before"
    assert not list(tmp_path.glob(".*"))
