"""The next batch is begun before anyone waits for the last one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from core import test_pipeline
from core.detections import Detections
from core.test_pipeline import decoded_batches, one_ahead


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_one_is_queued_while_another_is_waited_for(count):
    events: list[tuple[str, int]] = []

    def queue(item: int):
        events.append(("queue", item))

        def wait() -> int:
            events.append(("wait", item))
            return 10 * item

        return wait

    assert list(one_ahead(range(count), queue)) == [(i, 10 * i) for i in range(count)]
    for item in range(count):
        begun = item + 1 if item + 1 < count else item
        assert events.index(("queue", begun)) < events.index(("wait", item))
        if item + 2 < count:
            assert events.index(("wait", item)) < events.index(("queue", item + 2))


@pytest.mark.gpu
def test_results_are_fetched_from_the_gpu_they_are_on_alone():
    """A thread opens no context on GPU 0 for it, hundreds of MiB."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folders = [str(Path(__file__).parent), str(Path(test_pipeline.__file__).parents[1])]
    script = f"import sys; sys.path[:0] = {folders}; "
    script += "import test_test_pipeline as t; t.fetch_from_the_second_gpu()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[False, True]\n", done.stderr


def fetch_from_the_second_gpu() -> None:
    torch.cuda.set_device(1)
    found = Detections(
        boxes=torch.zeros(0, 4, device="cuda:1"),
        scores=torch.zeros(0, device="cuda:1"),
        classes=torch.zeros(0, dtype=torch.int64, device="cuda:1"),
        masks=None,
        heatmaps=None,
        height=4,
        width=5,
        ready=torch.cuda.current_stream().record_event(),
    )
    with ThreadPoolExecutor(1) as pool:
        pool.submit(test_pipeline.finish, found, 3).result()
    print([torch._C._cuda_hasPrimaryContext(i) for i in range(2)])


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Twenty images of two sizes, one of which is none."""
    paths = [str(tmp_path / f"{i}.png") for i in range(20)]
    for i, path in enumerate(paths):
        cv2.imwrite(path, np.full((8 + i % 2, 6, 3), i, dtype=np.uint8))
    (tmp_path / "7.png").write_text("no image")
    return paths


def test_decoding_ahead_gives_the_same_batches_in_order(files):
    sizes = [(8 + i % 2, 6) for i in range(20)]
    arguments = (files, sizes, 3), torch.device("cpu")
    alone = list(decoded_batches(*arguments[0], 0, arguments[1]))
    ahead = list(decoded_batches(*arguments[0], 2, arguments[1]))
    assert [b.indices for b in ahead] == [b.indices for b in alone]
    assert [b.errors for b in ahead] == [b.errors for b in alone]
    assert [index for b in ahead for index, _ in b.errors] == [7]
    for batch in ahead:
        for index, image in zip(batch.indices, batch.images(), strict=True):
            assert image.shape == (*sizes[index], 3) and (image == index).all()


def test_decoding_ends_with_whoever_wants_the_batches(files):
    batches = decoded_batches(files, [(8 + i % 2, 6) for i in range(20)], 3, 2, torch.device("cpu"))
    assert next(batches).indices == [0, 2, 4]
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]


def test_all_threads_decode_the_first_batch(files, monkeypatch):
    together = threading.Barrier(2)
    read_image = test_pipeline.read_image

    def read(path, size):
        together.wait(60)  # for another one that decodes
        return read_image(path, size)

    monkeypatch.setattr(test_pipeline, "read_image", read)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    (batch,) = decoded_batches(files[:4:2], [(8, 6)] * 2, 2, 2, torch.device("cpu"))
    assert batch.indices == [0, 1]
