"""Train a detector: `python tools/train_net_step.py --dataset coco2017 --cfg configs/....yaml`.

Exit codes: 0 trained; 2 bad input, said in a sentence; 128 + N stopped by signal N (SIGTERM,
SIGINT, SIGUSR1) after a checkpoint: --auto_resume goes on. Under torchrun or srun every process
runs this script.
"""

from __future__ import annotations

import argparse
import sys

import _init_paths  # noqa: F401  (puts lib/ on the path)
from core.errors import exit_on_user_error
from core.train_flags import training_parser
from core.train_job import run_training
from core.train_schedule import schedule_by_steps


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = training_parser(__doc__, disp_interval=20)
    parser.add_argument("--start_step", type=int, default=0, help="first step, zero-based")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    return run_training(parse_args(argv), schedule_by_steps)


if __name__ == "__main__":
    sys.exit(main())
