"""The learning rate of a step, and the schedule of another batch size than the config's own.

`learning_rate` is SEMANTICS of Detectron: policy(step) times the warm-up factor.
"""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import UserError


def learning_rate(
    step: int,
    *,
    policy: str,
    base_lr: float,
    max_iter: int = 0,
    gamma: float = 0.1,
    step_size: int = 0,
    steps: Sequence[int] = (),
    lrs: Sequence[float] = (),
    warm_up_iters: int = 0,
    warm_up_factor: float = 1.0,
    warm_up_method: str = "linear",
) -> float:
    """Learning rate of the zero-based `step` (of weights; biases may learn at twice the rate).

    Args:
        policy: `step`, `steps_with_lrs`, `steps_with_decay`, `cosine_decay` (or
            `cosine`), `exp_decay` (or `exp`).
        steps: where `steps_with_*` change the rate; the first is 0.
        lrs: `steps_with_lrs`: the rate from each of `steps` on.
        warm_up_method: `constant` or `linear`, during the first `warm_up_iters` steps.
    """
    rate = _policy_rate(step, policy, base_lr, max_iter, gamma, step_size, steps, lrs)
    if step < warm_up_iters:
        factor = warm_up_factor
        if warm_up_method == "linear":
            alpha = step / warm_up_iters
            factor = warm_up_factor * (1 - alpha) + alpha
        rate *= factor
    return rate


def _policy_rate(
    step: int,
    policy: str,
    base_lr: float,
    max_iter: int,
    gamma: float,
    step_size: int,
    steps: Sequence[int],
    lrs: Sequence[float],
) -> float:
    if policy == "step":
        return base_lr * gamma ** (step // step_size)
    if policy in ("cosine", "cosine_decay"):
        return base_lr * (1 + math.cos(math.pi * step / max_iter)) / 2
    if policy in ("exp", "exp_decay"):
        return base_lr * gamma ** (step / max_iter)
    # Index of the last of `steps` that is reached.
    index = max(0, bisect.bisect_right(steps, step) - 1)
    return lrs[index] if policy == "steps_with_lrs" else base_lr * gamma**index


def schedule_from_solver(solver: Any) -> Callable[[int], float]:
    """`step -> learning rate` of a (checked) config's SOLVER group; later changes do not matter."""
    return functools.partial(
        learning_rate,
        policy=solver.LR_POLICY,
        base_lr=solver.BASE_LR,
        max_iter=solver.MAX_ITER,
        gamma=solver.GAMMA,
        step_size=solver.STEP_SIZE,
        steps=list(solver.STEPS),
        lrs=list(solver.LRS),
        warm_up_iters=solver.WARM_UP_ITERS,
        warm_up_factor=solver.WARM_UP_FACTOR,
        warm_up_method=solver.WARM_UP_METHOD,
    )


@dataclass(frozen=True)
class ScheduleChange:
    """One key that `adapt_schedule` set: its full name, value before and value after."""

    key: str
    old: Any
    new: Any


def adapt_schedule(
    cfg: Any,
    num_gpus: int,
    batch_size: int | None = None,
    iter_size: int = 1,
    scale_lr: bool = True,
) -> list[ScheduleChange]:
    """Fit the config's schedule to the GPUs, batch size and gradient accumulation in use.

    The learning rate scales with the batch size, the number of steps inversely with the effective
    batch size (batch_size * iter_size), so that as many images are seen. `cfg` is changed in place.

    Args:
        cfg: a config that is not frozen; its NUM_GPUS * TRAIN.IMS_PER_BATCH is the batch size
            that its SOLVER group was made for.
        num_gpus: GPUs in use (1 for the CPU).
        batch_size: images of all GPUs together; None: the config's own.
        iter_size: passes whose gradients are summed into one step.
        scale_lr: False leaves the SOLVER group alone (the mini-batch changes all the same).
    Returns:
        what was set, for `format_schedule_changes`.
    Raises:
        UserError: the batch size cannot be divided among the GPUs.
    """
    old_per_gpu, old_batch = cfg.TRAIN.IMS_PER_BATCH, cfg.NUM_GPUS * cfg.TRAIN.IMS_PER_BATCH
    batch_size = old_batch if batch_size is None else batch_size
    if iter_size < 1:
        raise UserError(f"--iter_size must be at least 1, not {iter_size}")
    if batch_size < 1 or batch_size % num_gpus:
        below = max(1, batch_size // num_gpus) * num_gpus
        raise UserError(
            f"--bs {batch_size} cannot be divided among {num_gpus} GPU(s): take a multiple of "
            f"{num_gpus}, such as {below}"
        )
    changes = []

    def change(group: Any, prefix: str, key: str, new: Any) -> None:
        changes.append(ScheduleChange(f"{prefix}{key}", group[key], new))
        group[key] = new

    change(cfg, "", "NUM_GPUS", num_gpus)
    change(cfg.TRAIN, "TRAIN.", "IMS_PER_BATCH", batch_size // num_gpus)
    if cfg.FPN.FPN_ON:
        # RPN proposals are collected over a GPU's whole mini-batch: keep as many an image.
        scale = cfg.TRAIN.IMS_PER_BATCH / old_per_gpu
        change(cfg.FPN, "FPN.", "RPN_COLLECT_SCALE", scale)
    if scale_lr:
        solver, factor = cfg.SOLVER, batch_size / old_batch
        change(solver, "SOLVER.", "BASE_LR", solver.BASE_LR * factor)
        change(solver, "SOLVER.", "LRS", [lr * factor for lr in solver.LRS])
        for key in ("STEPS", "STEP_SIZE", "MAX_ITER"):
            new = _scaled_steps(solver[key], old_batch, batch_size * iter_size)
            change(solver, "SOLVER.", key, new)
    return changes


def _scaled_steps(steps: Any, old_batch: int, new_batch: int) -> Any:
    if isinstance(steps, (list, tuple)):
        return [_scaled_steps(step, old_batch, new_batch) for step in steps]
    return int(steps * old_batch / new_batch + 0.5)


def format_schedule_changes(changes: Sequence[ScheduleChange]) -> str:
    """The changes as a small table of key, old and new value; unused keys are left out."""
    rows = [("", "config", "now")]
    rows += [(c.key, _shown(c.old), _shown(c.new)) for c in changes if c.old or c.new]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
