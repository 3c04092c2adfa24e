"""Loads the compiled operators; importing it defines `torch.ops.detectron.*`."""

from __future__ import annotations

from pathlib import Path

import torch

_FILE = Path(__file__).with_name("_C.so")

if not _FILE.is_file():
    raise ImportError(f"the compiled operators ({_FILE}) are missing: run ./make.sh to build them")
try:
    torch.ops.load_library(_FILE)
except OSError as error:
    raise ImportError(
        f"the compiled operators ({_FILE}) do not load with torch {torch.__version__}: "
        f"run ./make.sh to build them again ({error})"
    ) from error
