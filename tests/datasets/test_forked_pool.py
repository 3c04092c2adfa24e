"""Forked processes: results in order, tracebacks that arrive, an end with the one that asks."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datasets import forked_pool
from datasets.forked_pool import Spool, in_processes

SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {lib!r})
from datasets.forked_pool import in_processes

def work(item):
    os.write(1, b"%d\\n" % os.getpid())  # as a whole, beside the other
    time.sleep(1)  # all have begun
    os.kill(parent, signal.SIGKILL)
    time.sleep(60)

parent = os.getpid()
in_processes(work, [1, 2], 2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of the end")
def test_processes_end_with_the_one_that_is_killed():
    script = SCRIPT.format(lib=str(Path(forked_pool.__file__).parents[1]))
    # Their output ends when the last of them does.
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -9 and len(done.stdout.split()) == 2, done.stderr
    assert time.monotonic() - begin < 50


LATE = """
import multiprocessing, os, sys, time
sys.path.insert(0, {lib!r})
from datasets import forked_pool

class Slow:
    def __init__(self, name): pass
    def prctl(self, *_):
        while os.getppid() == parent:
            time.sleep(0.01)

def work():
    forked_pool.ctypes.CDLL = Slow
    forked_pool.end_with_parent()
    os.write(1, b"still there")

parent = os.getpid()
multiprocessing.get_context("fork").Process(target=work).start()
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of the end")
def test_a_process_ends_whose_parent_ended_before_it_could_be_told():
    script = LATE.format(lib=str(Path(forked_pool.__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_the_order_of_the_items(processes):
    offset = 10
    assert in_processes(lambda item: item + offset, range(5), processes) == [10, 11, 12, 13, 14]


def test_a_failure_comes_with_its_traceback():
    def fails_here(item):
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0") as caught:
        in_processes(fails_here, [0, 1], 2)
    assert "fails_here" in str(caught.value.__cause__)


@pytest.mark.skipif(sys.platform != "linux", reason="made of Linux' memory files")
def test_what_is_appended_is_read_in_a_process_forked_before():
    spool, begun, ready = Spool(), *(multiprocessing.get_context("fork").Event() for _ in "12")
    results = multiprocessing.get_context("fork").SimpleQueue()

    def read():
        before = spool.read().tobytes()
        begun.set()
        assert ready.wait(60)
        results.put((before, spool.read().tobytes()))

    spool.append(b"ab")
    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    assert begun.wait(60)
    spool.append(b"")
    spool.append(b"cde")
    ready.set()
    assert results.get() == (b"ab", b"abcde")
    process.join()
    assert Spool().read().tobytes() == b""
