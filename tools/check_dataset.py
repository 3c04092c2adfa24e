"""Say everything that is wrong with a data set, print its statistics, draw a page of samples.

Exit code: 0 if it can be trained on, 1 if there are errors, 2 if it cannot be found.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import cv2

import _init_paths  # noqa: F401  (puts lib/ on the path)
from core.errors import UserError, exit_on_user_error
from datasets.dataset_check import check_dataset, has_errors, report_lines, sample_page
from utils.logging import setup_logging
from utils.run_dir import make_folder
from utils.weights import atomic_write


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "--dataset",
        required=True,
        help="coco2017, another name, data.yaml, ANN.json:IMAGES or a folder of VOC's layout",
    )
    add("--output_dir", type=Path, help="write samples_SPLIT.png and report.json here")
    add("--samples", type=int, default=12, help="images of a page (default 12)")
    add("--nw", type=int, default=min(8, os.cpu_count() or 1), help="processes that read images")
    add("--no_images", action="store_true", help="look at the annotations only")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logging("check_dataset")
    for flag in ("samples", "nw"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} must be at least 1, not {getattr(args, flag)}")
    splits = check_dataset(args.dataset, 0 if args.no_images else args.nw)
    for check in splits:
        print("\n".join(report_lines(check)))
    if args.output_dir is not None:
        make_folder(args.output_dir)
        report = {
            check.name: {
                "statistics": check.statistics,
                "findings": [asdict(finding) for finding in check.findings.sorted()],
            }
            for check in splits
        }
        with atomic_write(args.output_dir / "report.json") as file:
            file.write(json.dumps(report, indent=2).encode())
        for check in splits:
            page = sample_page(check, args.samples)
            if page is not None:
                with atomic_write(args.output_dir / f"samples_{check.name}.png") as file:
                    file.write(cv2.imencode(".png", page)[1].tobytes())
        print(f"report.json and samples are in {args.output_dir}")
    return 1 if has_errors(splits) else 0


if __name__ == "__main__":
    sys.exit(main())
