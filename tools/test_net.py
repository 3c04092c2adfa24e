"""Test a trained network on a data set: detections, average precision, report.html.

Exit codes: 0 tested; 1 tested, but not as EXPECTED_RESULTS; 2 bad input, said in a sentence; 143
ended by SIGTERM. The same command goes on with an interrupted test; torchrun's processes share it.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path

import _init_paths  # noqa: F401  (puts lib/ on the path)
import core.distributed as ranks
from core.config import (
    assert_and_infer_cfg,
    cfg,
    merge_cfg_from_cfg,
    merge_cfg_from_file,
    merge_cfg_from_list,
)
from core.errors import UserError, exit_on_user_error
from core.test_engine import Results, run_inference, score_detections
from core.test_report import write_reports
from core.test_results import stored_config
from core.train_engine import AMP_DTYPES
from datasets.dataset_catalog import resolve_dataset
from datasets.task_evaluation import check_expected_results, parse_expectation
from utils.device import pick_devices
from utils.logging import setup_logging
from utils.model_zoo import ZOO_PREFIX


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dataset",
        required=True,
        help="coco2017, a catalog name, data.yaml, or ANNOTATIONS.json:IMAGE_DIR",
    )
    parser.add_argument(
        "--cfg", dest="cfg_file", help="config (YAML); with --eval_only by default the file's own"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--load_ckpt", help="checkpoint (.pth) to test")
    source.add_argument("--load_detectron", help="Detectron weights: .pkl or zoo://CONFIG_STEM")
    source.add_argument(
        "--eval_only", metavar="FILE", help="score this detections.pkl, also one of Detectron's"
    )
    parser.add_argument(
        "--output_dir",
        help="where results go; default: test/ beside the folder that the weights are in, "
        "with --eval_only the file's folder",
    )
    parser.add_argument(
        "--set", dest="set_cfgs", nargs="+", default=[], metavar="K V", help="config options"
    )
    parser.add_argument(
        "--range",
        type=int,
        nargs=2,
        metavar=("START", "END"),
        help="test images START to END - 1 only and write a part file",
    )
    parser.add_argument(
        "--multi-gpu-testing",
        action="store_true",
        help="share the test among all GPUs, a process on each (on CPUs: NUM_GPUS processes)",
    )
    parser.add_argument("--vis", action="store_true", help="draw the detections (PDF) as well")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is any")
    parser.add_argument("--bs", type=int, default=1, help="images a forward pass (default 1)")
    amp = {"choices": tuple(AMP_DTYPES), "default": "off"}
    parser.add_argument("--amp", help="mixed precision (default off)", **amp)
    args = parser.parse_args(argv)
    if args.bs < 1:
        raise UserError(f"--bs {args.bs} is not a number of images: give 1 or more.")
    if not args.cfg_file and not args.eval_only:
        parser.error("the following arguments are required: --cfg")
    if args.range and args.multi_gpu_testing:
        raise UserError("--range is one part of a test, --multi-gpu-testing all: leave one out.")
    return args


def configure(args: argparse.Namespace) -> None:
    """Merge the config, in the order file, --set, data set, and freeze it."""
    if args.cfg_file:
        merge_cfg_from_file(args.cfg_file)
    else:
        merge_cfg_from_cfg(stored_config(args.eval_only))
    merge_cfg_from_list(args.set_cfgs)
    dataset = resolve_dataset(args.dataset)
    if not dataset.test_names:
        raise UserError(f"--dataset {args.dataset} names no images to test on: add val: to it.")
    cfg.TEST.DATASETS = dataset.test_names
    cfg.MODEL.NUM_CLASSES = dataset.num_classes
    cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS = False
    for entry in cfg.EXPECTED_RESULTS:
        parse_expectation(entry)  # a mistake in it is better said before the test than after
    assert_and_infer_cfg()


def exit_code(results: Results) -> int:
    """0, or 1 if results of a whole test differ from those that the config expects."""
    if not results:
        return 0
    tolerances = [cfg[f"EXPECTED_RESULTS_{key}"] for key in ("ATOL", "RTOL", "SIGMA_TOL")]
    return 1 if check_expected_results(results, cfg.EXPECTED_RESULTS, *tolerances) else 0


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    # As on Ctrl-C, what has been tested is kept.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    setup_logging(__name__)
    configure(args)
    if args.eval_only:
        folder = args.output_dir or Path(args.eval_only).absolute().parent
        results = score_detections(args.eval_only, folder)
        write_reports(results, folder, args.eval_only)
        return exit_code(results)
    if args.output_dir is None:
        weights = args.load_ckpt or args.load_detectron
        args.output_dir = (
            Path(cfg.OUTPUT_DIR) / weights.removeprefix(ZOO_PREFIX) / "test"
            if weights.startswith(ZOO_PREFIX)
            else Path(weights).absolute().parent.parent / "test"
        )
    launch = ranks.launch_from_environment()
    args.sharded = launch.world_size > 1
    devices = ranks.device_of(launch, pick_devices(args.device))
    args.device = devices[0]
    if args.multi_gpu_testing and not args.sharded:
        args.devices = devices if args.device.type == "cuda" else devices * cfg.NUM_GPUS
    if launch.rank > 0:
        logging.getLogger().setLevel(logging.WARNING)
    ranks.join(launch)
    results = run_inference(args, ind_range=tuple(args.range) if args.range else None)
    ranks.leave()
    if results:  # of a whole test, in its first process
        write_reports(results, args.output_dir)
    return exit_code(results)


if __name__ == "__main__":
    sys.exit(main())
