"""Python's search for garbage, where a program keeps what it makes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_NEVER = 10**6  # collections of the middle generation before one of the oldest


@contextmanager
def only_young_garbage() -> Iterator[None]:
    """In this context objects that have survived are not looked through again.

    For loops that keep hundreds of thousands of small objects: all of them would be visited again
    and again. What becomes garbage soon is found as ever.
    """
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], _NEVER)
    try:
        yield
    finally:
        gc.set_threshold(*before)
