"""How many steps a training has and at which rates, counted in steps or in epochs."""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass

from core.config import cfg
from core.errors import UserError
from utils.lr_policy import learning_rate, schedule_from_solver


@dataclass(frozen=True)
class Schedule:
    """How many steps, at which rate, with how many between checkpoints, from which on."""

    max_iter: int
    learning_rate: functools.partial  # of utils.lr_policy.learning_rate: zero-based step -> rate
    snapshot_period: int
    start_step: int = 0


def schedule_by_steps(args: argparse.Namespace, batches_per_epoch: int) -> Schedule:
    """What the SOLVER group of the (adapted) config says."""
    return Schedule(
        max_iter=cfg.SOLVER.MAX_ITER,
        learning_rate=schedule_from_solver(cfg.SOLVER),
        snapshot_period=max(1, int(cfg.TRAIN.SNAPSHOT_ITERS / cfg.NUM_GPUS)),
        start_step=args.start_step,
    )


def schedule_by_epochs(args: argparse.Namespace, batches_per_epoch: int) -> Schedule:
    """What the flags of `tools/train_net.py` say; rate, decay and warm-up are the config's.

    A step has `iter_size` batches; batches that do not fill one belong to the next epoch.
    """
    steps = max(1, batches_per_epoch // args.iter_size)
    decays = sorted(args.lr_decay_epochs)
    if any(epoch < 1 for epoch in decays):
        raise UserError(f"--lr_decay_epochs must be 1 or more (epochs count from 0), not {decays}")
    solver = cfg.SOLVER
    return Schedule(
        max_iter=args.epochs * steps,
        learning_rate=functools.partial(
            learning_rate,
            policy="steps_with_decay",
            base_lr=solver.BASE_LR,
            gamma=solver.GAMMA,
            steps=[0, *(epoch * steps for epoch in decays)],
            warm_up_iters=solver.WARM_UP_ITERS,
            warm_up_factor=solver.WARM_UP_FACTOR,
            warm_up_method=solver.WARM_UP_METHOD,
        ),
        snapshot_period=-(-steps // args.ckpt_num_per_epoch),
        start_step=args.start_epoch * steps + args.start_iter,
    )
