"""How far a long loop is: a bar on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from datetime import timedelta
from types import TracebackType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts what is done of `total` things and shows rate and remaining time.

    Used as a context manager around the loop; `advance()` once a thing is done. The total is None
    where there is no end, as with a camera.
    """

    def __init__(self, total: int | None, what: str = "images") -> None:
        self.total, self.what, self.done = total, what, 0
        self._bar = tqdm(total=total, unit=f" {what}", leave=False) if sys.stderr.isatty() else None
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if kind is None:
            elapsed = time.monotonic() - self._start
            rate = self.done / max(elapsed, 1e-9)
            logger.info("%d %s in %.1f s (%.1f a second)", self.done, self.what, elapsed, rate)

    def advance(self, count: int = 1) -> None:
        """Say that `count` more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        rate = self.done / (now - self._start)
        if self.total is None:
            self._last_line = now
            logger.info("%d %s, %.2f a second", self.done, self.what, rate)
        elif self.done < self.total:
            self._last_line = now
            eta = timedelta(seconds=round((self.total - self.done) / rate))
            logger.info(
                "%d of %d %s, %.2f a second, ETA %s", self.done, self.total, self.what, rate, eta
            )


class StepBar:
    """On a terminal: a bar of a training's steps below the log lines. Elsewhere nothing.

    Args:
        total: steps of the whole training; first: the one it (re)starts with.
    """

    def __init__(self, total: int, first: int = 0) -> None:
        self._bar = self._redirect = None
        if sys.stderr.isatty():
            self._redirect = logging_redirect_tqdm()
            self._redirect.__enter__()
            self._bar = tqdm(total=total, initial=first, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """Say that one more step is done."""
        if self._bar is not None:
            self._bar.update()

    def show(self, **values: str) -> None:
        """Values to stand behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._redirect.__exit__(None, None, None)
            self._bar = None
