"""What each sub-command of `tools/benchmark.py` does: measure, print a table, return the report."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from core import (
    benchmark_data,
    benchmark_detectron2,
    benchmark_eval,
    benchmark_gradients,
    benchmark_growth,
    benchmark_infer,
    benchmark_memory,
    benchmark_models,
    benchmark_stages,
    benchmark_test,
    benchmark_train,
)
from core.benchmark import REPEATS, WARM_UP, copy_bandwidth, describe, format_rows
from core.benchmark_ops import FULL, SMALL, ops_rows
from core.errors import UserError
from utils.device import pick_devices
from utils.progress import Progress

CPU_BATCHES = 1  # that `infer` detects in on a CPU
Peer = TypeVar("Peer")


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
    checks = []
    for check in benchmark_gradients.gradient_checks(device, cases):
        print(check)
        checks.append(check.as_dict())
    others = detectron2_peer(benchmark_detectron2.Detectron2Trainer)
    rates = list(benchmark_train.train_rates(device, cases, others))
    print(benchmark_models.format_rates(rates))
    stages = []
    if args.profile:
        trainer = benchmark_train.warm_trainer(device, cases)
        stages = benchmark_stages.stage_times(trainer)
        print(benchmark_stages.table(stages, device))
        print(benchmark_train.profile_steps(trainer))
    return {
        "environment": facts,
        "settings": asdict(cases),
        "gradients": checks,
        "rows": [r.as_dict() for r in rates],
        "stages": [asdict(stage) for stage in stages],
    }


def run_infer(args: argparse.Namespace) -> dict[str, Any]:
    device = pick_devices(args.device)[0]
    gpu = device.type == "cuda"
    usual = ([1, 8], ["off", "bf16"], 10) if gpu else ([1], ["off"], 3)
    batches, amp, rounds = (
        given if given is not None else value
        for given, value in zip((args.batches, args.amp, args.rounds), usual, strict=True)
    )
    if min(*batches, rounds - 1) < 1:
        raise UserError("--batches must be at least 1 and --rounds at least 2")
    benchmark_models.configure(args.cfg, args.set_cfgs)
    facts = print_facts(device)
    # An image takes seconds on a CPU, and the score threshold is sought on all that there are.
    different = benchmark_infer.BATCHES if gpu else CPU_BATCHES
    cases = benchmark_infer.InferCases(tuple(batches), tuple(amp), rounds, different)
    others = detectron2_peer(benchmark_detectron2.Detectron2Detector)
    rates = list(benchmark_infer.infer_rates(device, cases, others))
    print(benchmark_models.format_rates(rates))
    return {"environment": facts, "settings": asdict(cases), "rows": [r.as_dict() for r in rates]}


def run_growth(args: argparse.Namespace) -> dict[str, Any]:
    device = pick_devices(args.device)[0]
    gpu = device.type == "cuda"
    for name, on_gpu, on_cpu in (
        ("sides", (400, 600, 800, 1000, 1200), (200, 300, 400)),
        ("objects", (1, 7, 50, 200, 500), (1, 50, 500)),
        ("rois", (64, 128, 256, 512, 1024), (64, 256, 1024)),
        ("batches", (1, 2, 4, 8, 16, 32), (1, 2, 4)),
    ):
        if getattr(args, name) is None:
            setattr(args, name, on_gpu if gpu else on_cpu)
    values = {
        "side": tuple(args.sides),
        "objects": tuple(args.objects),
        "rois": tuple(args.rois),
        "batch": tuple(args.batches),
    }
    if min(min(numbers) for numbers in values.values()) < 1 or args.steps < 2:
        raise UserError("sizes and numbers must be at least 1 and --steps at least 2")
    base = benchmark_growth.Size() if gpu else benchmark_growth.Size(side=300, rois=256, batch=1)
    amp = args.amp or ("bf16" if gpu else "off")
    benchmark_models.configure(args.cfg, args.set_cfgs)
    facts = print_facts(device)
    cases = benchmark_growth.GrowthCases(base, values, amp, args.steps)
    series: dict[str, list[benchmark_growth.Point]] = {}
    with Progress(sum(map(len, values.values())), "measurements") as progress:
        for axis, point in benchmark_growth.growth(device, cases):
            series.setdefault(axis, []).append(point)
            progress.advance()
    print(benchmark_growth.table(series))
    if args.plot:
        title = f"{facts['device']}, {benchmark_models.PRECISIONS[amp]}"
        benchmark_growth.plot(series, args.plot, title)
    return {"environment": facts, **benchmark_growth.report(series, cases)}


def detectron2_peer(kind: type[Peer]) -> dict[str, type[Peer]]:
    """`kind` by its name in the tables; nothing where detectron2 has no such model or cannot be
    imported, which a line then says."""
    if benchmark_detectron2.zoo_file() is None:
        return {}
    try:
        benchmark_detectron2.load_detectron2()
    except Exception as error:  # one built for another torch raises more than ImportError
        print(f"detectron2 is not measured: {error}")
        return {}
    return {"detectron2": kind}


def require_positive(args: argparse.Namespace, *flags: str) -> None:
    for flag in flags:
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} must be at least 1, not {getattr(args, flag)}")


def print_facts(device: torch.device) -> dict[str, Any]:
    facts = describe(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    return facts
