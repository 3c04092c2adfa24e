"""Detect objects in photographs or a video and draw what was found."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import _init_paths  # noqa: F401  (puts lib/ on the path)
from core.errors import UserError, exit_on_user_error
from core.infer_engine import (
    InferOptions,
    image_outputs,
    infer_images,
    infer_video,
    video_outputs,
)
from core.predictor import Predictor
from utils.device import pick_devices
from utils.image_sources import images_in, images_named
from utils.logging import setup_logging
from utils.run_dir import refuse_overwriting


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True, help="whose classes: coco2017, data.yaml, ...")
    parser.add_argument("--cfg", dest="cfg_file", required=True, help="config (YAML)")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--load_ckpt", help="checkpoint (.pth)")
    weights.add_argument("--load_detectron", help="Detectron weights: .pkl or zoo://CONFIG_STEM")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--image_dir", help="folder of images")
    source.add_argument(
        "--images",
        nargs="+",
        metavar="F",
        help="image files or patterns ('shots/*.jpg'); - reads names from standard input",
    )
    source.add_argument("--video", metavar="FILE", help="video file")
    source.add_argument("--camera", type=int, metavar="N", help="camera number; Ctrl-C ends it")
    parser.add_argument("--recursive", action="store_true", help="also folders in --image_dir")
    parser.add_argument("--output_dir", default="infer_outputs", help="where the pictures go")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="video to write (OUTPUT_DIR/<name>.mp4)"
    )
    parser.add_argument(
        "--set", dest="set_cfgs", nargs="+", default=[], metavar="K V", help="config options"
    )
    parser.add_argument("--format", choices=("pdf", "png", "jpg"), default="pdf")
    parser.add_argument(
        "--merge_pdfs",
        choices=("True", "False"),
        default="True",
        help="also put all PDF pages into results.pdf (default True)",
    )
    parser.add_argument("--json", action="store_true", help="write detections.json, COCO results")
    parser.add_argument("--html", action="store_true", help="write gallery.html, works offline")
    parser.add_argument("--thresh", type=float, default=0.7, help="lowest score to draw (0.7)")
    parser.add_argument("--kp_thresh", type=float, default=2.0, help="keypoint logit to draw (2)")
    parser.add_argument("--bs", type=int, default=4, metavar="N", help="images a pass (4)")
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="precision")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is any")
    parser.add_argument("--no_cuda", action="store_true", help="the same as --device cpu")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    film = args.video is not None or args.camera is not None
    if film and args.html:
        raise UserError("--html makes a gallery of images: leave it out for a video")
    if args.output and not film:
        raise UserError("--output names a video: images go to --output_dir")
    if args.recursive and not args.image_dir:
        raise UserError("--recursive is for --image_dir")


def files_named(args: argparse.Namespace) -> list[str]:
    """The files besides images that flags name to be read."""
    annotations = args.dataset.partition(":")[0]  # of ANN.json:IMAGES, or all of a file's name
    named = (args.video, args.cfg_file, args.load_ckpt, args.load_detectron, annotations)
    return [name for name in named if name]


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logger = setup_logging(__name__)
    check(args)
    images = None
    if args.image_dir:
        images = images_in(args.image_dir, args.recursive)
    elif args.images:
        images = images_named(args.images, sys.stdin)
    options = InferOptions(
        thresh=args.thresh,
        kp_thresh=args.kp_thresh,
        picture_format=args.format,
        merge=args.merge_pdfs == "True",
        json=args.json,
        html=args.html,
    )
    folder = Path(args.output_dir)
    name = Path(args.video).stem if args.video is not None else f"camera_{args.camera}"
    video = args.output or folder / f"{name}.mp4"
    if images is not None:
        outputs = image_outputs(images, folder, options)
    else:
        outputs = video_outputs(video, options)
    # Before the model is loaded: a slip in a path is known at once.
    refuse_overwriting(
        outputs,
        [*(images or []), *files_named(args)],
        "choose another --output_dir, or --output for a video",
    )
    predictor = Predictor(
        args.cfg_file,
        args.load_ckpt or args.load_detectron,
        args.dataset,
        device=pick_devices(args.device, args.no_cuda)[0],
        amp=args.amp,
        batch_size=args.bs,
        options=args.set_cfgs,
        detectron=bool(args.load_detectron),
    )
    if images is not None:
        problems = infer_images(predictor, images, folder, options)
        for problem in problems:
            logger.error("%s", problem)
        if problems:
            raise UserError(
                f"{len(problems)} of {len(images)} images could not be read, see above."
            )
        return 0
    source = args.video if args.camera is None else args.camera
    for problem in infer_video(predictor, source, video, options):
        raise UserError(problem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
