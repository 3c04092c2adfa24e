"""Export a trained detector to torch.export or ONNX, and compare it with the original."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import _init_paths  # noqa: F401  (puts lib/ on the path)
from core.errors import UserError, exit_on_user_error
from core.export import export_torch, load_exported
from core.export_parity import compare
from core.predictor import Predictor
from utils.device import pick_devices
from utils.image import read_image
from utils.image_sources import images_named
from utils.logging import setup_logging


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cfg", dest="cfg_file", required=True, help="config (YAML)")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--load_ckpt", help="checkpoint (.pth)")
    weights.add_argument("--load_detectron", help="Detectron weights (.pkl)")
    parser.add_argument("--dataset", help="whose classes: coco2017, data.yaml, ...")
    parser.add_argument(
        "--format",
        choices=("torch", "onnx"),
        default="torch",
        help="torch: whole programs (.pt2) for one device; onnx: backbone with RPN and heads",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("exported"))
    parser.add_argument(
        "--images",
        nargs="+",
        required=True,
        metavar="F",
        help="photographs on which both must find the same; best of several sizes",
    )
    parser.add_argument(
        "--set", dest="set_cfgs", nargs="+", default=[], metavar="K V", help="config options"
    )
    parser.add_argument("--device", help="cuda, cpu; default: cuda if there is any (onnx: cpu)")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logger = setup_logging(__name__)
    images = [read_image(path) for path in images_named(args.images, sys.stdin)]
    device = args.device or ("cpu" if args.format == "onnx" else None)
    predictor = Predictor(
        args.cfg_file,
        args.load_ckpt or args.load_detectron,
        args.dataset,
        device=pick_devices(device)[0],
        options=args.set_cfgs,
        detectron=bool(args.load_detectron),
    )
    export = export_torch
    if args.format == "onnx":
        try:
            from core.export_onnx import export_onnx as export
        except ImportError as error:
            raise UserError(
                f"--format onnx needs {error.name}: pip install onnx onnxruntime onnxscript"
            ) from error
    logger.info("exporting; this takes a minute")
    for file in export(predictor, args.output_dir):
        logger.info("%s (%.1f MB)", file, file.stat().st_size / 1e6)
    parity = compare(predictor, load_exported(args.output_dir, device=device), images)
    logger.info("parity: %s", parity)
    if not parity.good:
        raise UserError(
            f"the model exported to {args.output_dir} does not find what the original finds: do "
            "not use it, and try the other --format"
        )
    if not parity.detections:
        raise UserError("nothing was found in --images, so nothing was compared: choose others")
    return 0


if __name__ == "__main__":
    sys.exit(main())
