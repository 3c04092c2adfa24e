"""How the scripts log: one line a message on standard output, and the same in a file."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_DATES = "%Y-%m-%d %H:%M:%S"


def setup_logging(name: str) -> logging.Logger:
    """Log INFO and above on standard output; return the logger of that name.

    A second call changes nothing, so scripts may call each other's main().
    """
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter(_FORMAT, _DATES))
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    return logging.getLogger(name)


def log_to_file(path: str | Path) -> logging.Handler:
    """Append everything that is logged from now on to a file.

    Returns:
        the handler; `logging.getLogger().removeHandler` ends it.
    """
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT, _DATES))
    logging.getLogger().addHandler(handler)
    return handler
