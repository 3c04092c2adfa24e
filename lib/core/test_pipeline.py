"""Image files to detections, with three things going on at once.

Worker processes decode the images to come, the model's device works on a batch, and threads paste
and encode the masks of the batches before.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from core.config import cfg
from core.errors import UserError
from core.test import (
    ClassBoxes,
    ClassKeyps,
    ClassSegms,
    Detections,
    class_results,
    detect_batch,
    network_size,
)
from utils.image import read_image

FINISHING_THREADS = 2
# Images whose masks may wait to be pasted; they hold device memory.
MOST_UNFINISHED = 32


@dataclass(frozen=True)
class FileResult:
    """What came of one file: either an image with its detections or an error."""

    index: int  # position in the list of files
    image: np.ndarray | None  # (H, W, 3) uint8 BGR
    cls_boxes: ClassBoxes | None
    cls_segms: ClassSegms | None
    cls_keyps: ClassKeyps | None = None
    error: UserError | None = None


class _ImageFiles(Dataset):
    """Decoded files. A worker returns an error as a value: raised, it would lose its sentence."""

    def __init__(
        self, paths: Sequence[str | Path], sizes: Sequence[tuple[int, int]] | None
    ) -> None:
        self.paths = [str(path) for path in paths]
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        size = None if self.sizes is None else self.sizes[index]
        try:
            return index, torch.from_numpy(read_image(self.paths[index], size)), ""
        except UserError as error:
            return index, None, str(error)


def detect_files(
    model: nn.Module,
    paths: Sequence[str | Path],
    sizes: Sequence[tuple[int, int]] | None = None,
    *,
    batch_size: int = 1,
    num_workers: int = 0,
) -> Iterator[FileResult]:
    """Detections of image files, in no particular order if batches hold several images.

    Args:
        model: `Generalized_RCNN` in eval mode.
        paths: the files.
        sizes: (height, width) of each, if known: images of equal padded size then share a batch,
            and a file of another size counts as unreadable.
        batch_size: images a forward pass at most; 1 without `sizes`.
        num_workers: processes that decode, at most one a CPU; 0 decodes in this one.

    Yields:
        one FileResult a file; those of unreadable files have an `error`.
    """
    loader = DataLoader(
        _ImageFiles(paths, sizes),
        batch_sampler=plan_batches(len(paths), sizes, batch_size),
        num_workers=min(num_workers, os.cpu_count() or 1),
        collate_fn=list,
        worker_init_fn=_quiet_worker,
    )
    waiting: deque[tuple[int, np.ndarray, Future]] = deque()
    with ThreadPoolExecutor(FINISHING_THREADS, "finish") as threads:
        for batch in loader:
            images = {index: image.numpy() for index, image, _ in batch if image is not None}
            for index, image, message in batch:
                if image is None:
                    yield FileResult(index, None, None, None, error=UserError(message))
            detections = detect_batch(model, list(images.values())) if images else []
            ready = _now(detections[0].boxes.device) if images else None
            for (index, image), found in zip(images.items(), detections, strict=True):
                future = threads.submit(_finish, found, cfg.MODEL.NUM_CLASSES, ready)
                waiting.append((index, image, future))
            while waiting and (len(waiting) > MOST_UNFINISHED or waiting[0][2].done()):
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())


def plan_batches(
    count: int, sizes: Sequence[tuple[int, int]] | None, batch_size: int
) -> list[list[int]]:
    """Indices 0 .. count - 1 in batches of images that enter the network with equal padded size."""
    if sizes is None or batch_size == 1:
        return [[i] for i in range(count)]
    alike = defaultdict(list)
    for i, size in enumerate(sizes):
        alike[network_size(*size)].append(i)
    return [
        group[start : start + batch_size]
        for group in alike.values()
        for start in range(0, len(group), batch_size)
    ]


def _quiet_worker(worker_id: int) -> None:
    # One process decodes one image; OpenCV's own threads would only compete with the others.
    cv2.setNumThreads(0)


def _now(device: torch.device) -> torch.cuda.Event | None:
    """The point that the device's queue has reached; None on the CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _finish(
    found: Detections, num_classes: int, ready: torch.cuda.Event | None
) -> tuple[ClassBoxes, ClassSegms | None, ClassKeyps | None]:
    if ready is None:
        return class_results(found, num_classes)
    # A stream of its own, or pasting would queue behind the next batch's forward pass.
    with torch.cuda.stream(torch.cuda.Stream(found.boxes.device)):
        torch.cuda.current_stream().wait_event(ready)
        return class_results(found, num_classes)


def _result(index: int, image: np.ndarray, future: Future) -> FileResult:
    return FileResult(index, image, *future.result())
