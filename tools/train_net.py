"""Train by epochs (deprecated: tools/train_net_step.py counts steps, as the configs do)."""

from __future__ import annotations

import argparse
import logging
import sys

import _init_paths  # noqa: F401  (puts lib/ on the path)
from core.errors import exit_on_user_error
from core.train_flags import training_parser
from core.train_job import run_training
from core.train_schedule import schedule_by_epochs
from utils.logging import setup_logging


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = training_parser(__doc__, disp_interval=100)
    add = parser.add_argument
    add("--epochs", type=int, default=6, help="passes over the training images")
    add("--lr_decay_epochs", type=int, nargs="*", default=[4, 5], help="decay when these begin")
    add("--ckpt_num_per_epoch", type=int, default=3, help="checkpoints in an epoch")
    add("--start_epoch", type=int, default=0, help="first epoch, zero-based")
    add("--start_iter", type=int, default=0, help="first step of that epoch, zero-based")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logging(__name__)
    logging.getLogger(__name__).warning("deprecated: tools/train_net_step.py counts steps")
    return run_training(args, schedule_by_epochs)


if __name__ == "__main__":
    sys.exit(main())
