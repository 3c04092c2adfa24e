"""Image files to detections, with three things going on at once.

Threads decode the images to come, the model's device works on a batch, and other threads paste and
encode the masks of the batches before. Not processes: decoders let go of Python's lock, and
a process takes the longer to start the more memory it is to share.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from core.config import cfg
from core.errors import UserError
from core.test import (
    ClassBoxes,
    ClassKeyps,
    ClassSegms,
    Detections,
    class_results,
    network_size,
    queue_batch,
)
from core.test_augment import Pairs
from core.train_engine import AMP_DTYPES
from utils.blob import Placed, pack_images
from utils.image import read_image
from utils.streams import next_stream_for
from utils.threads import map_ahead

T = TypeVar("T")
Done = TypeVar("Done")

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


class DecodedBatch(NamedTuple):
    """The images of a batch, back to back; what cannot be read has a sentence instead."""

    indices: list[int]
    pixels: Tensor  # (B,) uint8
    places: list[Placed]
    errors: list[tuple[int, str]]

    def images(self) -> list[np.ndarray]:
        pixels = self.pixels.numpy()
        return [
            pixels[p.offset : p.offset + 3 * p.height * p.width].reshape(p.height, p.width, 3)
            for p in self.places
        ]


def _read(path: str, size: tuple[int, int] | None) -> np.ndarray | str:
    """The image, or why there is none: raised, an error would end the images beside it."""
    try:
        return read_image(path, size)
    except UserError as error:
        return str(error)


def _packed(
    indices: Sequence[int], decoded: Iterable[np.ndarray | str], pinned: bool
) -> DecodedBatch:
    """A batch of what _read gives of the files with these indices."""
    found = dict(zip(indices, decoded, strict=True))
    errors = [(index, text) for index, text in found.items() if isinstance(text, str)]
    images = {index: image for index, image in found.items() if not isinstance(image, str)}
    if not images:
        return DecodedBatch([], torch.empty(0, dtype=torch.uint8), [], errors)
    return DecodedBatch([*images], *pack_images([*images.values()], pinned), errors)


def detect_files(
    model: nn.Module,
    paths: Sequence[str | Path],
    sizes: Sequence[tuple[int, int]] | None = None,
    *,
    batch_size: int = 1,
    num_workers: int = 0,
    amp: str = "off",
    left_right: Pairs | None = None,
    proposals: Sequence[np.ndarray] | None = None,
    stages: Stages | None = None,
) -> Iterator[FileResult]:
    """Detections of image files, in no particular order if batches hold several images.

    Args:
        model: `Generalized_RCNN` in eval mode.
        paths: the files.
        sizes: (height, width) of each, if known: images of equal padded size then share a batch,
            and a file of another size counts as unreadable.
        batch_size: images a forward pass at most; 1 without `sizes`.
        num_workers: threads that decode, at most one a CPU; 0 decodes in this one.
        amp: `off`, `bf16` or `fp16`: precision of the network.
        left_right: as for `core.test.detect_batch`.
        proposals: (P, 4) boxes of each file, in its pixels, for a model without an RPN.
        stages: is told how long this thread waits for what.

    Yields:
        one FileResult a file; those of unreadable files have an `error`.
    """
    device = next(model.parameters()).device
    stages = stages or Stages()
    loader = decoded_batches(paths, sizes, batch_size, num_workers, device)
    waiting: deque[tuple[int, np.ndarray, Future]] = deque()

    def queue(batch: DecodedBatch) -> Callable[[], list[Detections]]:
        if not batch.indices:
            return list
        with stages.timed("detect"), precision(device, amp):
            wait = queue_batch(
                model,
                batch.images(),
                packed=(batch.pixels, batch.places),
                left_right=left_right,
                proposals=proposals and [proposals[i] for i in batch.indices],
            )

        def timed() -> list[Detections]:
            with stages.timed("detect"):
                return wait()

        return timed

    with ThreadPoolExecutor(FINISHING_THREADS, "finish") as threads:
        for batch, detections in one_ahead(stages.waits("decode", loader), queue):
            while batch.errors and waiting:  # an error may be the end: nothing done is lost
                yield _result(*waiting.popleft())
            for index, message in batch.errors:
                yield FileResult(index, None, None, None, error=UserError(message))
            for index, image, found in zip(batch.indices, batch.images(), detections, strict=True):
                future = threads.submit(finish, found, cfg.MODEL.NUM_CLASSES)
                waiting.append((index, image, future))
            while waiting and (len(waiting) > MOST_UNFINISHED or waiting[0][2].done()):
                with stages.timed("finish"):
                    result = _result(*waiting.popleft())
                yield result
        while waiting:
            with stages.timed("finish"):
                result = _result(*waiting.popleft())
            yield result


def decoded_batches(
    paths: Sequence[str | Path],
    sizes: Sequence[tuple[int, int]] | None,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> Iterable[DecodedBatch]:
    """Files decoded ahead of their use, in batches for a device; arguments as of detect_files."""
    batches = plan_batches(len(paths), sizes, batch_size)
    threads = min(num_workers, os.cpu_count() or 1)
    # Image by image, so that all threads decode what is needed first; one more packs.
    ahead = partial(map_ahead, threads=threads) if threads else map
    packs = partial(map_ahead, threads=1) if threads else map

    def read(index: int) -> np.ndarray | str:
        return _read(str(paths[index]), None if sizes is None else sizes[index])

    decoded = iter(ahead(read, chain.from_iterable(batches)))

    def pack(indices: list[int]) -> DecodedBatch:
        return _packed(indices, islice(decoded, len(indices)), device.type == "cuda")

    return packs(pack, batches)


class Stages:
    """Seconds that a thread has spent in each stage of its work, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the time of the block."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begin

    def waits(self, name: str, source: Iterable[T]) -> Iterator[T]:
        """What `source` gives, the time until it does counted."""
        items = iter(source)
        while True:
            with self.timed(name):
                item = next(items, None)
            if item is None:
                return
            yield item


