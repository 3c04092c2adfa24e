"""Recorded training steps: the same losses and weights as steps that are not recorded."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import core.train_graphs as graphs
import nn as mynn
import utils.net as net_utils
from core.train_engine import TrainSettings, train
from core.train_graphs import DeviceRates, StaticInputs
from utils.training_stats import TrainingStats

SOLVER = SimpleNamespace(
    TYPE="SGD",
    BASE_LR=0.1,
    MOMENTUM=0.9,
    WEIGHT_DECAY=0.01,
    WEIGHT_DECAY_GN=0.0,
    BIAS_DOUBLE_LR=True,
    BIAS_WEIGHT_DECAY=False,
)
CPU = torch.device("cpu")


def test_batches_of_packed_inputs_come_in_few_shapes():
    static = StaticInputs(CPU)

    def key(pixels, rows):
        return static.key({"data": torch.zeros(pixels), "boxes": torch.zeros(rows, 4), "size": 5})

    first = key(1000, 8)
    assert key(700, 8) == first  # there is room for 1024
    assert key(1000, 16) != first
    grown = key(1025, 8)
    assert grown != first
    assert key(3, 8) == grown  # room once made stays
    assert static.outdated(first) and not static.outdated(grown)
    assert static.key({"data": torch.zeros(0), "size": 5}) != static.key({"data": torch.zeros(1)})


def test_a_batch_is_found_at_its_place():
    static = StaticInputs(CPU)
    planes = torch.ones(3, 5, 6, dtype=torch.uint8)
    batch = {"gt_bitmasks": planes, "data": torch.arange(5), "size": (4, 4)}
    static.key(batch)
    first = static.fill(batch)
    assert first["size"] == (4, 4)
    assert first["data"].shape == (8,) and first["data"][:5].tolist() == [0, 1, 2, 3, 4]
    assert first["gt_bitmasks"].shape == (4, 8, 8)
    assert first["gt_bitmasks"].sum() == planes.sum()

    smaller = {"gt_bitmasks": 2 * planes[:1, :2], "data": torch.tensor([7]), "size": (4, 4)}
    assert static.key(smaller) == static.key(batch)
    second = static.fill(smaller)
    assert second["data"].data_ptr() == first["data"].data_ptr() and second["data"][0] == 7
    assert second["gt_bitmasks"].sum() == 2 * 2 * 6  # nothing is left of the larger planes


def test_rates_are_tensors_inside_and_numbers_outside():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.5}])
    rates = DeviceRates(optimizer, CPU)
    with rates:
        tensor = optimizer.param_groups[0]["lr"]
        assert tensor == 0.5
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.param_groups[0]["lr"] = 0.25
    with pytest.raises(ZeroDivisionError), rates:
        assert optimizer.param_groups[0]["lr"] is tensor and tensor == 0.25
        raise ZeroDivisionError
    assert optimizer.param_groups[0]["lr"] == 0.25


class Drawing(nn.Module):
    """Losses that depend on random draws, on a packed input and on the batch's shape."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 2)

    def forward(self, images, data, length, image_ids=None):
        x = self.fc(torch.relu(self.conv(images)).mean((2, 3)))
        keep = torch.rand(len(x), device=x.device) < 0.5
        used = torch.arange(len(data), device=x.device) < length
        packed = torch.where(used, data, 0).sum()
        return {
            "losses": {"loss_a": (x[:, 0].pow(2) * keep).mean(), "loss_b": x[:, 1].exp().mean()},
            "metrics": {"packed": packed},
        }


def drawn_batches(count):
    generator = torch.Generator().manual_seed(1)
    out = []
    for i in range(count):
        side = (6, 8, 10)[i % 3]
        length = 5 + i
        out.append(
            {
                "images": [torch.randn(4, 3, side, side, generator=generator).pin_memory()],
                "data": [torch.ones(length).pin_memory()],
                "length": [torch.tensor(length).pin_memory()],
                "image_ids": [[i]],
            }
        )
    return out


class Values(TrainingStats):
    """Keeps what every step reported."""

    def __init__(self, steps):
        super().__init__(steps, quiet=True)
        self.rows = []

    def record(self, step, names, values, own, image_ids, data_seconds):
        self.rows.append(values)
        super().record(step, names, values, own, image_ids, data_seconds)


