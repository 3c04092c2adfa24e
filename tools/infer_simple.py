"""Detect objects in photographs and draw what was found."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import _init_paths  # noqa: F401  (puts lib/ on the path)
from core.config import assert_and_infer_cfg, cfg, merge_cfg_from_file, merge_cfg_from_list
from core.errors import UserError, exit_on_user_error
from core.test_engine import initialize_model_from_cfg
from core.test_pipeline import detect_files
from datasets.dataset_catalog import resolve_class_names
from utils.device import pick_devices
from utils.logging import setup_logging
from utils.progress import Progress
from utils.run_dir import make_folder
from utils.vis import picture_names, vis_one_image
from utils.vis_pdf import merge_pdfs

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
MERGED = "results.pdf"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True, help="whose classes: coco2017, data.yaml, ...")
    parser.add_argument("--cfg", dest="cfg_file", required=True, help="config (YAML)")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--load_ckpt", help="checkpoint (.pth)")
    weights.add_argument("--load_detectron", help="Detectron weights (.pkl)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--image_dir", help="folder of images")
    source.add_argument("--images", nargs="+", metavar="F", help="image files")
    parser.add_argument("--output_dir", default="infer_outputs", help="where the pictures go")
    parser.add_argument(
        "--set", dest="set_cfgs", nargs="+", default=[], metavar="K V", help="config options"
    )
    parser.add_argument("--format", choices=("pdf", "png", "jpg"), default="pdf")
    parser.add_argument(
        "--merge_pdfs",
        choices=("True", "False"),
        default="True",
        help=f"also put all PDF pages into {MERGED} (default True)",
    )
    parser.add_argument("--thresh", type=float, default=0.7, help="lowest score to draw (0.7)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is any")
    parser.add_argument("--no_cuda", action="store_true", help="the same as --device cpu")
    return parser.parse_args(argv)


def find_images(args: argparse.Namespace) -> list[Path]:
    """The files that the command line names. Raises UserError if there are none."""
    if args.images:
        return [Path(file) for file in args.images]
    folder = Path(args.image_dir)
    if not folder.is_dir():
        raise UserError(f"--image_dir {folder} is not a folder: check the path.")
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"--image_dir {folder} holds no images ({kinds}).")
    return found


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logger = setup_logging(__name__)
    images = find_images(args)
    merge_cfg_from_file(args.cfg_file)
    merge_cfg_from_list(args.set_cfgs)
    class_names = resolve_class_names(args.dataset)
    cfg.MODEL.NUM_CLASSES = len(class_names)
    cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS = False
    assert_and_infer_cfg()
    args.device = pick_devices(args.device, args.no_cuda)[0]
    model = initialize_model_from_cfg(args)

    folder = make_folder(args.output_dir)
    names = picture_names(images, args.format, taken={MERGED})
    unreadable, drawn = [], []
    workers = min(cfg.DATA_LOADER.NUM_THREADS, len(images) - 1)
    with Progress(len(images)) as progress:
        for found in detect_files(model, images, num_workers=workers):
            if found.error is None:
                vis_one_image(
                    found.image,
                    folder / names[found.index],
                    found.cls_boxes,
                    found.cls_segms,
                    found.cls_keyps,
                    class_names=class_names,
                    thresh=args.thresh,
                )
                drawn.append(found.index)
            else:
                unreadable.append(found.error)
            progress.advance()
    if not drawn:
        raise UserError(f"none of the images can be read; the first: {unreadable[0]}")
    if args.format == "pdf" and args.merge_pdfs == "True":
        merge_pdfs([folder / names[index] for index in sorted(drawn)], folder / MERGED)
    logger.info("%d pictures in %s", len(images) - len(unreadable), folder.resolve())
    for error in unreadable:
        logger.error("%s", error)
    if unreadable:
        raise UserError(f"{len(unreadable)} of {len(images)} images could not be read, see above.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
