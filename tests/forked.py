"""Processes for tests, forked off one that has imported torch and the project."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

CONFIG = Path(__file__).resolve().parents[1] / "configs/demo/e2e_mask_rcnn_R-50-FPN_gn_demo.yaml"
# The demo's Mask R-CNN at its smallest.
SMALL = [
    *("TRAIN.SCALES", "(64,)", "TRAIN.MAX_SIZE", 96, "TEST.SCALE", 64, "TEST.MAX_SIZE", 96),
    *("FPN.DIM", 8, "MRCNN.DIM_REDUCED", 8, "FAST_RCNN.MLP_HEAD_DIM", 16),
    *("GROUP_NORM.NUM_GROUPS", 4, "RESNETS.STEM_OUT_CHANNELS", 8),
    *("RESNETS.RES2_OUT_CHANNELS", 16, "RESNETS.WIDTH_PER_GROUP", 4),
]


def fork_context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    # torch's optimizers import _dynamo, for seconds, when the first is made.
    context.set_forkserver_preload(["core.train_job", "torch._dynamo"])
    # The server takes no notice of sys.path when it imports those.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    multiprocessing.forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    return context


def start_ranks(
    world_size: int, run: Callable[..., None], *args: object
) -> list[ForkServerProcess]:
    """`run(*args)` in processes with the environment that torchrun would give them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = fork_context()
    processes = []
    for rank in range(world_size):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world_size,
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": port,
        }
        processes.append(context.Process(target=_as_rank, args=(environment, run, args)))
    for process in processes:
        process.start()
    return processes


def _as_rank(environment: dict[str, object], run: Callable[..., None], args: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in environment.items()})
    run(*args)


def exit_codes(processes: list[ForkServerProcess], seconds: float = 120) -> list[int | None]:
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]


def train_demo(folder: Path, output: str, flags: tuple = (), options: tuple = ()) -> None:
    """What `python tools/train_net_step.py` does with the data set demo.yaml in `folder`."""
    import torch

    import train_net_step

    torch.set_num_threads(1)
    os.chdir(folder)
    arguments = ["--dataset", "demo.yaml", "--cfg", CONFIG, "--output_dir", output, "--nw", 0]
    arguments += ["--no_lr_scaling", *flags, "--set", *SMALL, "DATA_DIR", folder, *options]
    raise SystemExit(train_net_step.main([str(a) for a in arguments]))
