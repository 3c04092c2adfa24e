"""Measure how fast the parts of this project are on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import _init_paths  # noqa: F401  (puts lib/ on the path)
from core.benchmark import REPEATS, WARM_UP, copy_bandwidth, describe, format_rows
from core.benchmark_ops import FULL, SMALL, ops_rows
from core.errors import UserError, exit_on_user_error
from utils.device import pick_devices
from utils.weights import atomic_write


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ops = commands.add_parser("ops", help="the compiled operators beside torchvision's")
    ops.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is any")
    ops.add_argument("--output", type=Path, help="also write the results here (JSON)")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = pick_devices(args.device)[0]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if args.output and not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: there is no folder {args.output.parent}")
    facts = describe(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    bandwidth = copy_bandwidth(device)
    print(f"memory bandwidth (copy, read + written): {bandwidth / 1e12:.3f} TB/s")
    print(f"median ms of {REPEATS[0]} to {REPEATS[1]} calls after {WARM_UP} to warm up")

    rows = list(ops_rows(device, FULL if device.type == "cuda" else SMALL))
    print(format_rows(rows, bandwidth))
    if args.output:
        report = {
            "environment": facts,
            "warm_up": WARM_UP,
            "copy_bandwidth_bytes_per_s": bandwidth,
            "rows": [row.as_dict(bandwidth) for row in rows],
        }
        with atomic_write(args.output) as file:
            file.write(json.dumps(report, indent=2).encode())


if __name__ == "__main__":
    raise SystemExit(main())
