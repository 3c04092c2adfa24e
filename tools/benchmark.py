"""Measure how fast the parts of this project are on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import _init_paths  # noqa: F401  (puts lib/ on the path)
from core import benchmark_commands
from core.errors import UserError, exit_on_user_error
from core.train_engine import AMP_DTYPES
from utils.weights import atomic_write

MASK_RCNN = Path(__file__).resolve().parents[1] / "configs/baselines/e2e_mask_rcnn_R-50-FPN_1x.yaml"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ops = commands.add_parser("ops", help="the compiled operators beside torchvision's")
    ops.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is any")
    ops.set_defaults(run=benchmark_commands.run_ops)

    data = commands.add_parser("data", help="JPEG files to training batches beside torchvision's")
    data.add_argument("--dataset", required=True, help="a name, a YAML file or ANN.json:IMAGES")
    data.add_argument("--processes", type=int, nargs="+", help="default: 1, 2, 4 ... 16, as CPUs")
    data.add_argument("--images", type=int, default=1000, help="the data set repeated to as many")
    data.add_argument("--bs", type=int, default=16, help="images of a batch")
    data.set_defaults(run=benchmark_commands.run_data)

    memory = commands.add_parser("memory", help="what the loader's processes hold of annotations")
    memory.add_argument("--images", type=int, default=118_000)
    memory.add_argument("--objects", type=int, default=7, help="of an image")
    memory.add_argument("--processes", type=int, default=8)
    memory.add_argument("--epochs", type=int, default=2)
    memory.set_defaults(run=benchmark_commands.run_memory)

    test = commands.add_parser("test", help="a whole test, JPEG files to AP, and its parts")
    test.add_argument("--dataset", required=True, help="a name, a YAML file or ANN.json:IMAGES")
    test.add_argument("--cfg", default=MASK_RCNN, help="config; default: Mask R-CNN R-50-FPN")
    test.add_argument("--set", dest="set_cfgs", nargs="+", default=[], metavar="K V")
    test.add_argument("--images", type=int, default=1000, help="the data set repeated to as many")
    test.add_argument("--bs", type=int, default=8, help="images of a forward pass")
    test.add_argument("--amp", choices=tuple(AMP_DTYPES), default="off")
    test.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is any")
    test.set_defaults(run=benchmark_commands.run_test)

    scoring = commands.add_parser("eval", help="COCO's metrics beside pycocotools")
    scoring.add_argument("--dataset", required=True, help="a name, a YAML file or ANN.json:IMAGES")
    scoring.add_argument(
        "--images", type=int, default=5000, help="the data set repeated to as many"
    )
    scoring.set_defaults(run=benchmark_commands.run_eval)

    train = commands.add_parser("train", help="whole training steps beside the peers'")
    train.add_argument("--batches", type=int, nargs="+", default=[2, 8, 16], help="images a batch")
    train.add_argument("--amp", choices=tuple(AMP_DTYPES), nargs="+", default=["off", "bf16"])
    train.add_argument("--steps", type=int, default=40, help="measured, after some to warm up")
    train.add_argument(
        "--compile",
        action="store_true",
        help="also torchvision's with its backbone compiled; one size",
    )
    train.add_argument("--profile", action="store_true", help="our step's time by stage, operator")
    train.set_defaults(run=benchmark_commands.run_train)

    infer = commands.add_parser("infer", help="images to detections beside the peers'")
    infer.add_argument("--batches", type=int, nargs="+", help="images a batch; 1 8, on a CPU 1")
    infer.add_argument("--amp", choices=tuple(AMP_DTYPES), nargs="+", help="off bf16, on a CPU off")
    infer.add_argument("--rounds", type=int, help="over 4 batches each, on a CPU 1; 10, on a CPU 3")
    infer.set_defaults(run=benchmark_commands.run_infer)

    growth = commands.add_parser("growth", help="time and memory against the size of the work")
    for flag, what in (
        ("--sides", "pixels of the images' shorter side"),
        ("--objects", "ground truths an image"),
        ("--rois", "RoIs an image"),
        ("--batches", "images a batch"),
    ):
        growth.add_argument(flag, type=int, nargs="+", help=f"{what}; default: as the device suits")
    growth.add_argument("--amp", choices=tuple(AMP_DTYPES), help="default: bf16, on a CPU off")
    growth.add_argument("--steps", type=int, default=6, help="measured at each point")
    growth.add_argument("--plot", type=Path, help="also draw the series here (PNG)")
    growth.set_defaults(run=benchmark_commands.run_growth)
    for command in (train, infer, growth):
        command.add_argument("--cfg", default=MASK_RCNN, help="default: Mask R-CNN R-50-FPN")
        command.add_argument("--set", dest="set_cfgs", nargs="+", default=[], metavar="K V")
        command.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is any")
    for command in (ops, data, memory, test, scoring, train, infer, growth):
        command.add_argument("--output", type=Path, help="also write the results here (JSON)")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for flag in ("output", "plot"):
        file = getattr(args, flag, None)
        if file and not file.parent.is_dir():
            raise UserError(f"--{flag} {file}: there is no folder {file.parent}")
    report = args.run(args)
    if args.output:
        with atomic_write(args.output) as file:
            file.write(json.dumps(report, indent=2).encode())


if __name__ == "__main__":
    raise SystemExit(main())
