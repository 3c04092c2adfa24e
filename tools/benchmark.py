"""Measure how fast the parts of this project are on this machine."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import _init_paths  # noqa: F401  (puts lib/ on the path)
from core import (
    benchmark_data,
    benchmark_eval,
    benchmark_infer,
    benchmark_memory,
    benchmark_models,
    benchmark_test,
    benchmark_train,
)
from core.benchmark import REPEATS, WARM_UP, copy_bandwidth, describe, format_rows
from core.benchmark_ops import FULL, SMALL, ops_rows
from core.errors import UserError, exit_on_user_error
from core.train_engine import AMP_DTYPES
from utils.device import pick_devices
from utils.progress import Progress
from utils.weights import atomic_write

MASK_RCNN = Path(__file__).resolve().parents[1] / "configs/baselines/e2e_mask_rcnn_R-50-FPN_1x.yaml"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ops = commands.add_parser("ops", help="the compiled operators beside torchvision's")
    ops.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is any")
    ops.set_defaults(run=run_ops)

    data = commands.add_parser("data", help="JPEG files to training batches beside torchvision's")
    data.add_argument("--dataset", required=True, help="a name, a YAML file or ANN.json:IMAGES")
    data.add_argument("--processes", type=int, nargs="+", help="default: 1, 2, 4 ... 16, as CPUs")
    data.add_argument("--images", type=int, default=1000, help="the data set repeated to as many")
    data.add_argument("--bs", type=int, default=16, help="images of a batch")
    data.set_defaults(run=run_data)

    memory = commands.add_parser("memory", help="what the loader's processes hold of annotations")
    memory.add_argument("--images", type=int, default=118_000)
    memory.add_argument("--objects", type=int, default=7, help="of an image")
    memory.add_argument("--processes", type=int, default=8)
    memory.add_argument("--epochs", type=int, default=2)
    memory.set_defaults(run=run_memory)

    test = commands.add_parser("test", help="a whole test, JPEG files to AP, and its parts")
    test.add_argument("--dataset", required=True, help="a name, a YAML file or ANN.json:IMAGES")
    test.add_argument("--cfg", default=MASK_RCNN, help="config; default: Mask R-CNN R-50-FPN")
    test.add_argument("--set", dest="set_cfgs", nargs="+", default=[], metavar="K V")
    test.add_argument("--images", type=int, default=1000, help="the data set repeated to as many")
    test.add_argument("--bs", type=int, default=8, help="images of a forward pass")
    test.add_argument("--amp", choices=tuple(AMP_DTYPES), default="off")
    test.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is any")
    test.set_defaults(run=run_test)

    scoring = commands.add_parser("eval", help="COCO's metrics beside pycocotools")
    scoring.add_argument("--dataset", required=True, help="a name, a YAML file or ANN.json:IMAGES")
    scoring.add_argument(
        "--images", type=int, default=5000, help="the data set repeated to as many"
    )
    scoring.set_defaults(run=run_eval)

    train = commands.add_parser("train", help="whole training steps beside torchvision's")
    train.add_argument("--batches", type=int, nargs="+", default=[2, 8, 16], help="images a batch")
    train.add_argument("--amp", choices=tuple(AMP_DTYPES), nargs="+", default=["off", "bf16"])
    train.add_argument("--steps", type=int, default=40, help="measured, after some to warm up")
    train.add_argument("--compile", action="store_true", help="torch.compile, torchvision's too")
    train.add_argument("--profile", action="store_true", help="also where our step's time goes")
    train.set_defaults(run=run_train)

    infer = commands.add_parser("infer", help="images to detections beside torchvision's")
    infer.add_argument("--batches", type=int, nargs="+", help="images a batch; 1 8, on a CPU 1")
    infer.add_argument("--amp", choices=tuple(AMP_DTYPES), nargs="+", help="off bf16, on a CPU off")
    infer.add_argument("--rounds", type=int, help="over 4 batches each; 10, on a CPU 3")
    infer.set_defaults(run=run_infer)
    for command in (train, infer):
        command.add_argument("--cfg", default=MASK_RCNN, help="default: Mask R-CNN R-50-FPN")
        command.add_argument("--set", dest="set_cfgs", nargs="+", default=[], metavar="K V")
        command.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is any")
    for command in (ops, data, memory, test, scoring, train, infer):
        command.add_argument("--output", type=Path, help="also write the results here (JSON)")
    return parser.parse_args(argv)


def run_ops(args: argparse.Namespace) -> dict[str, Any]:
    device = pick_devices(args.device)[0]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    facts = print_facts(device)
    bandwidth = copy_bandwidth(device)
    print(f"memory bandwidth (copy, read + written): {bandwidth / 1e12:.3f} TB/s")
    print(f"median ms of {REPEATS[0]} to {REPEATS[1]} calls after {WARM_UP} to warm up")
    rows = list(ops_rows(device, FULL if device.type == "cuda" else SMALL))
    print(format_rows(rows, bandwidth))
    return {
        "environment": facts,
        "warm_up": WARM_UP,
        "copy_bandwidth_bytes_per_s": bandwidth,
        "rows": [row.as_dict(bandwidth) for row in rows],
    }


def run_data(args: argparse.Namespace) -> dict[str, Any]:
    require_positive(args, "images", "bs")
    processes = tuple(args.processes or benchmark_data.default_processes())
    if min(processes) < 1:
        raise UserError(f"--processes must be at least 1, not {min(processes)}")
    settings = benchmark_data.DataSettings(processes, args.images, args.bs)
    facts = print_facts(pick_devices(None)[0])
    roidb = benchmark_data.configure(args.dataset, settings)
    print(f"median ms of an image (collate, pin: of a batch), {len(roidb)} images in turn")
    rows = list(benchmark_data.stage_rows(roidb, settings))
    print(format_rows(rows, 1.0))
    with Progress(len(processes), "measurements") as progress:
        rates = []
        for number in processes:
            rates.append(benchmark_data.rate(roidb, settings, number))
            progress.advance()
    print(benchmark_data.format_rates(rates))
    return {"environment": facts, **benchmark_data.report(rows, rates, settings)}


def run_memory(args: argparse.Namespace) -> dict[str, Any]:
    require_positive(args, "images", "objects", "processes", "epochs")
    settings = benchmark_memory.MemorySettings(
        args.images, args.objects, args.processes, args.epochs
    )
    report = benchmark_memory.measure_memory(settings, print)
    print("\n".join(benchmark_memory.report_lines(report)))
    return {"environment": describe(torch.device("cpu")), **report}


def run_test(args: argparse.Namespace) -> dict[str, Any]:
    require_positive(args, "images", "bs")
    name = benchmark_test.configure(args.dataset, args.cfg, args.set_cfgs)
    device = pick_devices(args.device)[0]
    facts = print_facts(device)
    found = benchmark_test.benchmark_test(
        name, device, num_images=args.images, batch_size=args.bs, amp=args.amp
    )
    print(found.table())
    return {"environment": facts, **found.as_dict()}


def run_eval(args: argparse.Namespace) -> dict[str, Any]:
    require_positive(args, "images")
    facts = print_facts(torch.device("cpu"))
    times = list(benchmark_eval.measure(args.dataset, args.images))
    print(benchmark_eval.table(times))
    return {"environment": facts, "images": args.images, "rows": [t.as_dict() for t in times]}


def run_train(args: argparse.Namespace) -> dict[str, Any]:
    if min(*args.batches, args.steps - 1) < 1:
        raise UserError("--batches must be at least 1 and --steps at least 2")
    benchmark_models.configure(args.cfg, args.set_cfgs)
    device = pick_devices(args.device)[0]
    facts = print_facts(device)
    cases = benchmark_train.TrainCases(
        tuple(args.batches), tuple(args.amp), args.compile, args.steps
    )
    rates = list(benchmark_train.train_rates(device, cases))
    print(benchmark_models.format_rates(rates))
    if args.profile:
        print(benchmark_train.profile_steps(device, cases))
    return {"environment": facts, "settings": asdict(cases), "rows": [r.as_dict() for r in rates]}


def run_infer(args: argparse.Namespace) -> dict[str, Any]:
    device = pick_devices(args.device)[0]
    usual = ([1, 8], ["off", "bf16"], 10) if device.type == "cuda" else ([1], ["off"], 3)
    batches, amp, rounds = (
        given if given is not None else value
        for given, value in zip((args.batches, args.amp, args.rounds), usual, strict=True)
    )
    if min(*batches, rounds - 1) < 1:
        raise UserError("--batches must be at least 1 and --rounds at least 2")
    benchmark_models.configure(args.cfg, args.set_cfgs)
    facts = print_facts(device)
    cases = benchmark_infer.InferCases(tuple(batches), tuple(amp), rounds)
    rates = list(benchmark_infer.infer_rates(device, cases))
    print(benchmark_models.format_rates(rates))
    return {"environment": facts, "settings": asdict(cases), "rows": [r.as_dict() for r in rates]}


def require_positive(args: argparse.Namespace, *flags: str) -> None:
    for flag in flags:
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} must be at least 1, not {getattr(args, flag)}")


def print_facts(device: torch.device) -> dict[str, Any]:
    facts = describe(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    return facts


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.output and not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: there is no folder {args.output.parent}")
    report = args.run(args)
    if args.output:
        with atomic_write(args.output) as file:
            file.write(json.dumps(report, indent=2).encode())


if __name__ == "__main__":
    raise SystemExit(main())
