"""One function in several processes of this machine: all of them succeed, or none goes on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

from core.errors import UserError

_USER_ERROR = 2  # exit code of a process that has said what is wrong


def run_in_processes(function: Callable[..., None], count: int, *args: Any) -> None:
    """Call `function(rank, *args)` in `count` new processes and wait for them.

    The first failure ends the others, an interruption all: they get a SystemExit.

    Args:
        function: at the top of a module; it and `args` are pickled.
    Raises:
        UserError: what one of them raised.
        torch.multiprocessing.ProcessRaisedException: another error, with that process's traceback.
        torch.multiprocessing.ProcessExitedException: one was killed, say for want of memory.
    """
    complaints = mp.get_context("spawn").SimpleQueue()
    running = mp.start_processes(
        _run, (function, complaints, args), count, join=False, start_method="spawn"
    )
    try:
        while not running.join():
            pass
    except mp.ProcessExitedException:
        if complaints.empty():
            raise
        raise UserError(complaints.get()) from None
    finally:
        for process in running.processes:
            process.terminate()  # nothing for one that has ended


def _run(rank: int, function: Callable[..., None], complaints: Any, args: tuple) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        function(rank, *args)
    except UserError as error:
        # Only a traceback would come out of this process by itself.
        complaints.put(str(error))
        sys.exit(_USER_ERROR)
