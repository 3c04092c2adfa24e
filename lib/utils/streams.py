"""CUDA streams by what they are for."""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Iterator

import torch

_MOST_IN_TURN = 8  # of a purpose: with the others fewer than torch's 32
_lock = threading.Lock()
_streams: dict[tuple, torch.cuda.Stream] = {}
_turns: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


def stream_for(
    purpose: str | tuple[str, int], device: torch.device | None = None
) -> torch.cuda.Stream:
    """The process's stream for a purpose on a GPU, by default the current one; the same at every
    call.

    torch has 32 streams a GPU and deals them out in turn. One made anew for every piece of work
    would now and then be that of another purpose, for example one that a graph is being recorded
    on, which fails then.
    """
    number = None if device is None else device.index
    number = torch.cuda.current_device() if number is None else number
    with _lock:
        if (purpose, number) not in _streams:
            _streams[purpose, number] = torch.cuda.Stream(number)
        return _streams[purpose, number]


def next_stream_for(purpose: str, device: torch.device | None = None) -> torch.cuda.Stream:
    """One of a few streams for pieces of work that need not wait for each other, in turn."""
    with _lock:
        turn = next(_turns[purpose]) % _MOST_IN_TURN
    return stream_for((purpose, turn), device)
