"""No stream has two purposes, however much work there is."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
import torch

from utils import streams

TORCH_HAS = 32


@pytest.fixture
def dealt(monkeypatch):
    """Streams as torch deals them out: the same ones in turn."""
    numbers = itertools.count()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: (device, next(numbers) % TORCH_HAS))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(streams, "_streams", {})


def test_one_purpose_takes_no_turns_of_another(dealt):
    gpu = torch.device("cuda:0")
    recording = []
    for _ in range(4):  # models that are recorded while images are finished
        recording.append(streams.next_stream_for("recording", gpu))
        for _ in range(7):
            streams.next_stream_for("finishing", gpu)
    assert len(set(recording)) == 4


def test_a_purpose_keeps_its_stream_and_shares_it_with_none(dealt):
    gpu, other = torch.device("cuda:0"), torch.device("cuda:1")
    training = streams.stream_for("training", gpu)
    found = {
        purpose: {streams.next_stream_for(purpose, gpu) for _ in range(1000)}
        for purpose in ("finishing", "recording")
    }
    assert all(1 < len(of_purpose) < TORCH_HAS / 2 for of_purpose in found.values())
    loading = streams.stream_for("loading")
    assert streams.stream_for("training", torch.device("cuda")) == training != loading
    assert not found["finishing"] & (found["recording"] | {training, loading})
    assert streams.stream_for("training", other)[0] == 1


def test_nobody_else_makes_streams():
    lib = Path(streams.__file__).parents[1]
    makers = [path.name for path in lib.rglob("*.py") if "cuda.Stream(" in path.read_text()]
    assert makers == ["streams.py"]


@pytest.mark.gpu
def test_work_of_other_threads_goes_on_while_a_graph_is_recorded():
    device = torch.device("cuda:0")
    event = torch.cuda.Event()
    event.record()
    x = torch.ones(8, device=device)
    failed = []

    def finish():
        try:
            for _ in range(3 * TORCH_HAS):
                with torch.cuda.stream(streams.next_stream_for("finishing", device)):
                    torch.cuda.current_stream().wait_event(event)
        except RuntimeError as error:
            failed.append(error)

    graph = torch.cuda.CUDAGraph()
    stream = streams.next_stream_for("recording", device)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        y = x + 1
        thread = threading.Thread(target=finish)
        thread.start()
        thread.join()
        y = y + 1
    graph.replay()
    assert not failed and y.tolist() == [3.0] * 8
