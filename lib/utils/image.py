"""Reading image files as Detectron reads them."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np

from core.errors import UserError


def read_image(path: str | os.PathLike, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image file to uint8 BGR (H, W, 3), pixel for pixel as cv2.imread(IMREAD_COLOR).

    Grey and CMYK images become BGR, alpha is dropped, and an EXIF orientation is applied.
    size: the (height, width) that the annotations state; UserError if the file has another.
    Raises UserError naming the file if it is missing or cannot be decoded.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):  # asked first: OpenCV would add a warning of its own
        raise UserError(f"image {path} does not exist; restore the file or correct its path")
    image = cv2.imread(path, cv2.IMREAD_COLOR)
    if image is None:
        raise UserError(
            f"image {path} cannot be decoded ({Path(path).stat().st_size} bytes); "
            "replace the file or remove it from the annotations"
        )
    if size is not None and image.shape[:2] != tuple(size):
        (h, w), (stated_h, stated_w) = image.shape[:2], size
        hint = " (its EXIF orientation turns it)" if (w, h) == (stated_h, stated_w) else ""
        raise UserError(
            f"image {path} is {w} x {h} pixels{hint} but its annotations say "
            f"{stated_w} x {stated_h}; correct the annotations or replace the file"
        )
    return image
