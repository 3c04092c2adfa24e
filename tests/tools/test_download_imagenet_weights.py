"""The script knows every file of the specification and skips what is there."""

from __future__ import annotations

import sys

import pytest

import download_imagenet_weights as script
from core.detectron_config import IMAGENET_FILES
from core.errors import UserError


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["download_imagenet_weights.py", *map(str, args)])
    return script.main()


def test_files_that_are_there_are_not_fetched_again(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(script, "download", lambda url, path, verify: fetched.append(path.name))
    (tmp_path / "R-50.pkl").touch()
    assert run(monkeypatch, "--output_dir", tmp_path) == 0
    assert fetched == [name for name in script.URLS if name != "R-50.pkl"]
    assert len(script.URLS) == 11


def test_every_file_that_configs_of_detectron_start_from_can_be_fetched():
    assert set(IMAGENET_FILES) == {name for name in script.URLS if name.endswith(".pkl")}


def test_a_failure_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    def fail(url, path, verify):
        raise UserError(f"cannot download {url}: put the file at {path} yourself")

    monkeypatch.setattr(script, "download", fail)
    assert run(monkeypatch, "--output_dir", tmp_path, "-t", "R-50.pkl") == 2
    assert capsys.readouterr().err.startswith("error: cannot download https://dl.fbaipublicfiles")


def test_an_unknown_name_is_refused_with_the_known_ones(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "-t", "R-34.pkl")
    assert "resnet50_caffe.pth" in capsys.readouterr().err
