"""Checkpoints of a training: the newest good one, writing in the background, random state."""

from __future__ import annotations

import os
import random
import resource
import signal
import threading

import numpy as np
import pytest
import torch

import core.checkpoints as checkpoints
from core.checkpoints import (
    CheckpointWriter,
    newest_good_checkpoint,
    on_host,
    random_state,
    restore_random_state,
    resume_position,
)
from core.errors import UserError


def content(step, size=8):
    return {"step": step, "model": {"w": torch.full((size,), float(step))}, "optimizer": {}}


def write(folder, *steps, **options):
    writer = CheckpointWriter(folder, **options)
    for step in steps:
        writer.save(content(step))
    writer.wait()
    writer.close()


def newest(folder):
    found = newest_good_checkpoint(folder)
    return found and found[0].name


def test_the_newest_checkpoint_that_is_whole_is_found(tmp_path, caplog):
    assert newest(tmp_path) is None
    write(tmp_path, 9, 99, 100)
    assert newest(tmp_path) == "model_step100.pth"
    whole = (tmp_path / "model_step100.pth").read_bytes()
    (tmp_path / "model_step100.pth").write_bytes(whole[: len(whole) // 2])
    # One bit of a weight: the file still loads, its sum does not agree.
    flipped = bytearray((tmp_path / "model_step99.pth").read_bytes())
    place = flipped.index(torch.tensor(99.0).numpy().tobytes())
    flipped[place] ^= 1
    (tmp_path / "model_step99.pth").write_bytes(flipped)
    path, found = newest_good_checkpoint(tmp_path)
    assert path.name == "model_step9.pth"
    assert found["model"]["w"][0] == 9
    assert "model_step100.pth is damaged" in caplog.text
    assert "model_step99.pth is damaged" in caplog.text


def test_a_file_that_no_pointer_names_yet_counts_and_an_abandoned_training_does_not(tmp_path):
    write(tmp_path, 10, 20, 30)
    write(tmp_path, 12)  # resumed from an earlier step
    assert newest(tmp_path) == "model_step12.pth"
    torch.save(content(14), tmp_path / "model_step14.pth")  # killed before the pointer
    assert newest(tmp_path) == "model_step14.pth"


def test_only_the_last_ones_are_kept(tmp_path):
    write(tmp_path, 1, 2, 10, 11, keep=2)
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [
        "model_step10.pth",
        "model_step11.pth",
    ]


def test_weights_only_are_not_resumed_from(tmp_path):
    torch.save({"model": {"w": torch.zeros(1)}}, tmp_path / "model_step3.pth")
    assert newest(tmp_path) is None
    with pytest.raises(UserError, match="holds weights only: leave out --resume"):
        checkpoints.read_training_checkpoint(tmp_path / "model_step3.pth")


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    may_write, write_file = threading.Event(), checkpoints.save_torch_file

    def slow(*args):
        assert may_write.wait(20)
        write_file(*args)

    monkeypatch.setattr(checkpoints, "save_torch_file", slow)
    weights = content(5)
    writer = CheckpointWriter(tmp_path)
    writer.save(weights)
    weights["model"]["w"].zero_()  # the next step
    assert list(tmp_path.glob("*.pth")) == []
    may_write.set()
    writer.wait()
    assert newest_good_checkpoint(tmp_path)[1]["model"]["w"].tolist() == [5.0] * 8


def test_a_full_disk_leaves_the_last_good_checkpoint_and_is_one_sentence(tmp_path):
    # A limit of the size of files fails as a full disk does, in the middle of writing.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = CheckpointWriter(tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        writer.save(content(1))
        writer.save(content(2, size=1 << 18))
        with pytest.raises(UserError, match=r"cannot write a checkpoint .*MiB free.*step1.pth is"):
            writer.save(content(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    writer.close()
    assert newest(tmp_path) == "model_step1.pth"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_step1.pth"]


def test_left_overs_of_a_kill_are_cleared_away(tmp_path):
    (tmp_path / ".model_step7.pth.tmp-123").write_bytes(b"half")
    write(tmp_path, 8)
    assert not list(tmp_path.glob(".model*"))


def test_a_file_system_without_links_gets_a_copy(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    writer = CheckpointWriter(tmp_path)
    writer.save(content(3), best=True)
    writer.wait()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["last_checkpoint", "model_best.pth", "model_step3.pth"]
    assert newest(tmp_path) == "model_step3.pth"


def test_tensors_of_one_storage_stay_one_on_the_host():
    shared = torch.arange(4.0)
    copy = on_host({"a": shared, "b": [shared.detach(), 3]})
    assert copy["a"] is copy["b"][0]
    assert copy["a"] is not shared
    assert copy["b"][1] == 3


def test_every_random_number_is_drawn_again(tmp_path):
    def draws():
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()

    draws()  # leaves numpy with half of a pair of normal numbers
    torch.save(random_state([torch.device("cpu")]), tmp_path / "state.pth")
    expected = draws()
    restore_random_state(torch.load(tmp_path / "state.pth", weights_only=True), [])
    assert draws() == expected


def test_another_batch_size_moves_the_place_by_images(caplog):
    checkpoint = {
        "step": 99,
        "batch_size": 16,
        "iter_size": 1,
        "sampler": {"batches": 100, "batch_size": 16},
    }
    assert resume_position(checkpoint, 16, 1, adapt=True) == (100, 100)
    assert resume_position(checkpoint, 8, 2, adapt=True) == (100, 200)  # the same effective batch
    assert caplog.messages == []
    assert resume_position(checkpoint, 8, 1, adapt=True) == (200, 200)
    assert resume_position(checkpoint, 32, 1, adapt=True) == (50, 50)
    assert resume_position(checkpoint, 8, 1, adapt=False) == (100, 200)
    assert "took 16 x 1 images a step, now it is 8 x 1: after 100 of its steps" in caplog.text
    # Twice resumed, with other batches before: the place in the data is counted in images.
    checkpoint["sampler"] = {"batches": 150, "batch_size": 16}
    assert resume_position(checkpoint, 8, 1, adapt=True) == (200, 300)


def test_a_training_of_detectron_pytorch_goes_on():
    checkpoint = {"step": 1999, "train_size": 236574, "batch_size": 8, "model": {}, "optimizer": {}}
    assert resume_position(checkpoint, 8, 1, adapt=True) == (2000, 2000)
    assert resume_position(checkpoint, 8, 2, adapt=True) == (2000, 4000)
    assert resume_position(checkpoint, 16, 1, adapt=True) == (1000, 1000)