def run(cuda_graphs, steps=24, amp="off", kind="SGD", module=None, gpus=1):
    module = (module or Drawing()).cuda()
    torch.manual_seed(3)
    solver = SimpleNamespace(**{**vars(SOLVER), "TYPE": kind})
    optimizer = net_utils.build_optimizer(module, solver)
    model = mynn.DataParallel(module, list(range(gpus)), cpu_keywords=["image_ids"], minibatch=True)
    settings = TrainSettings(steps, disp_interval=steps, amp=amp, cuda_graphs=cuda_graphs)
    stats = Values(steps)
    loader = drawn_batches(steps * gpus)
    parts = [loader[i : i + gpus] for i in range(0, len(loader), gpus)]
    loader = [{name: [b[name][0] for b in part] for name in part[0]} for part in parts]
    train(model, optimizer, loader, lambda s: 0.1 / (1 + s), settings, stats)
    return torch.stack(stats.rows).cpu(), module.state_dict()


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_recorded_steps_train_as_others_do(monkeypatch, amp, kind):
    recorded = []
    original = graphs.RecordedCalls._record
    monkeypatch.setattr(
        graphs.RecordedCalls, "_record", lambda *args: recorded.append(1) or original(*args)
    )
    rows, weights = run(True, amp=amp, kind=kind)
    assert len(recorded) >= 3  # a graph of each size, and again when the packed input grew
    plain_rows, plain_weights = run(False, amp=amp, kind=kind)
    torch.testing.assert_close(rows, plain_rows, rtol=1e-5, atol=1e-6)
    assert rows[:, 2].tolist() == [5.0 + i for i in range(24)]
    for name, value in plain_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_replicas_train_as_copies_made_in_every_step_do():
    rows, weights = run(True, gpus=2)
    plain_rows, plain_weights = run(False, gpus=2)
    torch.testing.assert_close(rows, plain_rows, rtol=1e-5, atol=1e-6)
    for name, value in plain_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


class _LateOnTheSecondGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        if gradient.device.index == 1:
            torch.cuda._sleep(10_000_000)  # some milliseconds
        return gradient


class Late(Drawing):
    """Its second replica's gradients take a while."""

    def __init__(self):
        super().__init__()
        self.conv.register_forward_hook(lambda _m, _args, out: _LateOnTheSecondGpu.apply(out))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("recorded", [True, False])
