"""What a training reports: smoothed losses and metrics, rates, times, memory.

Values stay on the device until a log line needs them: recording a step never waits for it.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import re
import resource
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.errors import UserError
from utils.progress import StepBar

logger = logging.getLogger(__name__)

# Steps over which a reported value is the median.
WINDOW = 20


class NonFiniteLossError(UserError):
    """A loss became infinite or NaN: the weights since then are worthless."""


@dataclass(frozen=True)
class _Recorded:
    step: int
    losses: tuple[str, ...]
    metrics: tuple[str, ...]
    values: torch.Tensor  # of the losses, then of the metrics; means over the ranks
    own: torch.Tensor  # this rank's
    image_ids: tuple[Any, ...]  # this rank's


class TrainingStats:
    """Collects the values of every step and reports them now and then.

    Args:
        max_iter: steps of the training, for the remaining time.
        folder: reports go to `log.jsonl` there too, one JSON object a line.
        tensorboard: write TensorBoard event files there as well.
        max_bad_steps: steps whose losses are not finite (and which changed no weight) that are
            put up with.
        gather: a value to the list of every rank's; every rank records and checks the same steps.
        quiet: no log lines (of the ranks above 0).
    """

    def __init__(
        self,
        max_iter: int,
        folder: Path | None = None,
        tensorboard: bool = False,
        *,
        max_bad_steps: int = 0,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
        quiet: bool = False,
    ) -> None:
        self.max_iter = max_iter
        self._max_bad_steps = max_bad_steps
        self._bad_steps = 0
        self._gather = gather
        self._quiet = quiet
        self._bar: StepBar | None = None
        self._json_path = folder and folder / "log.jsonl"
        self._tensorboard = None
        if folder is not None and tensorboard:
            from tensorboardX import SummaryWriter  # takes a second to import

            self._tensorboard = SummaryWriter(str(folder))
        self._pending: list[_Recorded] = []
        self._windows: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._step_times: deque[float] = deque(maxlen=WINDOW)
        self._data_seconds = 0.0
        self._steps = 0
        self._clock = time.perf_counter()

    def record(
        self,
        step: int,
        names: tuple[Sequence[str], Sequence[str]],
        values: torch.Tensor,
        own: torch.Tensor,
        image_ids: Sequence[Any],
        data_seconds: float,
    ) -> None:
        """Take in a finished step; nothing is awaited.

        Args:
            names: of the losses and of the metrics.
            values: theirs, one after the other, (n,) float32; means over the ranks.
            own: as `values`, of this rank alone.
            image_ids: this rank's images of the step, named when a loss is not finite.
            data_seconds: time the step has waited for its data.
        """
        self._pending.append(
            _Recorded(step, tuple(names[0]), tuple(names[1]), values, own, tuple(image_ids))
        )
        self._data_seconds += data_seconds
        self._steps += 1
        if not self._quiet:
            self._bar = self._bar or StepBar(self.max_iter, step)
            self._bar.advance()

    def check(self) -> None:
        """Fetch what was recorded (the only wait for the device).

        Raises:
            NonFiniteLossError: more steps than `max_bad_steps` had a loss that is not finite; names
                the loss, the step and its images.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        rows = torch.cat([r.values for r in pending]).cpu().split([len(r.values) for r in pending])
        for recorded, row in zip(pending, rows, strict=True):
            values = dict(zip(recorded.losses + recorded.metrics, row.tolist(), strict=True))
            losses = {name: values[name] for name in recorded.losses}
            if bad := [name for name, value in losses.items() if not math.isfinite(value)]:
                self._bad_step(recorded, bad[0], losses[bad[0]])
                continue
            total = {"loss": sum(losses.values())}
            for name, value in {**total, **_level_sums(values), **values}.items():
                self._windows[name].append(value)

    def _bad_step(self, recorded: _Recorded, name: str, value: float) -> None:
        own = recorded.own[: len(recorded.losses)]
        ids = [] if own.isfinite().all() else list(recorded.image_ids)
        images = ", ".join(str(i) for part in self._gather(ids) for i in part) or "not known"
        what = f"{name} is {value} at step {recorded.step} (images: {images})"
        self._bad_steps += 1
        if self._bad_steps > self._max_bad_steps:
            raise NonFiniteLossError(
                f"{what}: training stops and saves nothing more; lower the learning rate (--lr), "
                "lengthen SOLVER.WARM_UP_ITERS, look at these images' annotations, or let "
                f"TRAIN.MAX_BAD_STEPS ({self._max_bad_steps}) steps be left out"
            )
        logger.warning(
            "%s: the step is left out, %d of at most %d (TRAIN.MAX_BAD_STEPS)",
            what,
            self._bad_steps,
            self._max_bad_steps,
        )

    def report(self, step: int, lr: float) -> None:
        """Log one line for the steps since the last report; raises as `check` does."""
        self.check()
        now = time.perf_counter()
        steps = max(1, self._steps)
        self._step_times.append((now - self._clock) / steps)
        seconds = statistics.mean(self._step_times)
        values = {name: statistics.median(window) for name, window in self._windows.items()}
        entry = {
            "step": step,
            **values,
            "lr": lr,
            "eta_seconds": round(seconds * (self.max_iter - 1 - step)),
            "time": self._step_times[-1],
            "data_time": self._data_seconds / steps,
            "max_mem_mib": max_memory_mib(),
        }
        self._clock, self._data_seconds, self._steps = now, 0.0, 0
        if self._quiet:
            return
        logger.info(_line(entry, self.max_iter, list(values)))
        if self._bar is not None and "loss" in values:
            self._bar.show(loss=f"{values['loss']:.3f}", lr=f"{lr:.3g}")
        self._write(entry)

    def report_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the scores after a step: in the JSON lines and in TensorBoard."""
        self._write({"step": step, **metrics})

    def add_pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Put (H, W, 3) uint8 BGR pictures into TensorBoard, if there is one."""
        if self._tensorboard is not None:
            for name, picture in pictures.items():
                self._tensorboard.add_image(name, picture[..., ::-1], step, dataformats="HWC")

    @property
    def wants_pictures(self) -> bool:
        return self._tensorboard is not None

    def close(self) -> None:
        """End the progress line and the event file."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._json_path is not None:
            with self._json_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        if self._tensorboard is not None:
            for name, value in entry.items():
                if name != "step":
                    self._tensorboard.add_scalar(name, value, entry["step"])
            self._tensorboard.flush()

    def exclude(self, seconds: float) -> None:
        """Leave these last seconds (a checkpoint was written) out of the step times."""
        self._clock += seconds


def max_memory_mib() -> int:
    """Most memory used so far, in MiB: of the fullest GPU, without one of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        most = max(torch.cuda.max_memory_allocated(d) for d in range(torch.cuda.device_count()))
        return most >> 20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most >> (20 if sys.platform == "darwin" else 10)


def _level_sums(values: Mapping[str, float]) -> dict[str, float]:
    """`loss_x` for the losses `loss_x_fpn2`, `loss_x_fpn3`, ... of the pyramid's levels."""
    sums: dict[str, float] = defaultdict(float)
    for name, value in values.items():
        match = re.fullmatch(r"(.+)_fpn\d+", name)
        if match:
            sums[match[1]] += value
    return dict(sums)


def _line(entry: Mapping[str, Any], max_iter: int, names: Sequence[str]) -> str:
    parts = [f"step {entry['step'] + 1}/{max_iter}"]
    parts += [f"{name} {entry[name]:.4f}" for name in names]
    parts += [
        f"lr {entry['lr']:.6g}",
        f"eta {datetime.timedelta(seconds=entry['eta_seconds'])}",
        f"{entry['time']:.3f} s/step",
        f"data {entry['data_time']:.3f} s",
        f"memory {entry['max_mem_mib']} MiB",
    ]
    return " | ".join(parts)
