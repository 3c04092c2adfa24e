"""Asking a training to stop: the step is finished and a checkpoint written before it does."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

from core.distributed import AgreedFlag

# What schedulers and people send: SLURM's `--signal=USR1@120` comes before its time limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A launcher passes on what its processes were sent themselves: an echo is no second request.
_ECHO_SECONDS = 2.0


class StopRequest:
    """While it is entered, `SIGNALS` are noted instead of acting.

    A further Ctrl-C, some seconds later, interrupts at once.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the first signal that this process was sent
        self._since = 0.0
        self._flag = AgreedFlag()
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may set handlers, and only it is sent signals.
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> int:
        """Number of a signal that some rank has received, the same on every rank; else 0.

        Called once after each step.
        """
        return self._flag.exchange(self.received)

    def settle(self) -> None:
        """Wait until every rank has asked `agreed` after this step."""
        self._flag.settle()

    def finish(self) -> None:
        """Wait for what `agreed` began; every rank calls it after its last step."""
        self._flag.finish()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > _ECHO_SECONDS:
            raise KeyboardInterrupt
