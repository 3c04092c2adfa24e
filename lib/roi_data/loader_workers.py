"""Loader processes: what they send, how their mistakes and deaths reach the user by name."""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np
import torch
import torch.utils.data as torch_data
from torch import Tensor

from core.errors import UserError
from roi_data.minibatch import MinibatchOptions, Sample, pack_minibatch

logger = logging.getLogger(__name__)

Item = tuple[int, float, int]

_MOST_REDRAWS = 100  # of a mini-batch with too few keypoints

# Annotations are shared with the loader processes because a forked process shares all memory until
# it writes to it. Other ways to start one would send each a copy.
START_METHOD = "fork" if "fork" in multiprocessing.get_all_start_methods() else None


class TrainingImages(Protocol):
    """What the batches are made of: see `roi_data.loader.RoiDataLoader`."""

    def __len__(self) -> int: ...
    def image_size(self, index: int) -> tuple[int, int]: ...
    def image_path(self, index: int) -> str: ...
    def read(self, item: Item, out: np.ndarray | None = None) -> tuple[Sample, str]: ...


@dataclass(frozen=True)
class _Failure:
    """A user's mistake met in a loader process: torch would wrap it in a traceback as text."""

    message: str


# A batch, and what is to be said about its images.
_Delivery = tuple[dict[str, list], list[str]]


class BatchReader(torch_data.Dataset):
    """Whole batches of training images, each decoded straight into the memory it is sent in."""

    def __init__(self, images: TrainingImages, options: MinibatchOptions, num_workers: int) -> None:
        self.images = images
        self._options = options
        # [process id, index of the image it reads] of each loader process
        self._reading = torch.full((num_workers, 2), -1, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, items: Sequence[Item]) -> _Delivery | _Failure:
        """The batch of these items: DataLoader asks for all of a batch by this name."""
        size = self._options.ims_per_batch
        notes: list[str] = []
        try:
            parts = [self._part(items[i : i + size], notes) for i in range(0, len(items), size)]
        except UserError as error:
            return _Failure(str(error))
        return {key: [part[key] for part in parts] for key in parts[0]}, notes

    def _part(self, items: Sequence[Item], notes: list[str]) -> dict[str, Any]:
        """One GPU's images: these, or others if they have too few keypoints to learn from."""
        quota = self._options.keypoint_quota
        if quota is None:
            return self._read(items, notes)
        rng = np.random.RandomState([seed for _, _, seed in items])
        for _ in range(_MOST_REDRAWS):
            part = self._read(items, notes)
            if quota.met_by(part):
                return part
            indices, seeds = (
                rng.randint(len(self), size=len(items)),
                rng.randint(2**31, size=len(items)),
            )
            drawn = zip(
                indices.tolist(), (ratio for _, ratio, _ in items), seeds.tolist(), strict=True
            )
            items = list(drawn)
        raise UserError(
            f"{_MOST_REDRAWS} mini-batches in a row have no more than {quota.more_than} visible "
            "keypoints in their proposals: use better proposals, or lower "
            "KRCNN.MIN_KEYPOINT_COUNT_FOR_VALID_MINIBATCH"
        )

    def _read(self, items: Sequence[Item], notes: list[str]) -> dict[str, Any]:
        worker = torch_data.get_worker_info()
        sizes = [self.images.image_size(index) for index, _, _ in items]
        ends = np.cumsum([height * width * 3 for height, width in sizes]).tolist()
        pixels = _memory(ends[-1], shared=worker is not None)
        samples, replaced = [], False
        for item, (height, width), end in zip(items, sizes, ends, strict=True):
            if worker is not None:
                self._reading[worker.id, 0], self._reading[worker.id, 1] = os.getpid(), item[0]
            out = pixels[end - height * width * 3 : end].numpy().reshape(height, width, 3)
            sample, note = self.images.read(item, out)
            samples.append(sample)
            if note:
                notes.append(note)
                replaced = True
        return pack_minibatch(samples, self._options, None if replaced else pixels)

    def being_read_by(self, pid: int) -> str | None:
        """Path of the image that a loader process reads, or read last."""
        for process, index in self._reading.tolist():
            if process == pid:
                return self.images.image_path(index)
        return None


def _memory(size: int, shared: bool) -> Tensor:
    """uint8 (size,), not initialised; shared memory is sent to another process as it is."""
    if not shared:
        return torch.empty(size, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(size)  # as torch's own collation does it
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class TrainLoader(torch_data.DataLoader):
    """A DataLoader of BatchReader's batches, which says by name what goes wrong in its processes.

    Raises a process's UserError as it was; logs replaced images, each once.
    """

    def __init__(
        self, reader: BatchReader, batch_sampler: Any, num_workers: int, pin_memory: bool
    ) -> None:
        super().__init__(
            reader,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            worker_init_fn=_init_worker,
            persistent_workers=num_workers > 0,
            multiprocessing_context=START_METHOD if num_workers else None,
        )
        self._said: set[str] = set()

    def __iter__(self) -> Iterator[dict[str, list]]:
        deliveries = None
        while True:
            try:
                if deliveries is None:
                    if self.num_workers:
                        _give_back_freed_memory()
                    deliveries = super().__iter__()
                delivery = next(deliveries, None)
            except (RuntimeError, OSError, EOFError) as error:
                raise self.explained(_last_of(error) if self.num_workers else error) from error
            if delivery is None:
                return
            if isinstance(delivery, _Failure):
                raise UserError(delivery.message)
            batch, notes = delivery
            for note in notes:
                if note not in self._said:
                    self._said.add(note)
                    logger.warning("%s", note)
            yield batch

    def explained(self, error: Exception) -> Exception:
        """A UserError in place of torch's error of a loader process that died; others unchanged.

        torch raises the latter wherever the program is when the process dies.
        """
        pattern = r"DataLoader worker \(pid(?:\(s\))? (\d+)[^)]*\) (.*)"
        # The cause, if there is one, says which signal it was.
        found = re.search(pattern, str(error.__cause__)) or re.search(pattern, str(error))
        if found is None:
            return error
        pid, how = int(found[1]), found[2].split(". ")[0].rstrip(". ")
        path = self.dataset.being_read_by(pid)
        place = f" while reading image {path} or sending its batch" if path else ""
        return UserError(
            f"a loader process (pid {pid}) {how}{place}; if memory ran out (of the machine, or of "
            "/dev/shm), use fewer processes (--nw) or smaller batches (--bs)"
        )


def _last_of(error: Exception) -> Exception:
    """torch's error of a loader process that died, if one follows; else the error itself.

    That a process is gone may be noticed first by a broken connection to it, by memory that
    cannot be received any more, or by its absence. torch raises another error, of its signal, once
    that arrives: which would come in the midst of whatever is done about the first.
    """
    try:
        time.sleep(1.0)
    except RuntimeError as second:
        return second
    return error


def _as_it_is(delivery: Any) -> Any:
    return delivery


def _give_back_freed_memory() -> None:
    """What was freed (the annotations as they were read, above all) goes back to the system now:
    a process that is forked would hold on to it."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _init_worker(worker_id: int) -> None:
    cv2.setNumThreads(0)  # the processes are the parallelism
    # A signal to the whole job (Ctrl-C, SIGTERM) lets the training finish its step: it needs data.
    os.setpgid(0, 0)
    # The garbage collector would write to every object it inherited, and so copy all of them.
    gc.freeze()
