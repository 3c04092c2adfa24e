"""Several processes: one that fails shows why and ends the others."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from torch.multiprocessing import ProcessRaisedException

from core.errors import UserError
from core.processes import run_in_processes


def fails_second(rank: int, folder: Path) -> None:
    (folder / str(rank)).write_text(str(os.getpid()))
    if rank == 0:
        time.sleep(600)
    while not (folder / "0").exists():
        time.sleep(0.01)
    raise KeyError("seen in the traceback")


def test_the_first_failure_ends_all(tmp_path):
    begin = time.monotonic()
    with pytest.raises(ProcessRaisedException, match=r"in fails_second(.|\n)*in the traceback"):
        run_in_processes(fails_second, 2, tmp_path)
    assert time.monotonic() - begin < 300
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "0").read_text()), 0)


def complains(rank: int, what: str) -> None:
    raise UserError(f"process {rank} has {what}")


def test_a_complaint_comes_through_as_such():
    with pytest.raises(UserError, match="^process 0 has no image 7$"):
        run_in_processes(complains, 1, "no image 7")
