"""Reading image files as Detectron reads them."""

from __future__ import annotations

import os

import cv2
import numpy as np
import simplejpeg

from core.errors import UserError


def read_image(
    path: str | os.PathLike,
    size: tuple[int, int] | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decode an image file to uint8 BGR (H, W, 3), pixel for pixel as cv2.imread(IMREAD_COLOR).

    Grey and CMYK images become BGR, alpha is dropped, and an EXIF orientation is applied.
    size: the (height, width) that the annotations state; UserError if the file has another.
    out: uint8 (height, width, 3), contiguous, of that size: filled and returned.
    Raises UserError naming the file if it is missing or cannot be decoded.
    """
    data = read_file(path)
    image = decode_image(path, data, out)
    if image is None:
        raise UserError(
            f"image {os.fspath(path)} cannot be decoded ({len(data)} bytes); "
            "replace the file or leave it out"
        )
    if size is not None and image.shape[:2] != tuple(size):
        (h, w), (stated_h, stated_w) = image.shape[:2], size
        hint = " (its EXIF orientation turns it)" if (w, h) == (stated_h, stated_w) else ""
        raise UserError(
            f"image {os.fspath(path)} is {w} x {h} pixels{hint} but its annotations say "
            f"{stated_w} x {stated_h}; correct the annotations or replace the file"
        )
    return image


def read_file(path: str | os.PathLike) -> bytes:
    """An image file's content. Raises UserError naming the file."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise UserError(
            f"image {os.fspath(path)} does not exist; restore the file or correct its path"
        ) from error
    except OSError as error:
        raise UserError(f"image {os.fspath(path)} cannot be read ({error.strerror})") from error


def decode_image(
    path: str | os.PathLike, data: bytes, out: np.ndarray | None = None
) -> np.ndarray | None:
    """An image file, whose content is `data`, as `read_image` gives it; None if that fails.

    out: is filled and returned if the image has its size; otherwise its content is undefined.
    """
    # libjpeg-turbo, called directly, gives OpenCV's pixels in less time, and into memory that is
    # there already. OpenCV does what it has rules of its own for: orientation, CMYK, damage (of
    # which it forgives more in a file than in memory, hence the path).
    if data[:2] == b"\xff\xd8" and b"Exif\0\0" not in data:
        try:
            return simplejpeg.decode_jpeg(data, "BGR", buffer=out)
        except ValueError:
            pass
    if not data:
        return None
    image = cv2.imread(os.fspath(path), cv2.IMREAD_COLOR)
    if image is not None and out is not None and image.shape == out.shape:
        out[:] = image
        return out
    return image