def precision(device: torch.device, amp: str) -> AbstractContextManager:
    """In this context a network computes as `off`, `bf16` or `fp16` says."""
    dtype = AMP_DTYPES[amp]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def plan_batches(
    count: int, sizes: Sequence[tuple[int, int]] | None, batch_size: int
) -> list[list[int]]:
    """Indices 0 .. count - 1 in batches of images that enter the network with equal padded size."""
    if sizes is None or batch_size == 1:
        return [[i] for i in range(count)]
    padded = {size: network_size(*size) for size in set(sizes)}  # of few sizes, as a rule
    alike = defaultdict(list)
    for i, size in enumerate(sizes):
        alike[padded[size]].append(i)
    return [
        group[start : start + batch_size]
        for group in alike.values()
        for start in range(0, len(group), batch_size)
    ]


def one_ahead(
    items: Iterable[T], queue: Callable[[T], Callable[[], Done]]
) -> Iterator[tuple[T, Done]]:
    """Each item with what waiting for it gives, the next one being queued already.

    queue: lets the device begin with an item; what it returns waits for the result.
    """
    before: tuple[T, Callable[[], Done]] | None = None
    for item in items:
        wait = queue(item)
        if before is not None:
            yield before[0], before[1]()
        before = item, wait
    if before is not None:
        yield before[0], before[1]()


def finish(
    found: Detections, num_classes: int
) -> tuple[ClassBoxes, ClassSegms | None, ClassKeyps | None]:
    """`class_results` beside the work that has been queued since."""
    if found.ready is None:
        return class_results(found, num_classes)
    # Another stream, or pasting would queue behind the next batch's forward pass. A thread begins
    # on GPU 0; going back there from another one's stream would open a context on it.
    device = found.boxes.device
    with torch.cuda.device(device), torch.cuda.stream(next_stream_for("finishing", device)):
        torch.cuda.current_stream().wait_event(found.ready)
        return class_results(found, num_classes)


def _result(index: int, image: np.ndarray, future: Future) -> FileResult:
    return FileResult(index, image, *future.result())
