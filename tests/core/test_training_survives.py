"""A real training that is killed again and again ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import torch

from datasets.demo_shapes import make_demo_data
from forked import fork_context, train_demo

STEPS, KILLS = 20, 20
FLAGS = ("--no_cuda", "--auto_resume", "--bs", 1, "--disp_interval", 100)
OPTIONS = (
    *("SOLVER.MAX_ITER", STEPS, "SOLVER.TYPE", "SGD", "SOLVER.LR_POLICY", "cosine"),
    *("SOLVER.WARM_UP_ITERS", 5, "TRAIN.SNAPSHOT_ITERS", 1, "TRAIN.KEEP_CHECKPOINTS", 3),
)


def checkpoints(folder: Path) -> dict[int, Path]:
    return {int(p.stem.removeprefix("model_step")): p for p in folder.glob("ckpt/model_step*.pth")}


def test_twenty_kills_change_no_bit_of_the_final_weights(tmp_path):
    make_demo_data(tmp_path, num_train=4, num_val=1)
    context = fork_context()

    def start(name):
        process = context.Process(target=train_demo, args=(tmp_path, name, FLAGS, OPTIONS))
        process.start()
        return process

    whole = start("whole")
    whole.join()
    assert whole.exitcode == 0

    log = (tmp_path / "whole/log.jsonl").read_text().splitlines()
    step_seconds = json.loads(log[-1])["time"]

    rng = random.Random(0)
    folder, seen, killed = tmp_path / "killed", {}, 0
    for kill in range(KILLS):
        process = start("killed")
        # Every other time a new checkpoint is waited for, or nothing would ever be trained.
        before = max(checkpoints(folder), default=-1)
        goal = min(before + 1, STEPS - 4) if kill % 2 else before
        while process.is_alive() and max(checkpoints(folder), default=-1) < goal:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 1.5) * step_seconds)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        for step, path in checkpoints(folder).items():
            seen[step] = torch.load(path, weights_only=True)["step"]
    assert killed >= KILLS * 3 // 4
    last = start("killed")
    last.join()
    assert last.exitcode == 0
    assert all(step == inside for step, inside in seen.items())
    expected, got = (
        torch.load(checkpoints(f)[STEPS - 1], weights_only=True)
        for f in (tmp_path / "whole", folder)
    )
    assert expected["step"] == STEPS - 1
    for part in ("model", "optimizer", "rng", "sampler"):
        assert_equal(got[part], expected[part], part)


def assert_equal(left, right, name):
    if torch.is_tensor(left):
        assert torch.equal(left, right), name
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), name
        for key in left:
            assert_equal(left[key], right[key], f"{name}.{key}")
    elif isinstance(left, (list, tuple)):
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_equal(a, b, f"{name}[{index}]")
    else:
        assert left == right, name
