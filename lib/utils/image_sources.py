"""Images that a person wants looked at: folders, lists, patterns; read ahead in threads."""

from __future__ import annotations

import glob
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from core.errors import UserError
from utils.image import read_image
from utils.threads import map_ahead

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
# The network sees about 1,333 pixels; far larger images only take memory, or are an attack.
MAX_SIDE, MAX_PIXELS = 20_000, 150_000_000

T = TypeVar("T")


def images_in(folder: str | Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder (and the folders below it), by name.

    Raises UserError if it is no folder or holds none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--image_dir {folder} is not a folder: check the path.")
    entries = folder.rglob("*") if recursive else folder.iterdir()
    found = sorted(file for file in entries if file.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        advice = "" if recursive else "; --recursive also looks into the folders below it"
        raise UserError(f"--image_dir {folder} holds no images ({kinds}){advice}.")
    return found


def images_named(names: Sequence[str], stdin: TextIO) -> list[Path]:
    """Files by name or pattern (`shots/*.jpg`, `**/*.png`); `-` stands for a list, a name a line,
    on standard input. Raises UserError for a pattern or list without any."""
    found: list[Path] = []
    for name in names:
        if name == "-":
            listed = [Path(line.strip()) for line in stdin if line.strip()]
            if not listed:
                raise UserError("--images - reads names of files, one a line, but there are none.")
            found += listed
        elif glob.has_magic(name) and not os.path.exists(name):
            matches = sorted(Path(match) for match in glob.glob(name, recursive=True))
            matches = [match for match in matches if match.is_file()]
            if not matches:
                raise UserError(f"--images {name} matches no file: check the pattern.")
            found += matches
        else:
            found.append(Path(name))
    return found


def refuse_giant(
    image: str | Path | BinaryIO, name: str, formats: Sequence[str] | None = None
) -> bool:
    """Look at an image's header, before any pixel is decoded.

    Args:
        image: a file; formats: those that Pillow may take it for.
        name: for messages.
    Returns:
        False if Pillow does not know such a file.
    Raises:
        UserError: the image is larger than MAX_SIDE or MAX_PIXELS.
    """
    try:
        with Image.open(image, formats=formats) as header:
            width, height = header.size
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large to be decoded: {_advice()}") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return False
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise UserError(f"{name} is {width} x {height} pixels: {_advice()}")
    return True


def _advice() -> str:
    return (
        f"images have at most {MAX_SIDE:,} pixels a side and {MAX_PIXELS:,} in all; shrink it or "
        "cut it into tiles"
    )


def read_photos(
    paths: Sequence[Path], threads: int
) -> Iterator[tuple[int, np.ndarray | UserError]]:
    """(index, image (H, W, 3) uint8 BGR or why it cannot be read) of each file, in their order.

    threads: how many files are decoded at once, ahead of what is asked for.
    """

    def read(path: Path) -> np.ndarray | UserError:
        try:
            refuse_giant(path, f"image {path}")
            return read_image(path)
        except UserError as error:
            return error

    return enumerate(map_ahead(read, paths, max(1, threads)))


def read_ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The same items, made by a thread that is at most `count` ahead; its errors are raised."""
    ready: queue.Queue = queue.Queue(max(1, count))
    stop = threading.Event()
    end = object()

    def put(entry: object) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))

    thread = threading.Thread(target=work, name="read ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join()
