"""Checkpoints of a training: written in the background, found again, continued exactly.

`lib/utils/net.py` says what a checkpoint holds for the model; here are the folder of a training's
checkpoints and the state of everything that is drawn at random.
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.errors import UserError
from nn.parallel.scatter import map_nested
from utils.net import read_ckpt
from utils.run_dir import make_folder
from utils.weights import atomic_write, save_torch_file

logger = logging.getLogger(__name__)

POINTER = "last_checkpoint"
BEST = "model_best.pth"
_NAME = re.compile(r"model_step(\d+)\.pth")


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"model_step{step}.pth"


def newest_good_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint of a folder and its content; None if there is none.

    A damaged one is named in a warning and passed over.
    """
    for path in _newest_first(folder):
        try:
            return path, read_training_checkpoint(path)
        except UserError as error:
            logger.warning("%s: trying the checkpoint before it", error)
    return None


def read_training_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint to resume from, every byte of it checked.

    Raises:
        UserError: it is damaged, or holds weights only.
    """
    content = read_ckpt(path)
    # torch does not compare the sums that it writes; files of before 1.6 have none.
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if (damaged := file.testzip()) is not None:
                raise UserError(f"{path} is damaged (in {damaged})")
    if not {"step", "optimizer"} <= content.keys():
        raise UserError(f"{path} holds weights only: leave out --resume to start anew")
    return content


def _newest_first(folder: Path) -> list[Path]:
    """Checkpoints, the newest first.

    The pointer names the last one written, but a kill may come between the file and its pointer.
    Files of later steps that are older than the pointer belong to a training that was given up.
    """
    steps = {p: int(m[1]) for p in folder.glob("*.pth") if (m := _NAME.fullmatch(p.name))}
    pointer = folder / POINTER
    if pointer.is_file() and (match := _NAME.fullmatch(pointer.read_text().strip())):
        last, written = int(match[1]), pointer.stat().st_mtime_ns
        steps = {p: s for p, s in steps.items() if s <= last or p.stat().st_mtime_ns >= written}
    return sorted(steps, key=lambda path: -steps[path])


def resume_position(
    checkpoint: Mapping[str, Any], batch_size: int, iter_size: int, adapt: bool
) -> tuple[int, int]:
    """First step, and batches of the whole sequence to leave out, of a training that goes on.

    Steps and batches of another size than the checkpoint's are converted, so that as many images
    count as seen; it is logged.

    Args:
        batch_size: images of a pass over all GPUs; iter_size: passes of a step.
        adapt: the schedule has been scaled to these; False: steps count as they did.
    """
    done = checkpoint["step"] + 1
    old_batch = checkpoint.get("batch_size", batch_size)
    old_iter = checkpoint.get("iter_size", iter_size)  # Detectron.pytorch does not say
    sampler = checkpoint.get("sampler", {"batches": done * old_iter, "batch_size": old_batch})
    first_batch = sampler["batches"] * sampler["batch_size"] // batch_size
    old, new = old_batch * old_iter, batch_size * iter_size
    if old == new:
        return done, first_batch
    step = int(done * old / new + 0.5) if adapt else done
    logger.warning(
        "the training to go on with took %d x %d images a step, now it is %d x %d: after %d of its "
        "steps this one begins at step %d%s",
        old_batch,
        old_iter,
        batch_size,
        iter_size,
        done,
        step,
        ", its schedule scaled alike" if adapt else " (--no_lr_scaling: steps count as before)",
    )
    return step, first_batch


class CheckpointWriter:
    """Writes the checkpoints of one training, at most one at a time, in a thread.

    A file takes its name when it is whole and on the disk; then the pointer, a text file with the
    name of the last one, follows; then older ones go.

    Args:
        folder: made when the first checkpoint is written.
        keep: checkpoints to keep (the best is one more); 0 keeps all.
    """

    def __init__(self, folder: Path, keep: int = 0) -> None:
        self.folder = folder
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None
        self._last_good: Path | None = None

    def save(self, content: Mapping[str, Any], best: bool = False) -> None:
        """Copy the content to the host and write it as `model_step{step}.pth`.

        Args:
            best: it becomes `model_best.pth` too.
        Raises:
            UserError: the writing before failed.
        """
        self.wait()
        snapshot = on_host(content)
        self._pending = self._thread.submit(self._write, snapshot, best)

    def check(self) -> None:
        """Raise UserError if a writing has failed; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on the disk; raise UserError if a writing has failed."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            self._last_good = pending.result()
        # torch hides an OSError of the file that it writes to.
        except (OSError, RuntimeError) as error:
            kept = f"{self._last_good} is the last good one" if self._last_good else "none is there"
            free = shutil.disk_usage(self.folder).free >> 20
            raise UserError(
                f"cannot write a checkpoint in {self.folder} ({_reason(error)}; {free} MiB free): "
                f"{kept}; make room and go on with --auto_resume"
            ) from error

    def close(self) -> None:
        """Wait for the thread, whatever has become of its writing."""
        self._thread.shutdown()

    def _write(self, content: dict[str, Any], best: bool) -> Path:
        make_folder(self.folder)
        for left_over in self.folder.glob(".model_*.tmp-*"):  # of a training that was killed
            left_over.unlink(missing_ok=True)
        path = checkpoint_path(self.folder, content["step"])
        if best:
            save_torch_file(content, self.folder / BEST)
            _link(self.folder / BEST, path)
        else:
            save_torch_file(content, path)
        with atomic_write(self.folder / POINTER) as file:
            file.write(f"{path.name}\n".encode())
        logger.info("saved %s%s", path, ", the best so far" if best else "")
        if self._keep:
            for old in _newest_first(self.folder)[self._keep :]:
                old.unlink(missing_ok=True)
        return path


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; a copy where the file system has no links."""
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        with atomic_write(target) as file, source.open("rb") as original:
            shutil.copyfileobj(original, file)
        return
    os.replace(temporary, target)


def _reason(error: BaseException) -> str:
    while isinstance(error, RuntimeError) and (error.__cause__ or error.__context__) is not None:
        error = error.__cause__ or error.__context__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())


def on_host(content: Any) -> Any:
    """A copy whose tensors are on the CPU and shared with nobody; one storage stays one."""
    copies: dict[tuple, torch.Tensor] = {}

    def copy(value: Any) -> Any:
        if not torch.is_tensor(value):
            return map_nested(copy, value)
        key = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if key not in copies or not value.numel():
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]

    return copy(content)


def random_state(devices: Sequence[torch.device]) -> dict[str, Any]:
    """What this process draws from: python, numpy, torch on the CPU and on its GPUs."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "cpu": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"],
    }


def restore_random_state(state: Mapping[str, Any], devices: Sequence[torch.device]) -> None:
    """Draw on from where `random_state` was taken."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    gpus = [d for d in devices if d.type == "cuda"]
    if len(gpus) == len(state["cuda"]):
        for device, numbers in zip(gpus, state["cuda"], strict=True):
            torch.cuda.set_rng_state(numbers, device)