def test_every_gpus_gradients_are_waited_for(recorded):
    rows, weights = run(recorded, gpus=2)
    late_rows, late_weights = run(recorded, gpus=2, module=Late())
    torch.testing.assert_close(late_rows, rows, rtol=1e-5, atol=1e-6)
    for late, value in zip(late_weights.values(), weights.values(), strict=True):
        torch.testing.assert_close(late, value, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_shapes_beyond_the_limit_are_not_recorded(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    held = []
    original = graphs.RecordedCalls._record

    def recording(self, *args):
        found = original(self, *args)
        held.append(len(self._graphs))
        return found

    monkeypatch.setattr(graphs.RecordedCalls, "_record", recording)
    rows, _ = run(True)
    assert set(held) == {1} and len(held) <= 3  # again only where the packed input grew
    plain_rows, _ = run(False)
    torch.testing.assert_close(rows, plain_rows, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("number", [1, 3])
def test_a_full_gpu_goes_on_without_graphs(monkeypatch, caplog, number):
    original = torch.cuda.CUDAGraph
    calls = []

    def full_for_once():
        calls.append(1)
        if len(calls) == number:
            raise torch.cuda.OutOfMemoryError("full")
        return original()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", full_for_once)
    with caplog.at_level(logging.WARNING):
        rows, _ = run(True)
    assert len(calls) == number and "without CUDA graphs" in caplog.text
    plain_rows, _ = run(False)
    torch.testing.assert_close(rows, plain_rows, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_what_a_plain_call_keeps_is_not_overwritten_by_older_recordings():
    device, kept = torch.device("cuda", 0), {}

    def step(images):
        n = len(images)
        if n not in kept:  # where the scratch of recordings made before is free
            kept[n] = torch.full_like(images, n)
        return (), (images * 2 + kept[n]).mean()

    calls = graphs.RecordedCalls(step, device, lambda: None)
    large, small = ({"images": torch.ones(n, 2**20, device=device)} for n in (8, 7))
    with graphs.on_training_stream(device):
        for batch in [large, large, large, small]:
            assert calls(batch)[1].item() == pytest.approx(2 + len(batch["images"]))
        assert "2 of the steps" in str(calls) and "one of 0 recorded" in str(calls)
        for batch in [large, large, small, large, small, small]:
            assert calls(batch)[1].item() == pytest.approx(2 + len(batch["images"]))
        assert "one of 2 recorded" in str(calls)
    assert kept[7].unique().tolist() == [7] and kept[8].unique().tolist() == [8]


@pytest.fixture
def pool_on_the_cpu(monkeypatch):
    """Where there is no GPU: a pool that nothing is in, and a GPU with some memory free."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "MemPool", type("Pool", (), {}))
    monkeypatch.setattr(torch.cuda, "use_mem_pool", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8, 10))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.parametrize("together", [False, True])
def test_a_full_gpu_in_a_plain_call(pool_on_the_cpu, monkeypatch, caplog, together):
    """Is the end only where other processes wait for the step."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: together)
    done, abandoned = [], []

    def step(images):
        done.append(len(images))
        if len(done) == 2:
            raise torch.cuda.OutOfMemoryError("full")
        return (), images.sum()

    calls = graphs.RecordedCalls(step, CPU, lambda: abandoned.append(1))
    assert calls({"images": torch.ones(3)})[1] == 3
    if together:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            calls({"images": torch.ones(4)})
        return
    assert calls({"images": torch.ones(4)})[1] == 4
    assert done == [3, 4, 4] and abandoned == [1] and "without CUDA graphs" in caplog.text
    for _ in range(3):  # outside the pool, and never recorded
        assert calls({"images": torch.ones(4)})[1] == 4
    calls._function = lambda **_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("full again"))
    with pytest.raises(torch.cuda.OutOfMemoryError, match="again"):
        calls({"images": torch.ones(4)})


def test_a_loader_process_that_dies_meanwhile_is_not_the_recordings_fault(
    pool_on_the_cpu, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda.MemPool, "id", (0, 7), raising=False)
    monkeypatch.setattr(graphs, "training_stream", lambda _: None)
    ended = []
    monkeypatch.setattr(graphs, "end_broken_recording", lambda *args: ended.append(args))
    said = "DataLoader worker (pid 7) is killed by signal: Killed. "
    answers = iter([((), torch.ones(())), RuntimeError(said)])

    def step(images):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    calls = graphs.RecordedCalls(step, CPU, lambda: None)
    calls({"images": torch.ones(3)})
    with pytest.raises(RuntimeError, match="^DataLoader worker"):
        calls({"images": torch.ones(3)})
    assert ended == [((0, 7), CPU)]


@pytest.mark.gpu
@pytest.mark.parametrize("fails", [False, True])
def test_work_on_the_training_stream_is_waited_for(fails):
    device = torch.device("cuda", 0)
    value = torch.zeros((), device=device)
    with contextlib.suppress(ZeroDivisionError), graphs.on_training_stream(device):
        torch.cuda._sleep(100_000_000)
        value.fill_(1)
        if fails:
            raise ZeroDivisionError
    assert value.item() == 1


@pytest.mark.parametrize("free", [1, 8])  # of 10
def test_memory_that_torch_keeps_is_given_back_before_a_plain_call(
    pool_on_the_cpu, monkeypatch, free
):
    emptied = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 10))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    calls = graphs.RecordedCalls(lambda images: ((), images.sum()), CPU, lambda: None)
    calls({"images": torch.ones(3)})
    assert bool(emptied) == (free == 1)


def test_what_the_optimizer_keeps_leaves_the_pool_when_training_goes_on_without(pool_on_the_cpu):
    weight = nn.Parameter(torch.ones(4, 2, 3, 3).to(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = optimizer.state[weight]["momentum_buffer"]
    graphs.StepGraphs(lambda: None, optimizer, CPU)._abandon()
    after = optimizer.state[weight]["momentum_buffer"]
    assert weight.grad is None
    assert after.data_ptr() != before.data_ptr() and torch.equal(after, before)
    assert after.stride() == before.stride()


@pytest.mark.gpu
def test_recordings_work_in_the_memory_that_calls_have_worked_in():
    device = torch.device("cuda", 0)
    weight = torch.ones((), device=device, requires_grad=True)

    def step(images):
        weight.grad = None
        loss = (images * weight).repeat(8, 1).pow(2).mean()
        loss.backward()
        weight.grad = None
        return (), loss.detach()

    batches = [{"images": torch.ones(n, 2**20, device=device)} for n in (12, 8)]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_reserved(device)
    calls = graphs.RecordedCalls(step, device, lambda: None)
    with graphs.on_training_stream(device):
        for batch in [*batches, *batches, *batches]:
            assert calls(batch)[1].item() == 1
    assert "4 of the steps" in str(calls) and "2 recorded" in str(calls)
    worked_in = torch.cuda.max_memory_allocated(device) - sum(b["images"].nbytes for b in batches)
    assert torch.cuda.memory_reserved(device) - held < 1.25 * worked_in


class Waiting(Drawing):
    def forward(self, **inputs):
        output = super().forward(**inputs)
        float(output["losses"]["loss_a"])
        return output


@pytest.mark.gpu
def test_a_model_that_waits_for_the_gpu_is_named():
    # In a process of its own: a recording that failed leaves torch's random numbers unusable.
    folders = [str(Path(__file__).parent), str(Path(graphs.__file__).parents[1])]
    script = f"import sys; sys.path[:0] = {folders}; import test_train_graphs as t; "
    script += "t.run(True, module=t.Waiting())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "UserError: a training step could not be recorded" in done.stderr
    assert "MODEL.CUDA_GRAPHS False" in done.stderr
