"""Fetch ImageNet weights to start training from: `-t resnet50_caffe.pth` (default: all)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import _init_paths  # noqa: F401  (puts lib/ on the path)
from core.errors import exit_on_user_error
from utils.download import download
from utils.logging import setup_logging
from utils.net import read_ckpt
from utils.weights import read_detectron_blobs

_DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
_DETECTRON = "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/"
URLS = {
    "resnet50_caffe.pth": _DRIVE + "1wHSvusQ1CiEMc5Nx5R8adqoHQjIDWXl1",
    "resnet101_caffe.pth": _DRIVE + "1x2fTMqLrn63EMW0VuK4GEa2eQKzvJ_7l",
    "resnet152_caffe.pth": _DRIVE + "1NSCycOb7pU0KzluH326zmyMFUU55JslF",
    "vgg16_caffe.pth": _DRIVE + "19UphT53C0Ua9JAtICnw84PPTa3sZZ_9k",
    "R-50.pkl": _DETECTRON + "MSRA/R-50.pkl",
    "R-101.pkl": _DETECTRON + "MSRA/R-101.pkl",
    "R-50-GN.pkl": _DETECTRON + "47261647/R-50-GN.pkl",
    "R-101-GN.pkl": _DETECTRON + "47592356/R-101-GN.pkl",
    "X-101-32x8d.pkl": _DETECTRON + "20171220/X-101-32x8d.pkl",
    "X-101-64x4d.pkl": _DETECTRON + "FBResNeXt/X-101-64x4d.pkl",
    "X-152-32x8d-IN5k.pkl": _DETECTRON + "25093814/X-152-32x8d-IN5k.pkl",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("data/pretrained_model"))
    parser.add_argument(
        "-t", "--targets", nargs="+", choices=list(URLS), default=list(URLS), metavar="NAME",
        help=f"files to fetch: {', '.join(URLS)}",
    )  # fmt: skip
    return parser.parse_args()


@exit_on_user_error
def main() -> int:
    args = parse_args()
    logger = setup_logging("download_imagenet_weights")
    for name in args.targets:
        path = args.output_dir / name
        if path.is_file():
            logger.info("%s is there already", path)
            continue
        verify = read_detectron_blobs if path.suffix == ".pkl" else read_ckpt
        download(URLS[name], path, verify)
        logger.info("saved %s", path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
