"""Videos through OpenCV: frames of a file or a camera, and files made of pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from core.errors import UserError
from utils.run_dir import make_folder

# What OpenCV's wheels can encode without further libraries.
CODECS = {".mp4": "mp4v", ".mov": "mp4v", ".avi": "MJPG", ".mkv": "mp4v", ".webm": "VP90"}
DEFAULT_FPS = 25.0


class VideoReader:
    """Frames (H, W, 3) uint8 BGR of a file or, by its number, of a camera; a context manager.

    fps: frames a second; frame_count: None if it is not known; size: (height, width).
    Raises UserError if it cannot be opened.
    """

    def __init__(self, source: str | Path | int) -> None:
        self.name = f"camera {source}" if isinstance(source, int) else f"video {source}"
        if not isinstance(source, int) and not Path(source).is_file():
            raise UserError(f"{self.name} does not exist: check the path.")
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        if not self._capture.isOpened():
            self._capture.release()
            advice = (
                "another program may use it, or there is none with this number"
                if isinstance(source, int)
                else "it is truncated, damaged or not a video"
            )
            raise UserError(f"{self.name} cannot be opened: {advice}.")
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.frame_count = int(count) if not isinstance(source, int) and count > 0 else None
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps <= 1000 else DEFAULT_FPS
        self.read = 0

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._capture.release()

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number, frame), from 0 until there are no more."""
        while True:
            good, frame = self._capture.read()
            if not good:
                return
            yield self.read, frame
            self.read += 1

    def missing(self) -> str:
        """After the last frame: a sentence about a file that ended early, '' if it did not."""
        # Some containers only estimate their number of frames.
        if self.frame_count is None or self.read >= 0.98 * self.frame_count - 1:
            return ""
        return (
            f"{self.name} ends after {self.read} of {self.frame_count} frames: it is truncated or "
            "damaged; the frames before that are done."
        )


class VideoWriter:
    """A video file of pictures (H, W, 3) uint8 BGR of one size, which takes its name when it is
    complete; a context manager.

    Raises:
        UserError: the file's suffix is no video's, or it cannot be written.
    """

    def __init__(self, path: str | Path, fps: float) -> None:
        self.path, self.fps = Path(path), fps
        if self.path.suffix.lower() not in CODECS:
            raise UserError(f"--output {path} is no video: end it in {', '.join(CODECS)}.")
        self._temporary = self.path.with_name(
            f".{self.path.stem}.tmp-{os.getpid()}{self.path.suffix}"
        )
        self._writer: cv2.VideoWriter | None = None

    def write(self, picture: np.ndarray) -> None:
        """Append a frame; the first one gives the size."""
        if self._writer is None:
            # Encoders store colour for 2 x 2 pixels together: both sides are even.
            height, width = (side // 2 * 2 for side in picture.shape[:2])
            self._size = height, width
            make_folder(self.path.parent)
            code = cv2.VideoWriter_fourcc(*CODECS[self.path.suffix.lower()])
            self._writer = cv2.VideoWriter(str(self._temporary), code, self.fps, (width, height))
            if not self._writer.isOpened():
                raise UserError(
                    f"--output {self.path} cannot be written as {width} x {height} video: check "
                    "that its folder can be written to, or choose another suffix."
                )
        height, width = self._size
        if picture.shape[0] < height or picture.shape[1] < width:
            raise ValueError(f"a frame of {picture.shape[:2]} in a video of {self._size}")
        self._writer.write(np.ascontiguousarray(picture[:height, :width]))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.release()
        # What a person interrupts is meant to be kept, as a camera has no end.
        if self._writer is not None and (kind is None or kind is KeyboardInterrupt):
            os.replace(self._temporary, self.path)
        else:
            self._temporary.unlink(missing_ok=True)
