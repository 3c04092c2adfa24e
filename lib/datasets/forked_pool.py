"""One function of many items in forked processes, which share the memory of the one that asks."""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

from roi_data.loader_workers import START_METHOD

_PR_SET_PDEATHSIG = 1  # of Linux' prctl

Item = TypeVar("Item")
Result = TypeVar("Result")

_shared: list[Callable[[Any], Any]] = []  # of a process of a pool


def in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], processes: int
) -> list[Result]:
    """`function(item)` of each item, in their order.

    Args:
        function: may be local, and may refer to large things: it is not pickled. Its results are.
        processes: as many at most; below 2, or where processes cannot be forked, none is started.
    """
    processes = min(processes, len(items))
    collecting = gc.isenabled()
    gc.disable()  # it would look through the results again and again, and find nothing to collect
    try:
        if processes < 2 or START_METHOD is None:
            return [function(item) for item in items]
        with forked_pool(processes, function) as pool:
            return list(pool.map(call_shared, items))
    finally:
        if collecting:
            gc.enable()


def forked_pool(processes: int, function: Callable[[Any], Any]) -> ProcessPoolExecutor:
    """A pool whose processes have `function`, which they do not get pickled, as `call_shared`."""
    context = multiprocessing.get_context(START_METHOD)
    return ProcessPoolExecutor(processes, context, _begin, (function,))


def call_shared(item: Any) -> Any:
    """The function of this process of a forked_pool."""
    return _shared[0](item)


def shared_array(shape: tuple[int, ...]) -> np.ndarray:
    """float64, made before processes are forked: what one of them writes the others see."""
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(8 * count, 1))
    return np.frombuffer(memory, dtype=np.float64, count=count).reshape(shape)


class Spool:
    """Bytes in memory that one process appends, for those to read that are forked from where it
    was made; nothing of it passes through a pipe. Linux only."""

    def __init__(self) -> None:
        self._file = open(os.memfd_create("spool"), "wb", buffering=0)  # noqa: SIM115 (kept open)

    def append(self, content: bytes) -> None:
        """Put `content` behind what is there."""
        rest = memoryview(content)
        while len(rest):
            rest = rest[self._file.write(rest) :]

    def read(self) -> np.ndarray:
        """(n,) uint8, all that has been appended so far."""
        size = os.fstat(self._file.fileno()).st_size
        if size == 0:
            return np.zeros(0, dtype=np.uint8)
        memory = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ)
        return np.frombuffer(memory, dtype=np.uint8)


def end_with_parent() -> None:
    """Called in a forked process: what is good for it, and that it ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    # Were that one killed, this one would wait for work for ever, with its memory and connections.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != multiprocessing.parent_process().pid:  # it ended before that
            os._exit(1)
    torch.set_num_threads(1)  # the others are not forked too
    gc.disable()


def _begin(function: Callable[[Any], Any]) -> None:
    end_with_parent()
    _shared[:] = [function]
