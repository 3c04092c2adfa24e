"""Draw the demo's data set: `python tools/make_demo_data.py --output_dir data/demo`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import _init_paths  # noqa: F401  (puts lib/ on the path)
from core.errors import UserError, exit_on_user_error
from datasets.demo_shapes import make_demo_data


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("data/demo"))
    parser.add_argument("--num_train", type=int, default=800, help="training images")
    parser.add_argument("--num_val", type=int, default=150, help="images to test on")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other images")
    return parser.parse_args()


@exit_on_user_error
def main() -> None:
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if min(args.num_train, args.num_val) < 1 or args.seed < 0:
        raise UserError("--num_train and --num_val must be at least 1 and --seed at least 0")
    try:
        path = make_demo_data(args.output_dir, args.num_train, args.num_val, args.seed)
    except OSError as error:
        raise UserError(
            f"cannot write the data set into {args.output_dir}: {error.strerror}"
        ) from error
    logging.info("Wrote %s, to be given as --dataset", path)


if __name__ == "__main__":
    raise SystemExit(main())
