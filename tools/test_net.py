"""Test a trained network on a data set: detections, COCO results, average precision."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import _init_paths  # noqa: F401  (puts lib/ on the path)
from core.config import assert_and_infer_cfg, cfg, merge_cfg_from_file, merge_cfg_from_list
from core.errors import UserError, exit_on_user_error
from core.test_engine import run_inference
from datasets.dataset_catalog import resolve_dataset
from utils.device import pick_devices
from utils.logging import setup_logging
from utils.model_zoo import ZOO_PREFIX


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--dataset",
        required=True,
        help="coco2017, a catalog name, data.yaml, or ANNOTATIONS.json:IMAGE_DIR",
    )
    parser.add_argument("--cfg", dest="cfg_file", required=True, help="config (YAML)")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--load_ckpt", help="checkpoint (.pth) to test")
    weights.add_argument(
        "--load_detectron", help="Detectron weights to test: .pkl or zoo://CONFIG_STEM"
    )
    parser.add_argument(
        "--output_dir",
        help="where results go; default: test/ beside the folder that the weights are in",
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
    parser.add_argument("--vis", action="store_true", help="draw the detections (PDF) as well")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is any")
    parser.add_argument("--bs", type=int, default=1, help="images a forward pass (default 1)")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logging(__name__)
    if args.bs < 1:
        raise UserError(f"--bs {args.bs} is not a number of images: give 1 or more.")
    merge_cfg_from_file(args.cfg_file)
    merge_cfg_from_list(args.set_cfgs)
    dataset = resolve_dataset(args.dataset)
    if not dataset.test_names:
        raise UserError(f"--dataset {args.dataset} names no images to test on: add val: to it.")
    cfg.TEST.DATASETS = dataset.test_names
    cfg.MODEL.NUM_CLASSES = dataset.num_classes
    cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS = False
    assert_and_infer_cfg()

    args.device = pick_devices(args.device)[0]
    if args.output_dir is None:
        weights = args.load_ckpt or args.load_detectron
        args.output_dir = (
            Path(cfg.OUTPUT_DIR) / weights.removeprefix(ZOO_PREFIX) / "test"
            if weights.startswith(ZOO_PREFIX)
            else Path(weights).absolute().parent.parent / "test"
        )
    run_inference(args, ind_range=tuple(args.range) if args.range else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
