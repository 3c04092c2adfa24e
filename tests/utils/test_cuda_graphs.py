"""Recordings give what the function gives, whatever changes between calls."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from utils.cuda_graphs import CudaGraphs

pytestmark = pytest.mark.gpu


class Net(nn.Module):
    """Counts how often its Python runs: replays do not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        self.calls = 0
        self.cuda()

    def forward(self, x, shift):
        self.calls += 1
        out = self.layers(x) + shift
        return out, None, out.flatten(1).argmax(dim=1)


def inputs(size: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, size, size + 3, generator=g).cuda(), torch.tensor([seed]).cuda()


def assert_same(found, expected):
    assert found[1] is None
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("amp", [False, True])
def test_several_sizes_in_turn_while_weights_change_and_move(amp, inference):
    net = Net()
    graphs = CudaGraphs(net.parameters())
    mode = torch.inference_mode() if inference else torch.no_grad()
    with mode, torch.autocast("cuda", torch.bfloat16, enabled=amp):
        for seed in range(6):
            for size in (9, 40, 17):
                given = inputs(size, seed)
                found, expected = graphs(net, given), net(*given)
                assert_same(found, expected)
            with torch.inference_mode(False), torch.no_grad():
                if seed == 3:
                    for weight in net.parameters():
                        weight.data = weight.data.clone()
                net.layers[0].weight.mul_(1.5)
            torch.clear_autocast_cache()
    assert len(graphs) == 3
    # Beside the 18 to compare with: three sizes as they stand, recorded, and recorded anew.
    assert net.calls == 18 + 3 * 3


@torch.inference_mode()
def test_results_belong_to_the_caller():
    net = Net()
    graphs = CudaGraphs(net.parameters())
    given = [inputs(12, seed) for seed in range(5)]
    found = [graphs(net, one) for one in given]
    for one, result in zip(given, found, strict=True):
        assert_same(result, net(*one))


@torch.inference_mode()
def test_the_recording_that_was_not_used_for_longest_goes():
    net = Net()
    graphs = CudaGraphs(net.parameters(), most=2)
    for seed in range(4):
        for size in (9, 10, 11, 9):
            given = inputs(size, seed)
            assert_same(graphs(net, given), net(*given))
            assert len(graphs) <= 2


@torch.inference_mode()
def test_what_waits_for_the_device_is_not_recorded_but_works(caplog):
    graphs = CudaGraphs([])

    def waits(x):
        return (x * x.sum().item(),)

    x = torch.arange(4.0, device="cuda")
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert graphs(waits, [x])[0].tolist() == [0, 6, 12, 18]
    assert graphs(waits, [x[:3]])[0].tolist() == [0, 3, 6]
    assert graphs(waits, [x[:3]])[0].tolist() == [0, 3, 6]
    assert [record.message.startswith("no CUDA graph") for record in caplog.records] == [True]
    net = Net()
    for seed in range(3):  # a failure leaves nothing behind
        given = inputs(9, seed)
        assert_same(graphs(net, given, key=1), net(*given))
    assert len(graphs) == 1
    # torch before 2.12 kept all memory after it, and ended the process when a pool went.
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        torch.ones(9, device="cuda")
    before = torch.cuda.memory_reserved()
    torch.empty(2**26, device="cuda")
    del pool
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before


def test_threads_and_streams_share_recordings():
    net = Net()
    graphs = CudaGraphs(net.parameters())
    expected = {}
    with torch.inference_mode():
        for seed in range(40):
            given = inputs((9, 20)[seed % 2], seed)
            expected[seed] = given, net(*given)
            if seed < 4:
                graphs(net, given)
    torch.cuda.synchronize()

    @torch.inference_mode()
    def run(seed: int):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = graphs(net, expected[seed][0])
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(4) as pool:
        for seed, found in enumerate(pool.map(run, range(40))):
            assert_same(found, expected[seed][1])
