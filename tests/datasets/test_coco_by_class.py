"""The processes that score classes end with the one that asks."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from datasets import coco_by_class

SCRIPT = """
import os, signal, sys, time
from types import SimpleNamespace
sys.path.insert(0, {lib!r})
from datasets import coco_by_class

def score(job, category):
    print(os.getpid(), flush=True)
    time.sleep(1)  # all have begun
    os.kill(parent, signal.SIGKILL)
    time.sleep(60)

parent, coco_by_class._score, coco_by_class.RESULTS_OF_A_PROCESS = os.getpid(), score, 1
results = [{{"image_id": 1, "category_id": c}} for c in (1, 2)]
truth = SimpleNamespace(dataset={{"annotations": results}}, imgs={{1: 1}})
coco_by_class.evaluate(truth, results, "bbox", SimpleNamespace(catIds=[1, 2]), 2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of the end")
def test_processes_end_with_the_one_that_is_killed():
    script = SCRIPT.format(lib=str(Path(coco_by_class.__file__).parents[1]))
    # Their output ends when the last of them does.
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -9 and len(done.stdout.split()) == 2, done.stderr
    assert time.monotonic() - begin < 50
