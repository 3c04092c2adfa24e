"""Fetch trained models of Detectron's zoo by the names of their configs (`--list` shows all)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import _init_paths  # noqa: F401  (puts lib/ on the path)
from core.errors import UserError, exit_on_user_error
from utils.logging import setup_logging
from utils.model_zoo import ZooModel, fetch_model, models_dir, zoo_models

RESULTS = {"box_ap": "box AP", "mask_ap": "mask AP", "kp_ap": "kp AP", "prop_ar1000": "AR@1000"}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stems", nargs="*", metavar="CONFIG_STEM", help="e2e_mask_rcnn_R-50-FPN_1x")
    parser.add_argument("--list", action="store_true", help="show the models and their results")
    parser.add_argument("--output_dir", type=Path, help=f"default: {models_dir()}")
    return parser.parse_args(argv)


def table(models: dict[str, ZooModel]) -> str:
    """A line for each model: its name and the published results in percent."""
    width = max(map(len, models))
    lines = [" ".join([f"{'config':{width}}", *(f"{name:>8}" for name in RESULTS.values())])]
    for stem, model in models.items():
        values = (getattr(model, key) for key in RESULTS)
        lines.append(" ".join([f"{stem:{width}}", *(f"{v or '-':>8}" for v in values)]))
    return "\n".join(lines)


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.list:
        print(table(zoo_models()))
        return 0
    if not args.stems:
        raise UserError("name a config, such as e2e_mask_rcnn_R-50-FPN_1x, or give --list")
    setup_logging("download_model")
    for stem in args.stems:
        fetch_model(stem, args.output_dir or models_dir())
    return 0


if __name__ == "__main__":
    sys.exit(main())
