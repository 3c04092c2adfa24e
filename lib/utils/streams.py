"""CUDA streams by what they are for."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable

import torch

_MOST_IN_TURN = 16  # with the others fewer than torch's 32
_turns = itertools.count()


@functools.cache
def stream_for(purpose: Hashable, device: torch.device) -> torch.cuda.Stream:
    """The process's stream for a purpose on a GPU, the same at every call.

    torch has 32 streams a GPU and deals them out in turn. One made anew for every piece of work
    would now and then be that of another purpose, for example one that a graph is being recorded
    on, which fails then.
    """
    return torch.cuda.Stream(device)


def next_stream_for(purpose: Hashable, device: torch.device) -> torch.cuda.Stream:
    """One of a few streams for pieces of work that need not wait for each other, in turn."""
    return stream_for((purpose, next(_turns) % _MOST_IN_TURN), device)
