"""Write a model's weights for others: Detectron's `.pkl`, `.safetensors`, or a bare `.pth`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import _init_paths  # noqa: F401  (puts lib/ on the path)
from core.config import assert_and_infer_cfg, cfg, merge_cfg_from_file, merge_cfg_from_list
from core.errors import UserError, exit_on_user_error
from core.test_engine import initialize_model_from_cfg
from utils.class_count import count_classes
from utils.logging import setup_logging
from utils.model_zoo import local_weights
from utils.run_dir import make_folder
from utils.weight_export import FORMATS, export_weights


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help=f"file to write; {', '.join(FORMATS)} says how")
    parser.add_argument("--cfg", dest="cfg_file", required=True, help="config of the model (YAML)")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--load_ckpt", help="checkpoint (.pth or .safetensors)")
    weights.add_argument("--load_detectron", help="Detectron weights: .pkl or zoo://CONFIG_STEM")
    parser.add_argument(
        "--set", dest="set_cfgs", nargs="+", default=[], metavar="K V", help="config options"
    )
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logger = setup_logging("export_weights")
    if args.output.suffix not in FORMATS:
        raise UserError(f"{args.output} must end in one of {', '.join(FORMATS)}")
    merge_cfg_from_file(args.cfg_file)
    merge_cfg_from_list(args.set_cfgs)
    if args.load_detectron:
        args.load_detectron = str(local_weights(args.load_detectron))
    if not cfg.MODEL.RPN_ONLY:
        cfg.MODEL.NUM_CLASSES = count_classes(args.load_ckpt or args.load_detectron)
    cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS = False
    assert_and_infer_cfg()
    args.device = "cpu"
    model = initialize_model_from_cfg(args)
    make_folder(args.output.parent)
    export_weights(model, args.output, cfg)
    logger.info("wrote %s", args.output.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
