"""The stem's convolution on cells of 2x2 pixels, against the convolution on pixels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nn as mynn
from modeling.ResNet import Stem
from nn import stem as stem_file

SIZES = [(32, 64), (33, 40), (26, 45), (7, 9), (2, 2), (1, 1), (1, 6)]
HALF = [torch.bfloat16, torch.float16]


def relative_difference(one, other):
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).norm() / other.norm())


@pytest.fixture
def make_stem(cfg):
    """make_stem(use_gn, dtype): a trained stem with a random norm, channels_last on the GPU."""

    def make(use_gn=False, dtype=torch.float32, device="cuda"):
        cfg.RESNETS.USE_GN = use_gn
        torch.manual_seed(3)
        stem = Stem(64)
        norm = getattr(stem, stem.norm_name)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        return stem.to(device, dtype, memory_format=torch.channels_last)

    return make


@pytest.fixture
def with_cells(monkeypatch):
    """Grows by one whenever a convolution is computed on cells."""
    calls = []

    def spy(weight):
        calls.append(weight.dtype)
        return cell_weight(weight)

    cell_weight = stem_file.cell_weight
    monkeypatch.setattr(stem_file, "cell_weight", spy)
    return calls


def conv_norm_relu(stem, x):
    return mynn.conv_norm_stem(stem.conv1, getattr(stem, stem.norm_name), x)


def weight_gradient(out, stem):
    """Gradient of a fixed loss of the output."""
    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    loss = (out.float() * factors.to(out.device)).sum()
    return torch.autograd.grad(loss, stem.conv1.weight)[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [3, 4])
def test_cells_give_the_sums_of_the_strided_convolution(size, channels):
    torch.manual_seed(0)
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    weight = torch.randn(5, channels, 7, 7, dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(x, weight, stride=2, padding=3)
    got = F.conv2d(stem_file.image_cells(x, x.dtype), stem_file.cell_weight(weight))
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, weight, grad)[0], torch.autograd.grad(expected, weight, grad)[0]
    )


def test_images_and_weights_of_any_strides_become_channels_last():
    x = torch.randn(2, 3, 8, 14)
    cells = stem_file.image_cells(x, torch.bfloat16)
    assert cells.dtype == torch.bfloat16 and cells.shape == (2, 16, 7, 10)
    assert cells.is_contiguous(memory_format=torch.channels_last)
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(stem_file.image_cells(last, torch.bfloat16), cells)
    assert torch.equal(cells.float().sum(dim=(2, 3)).view(2, 4, 4)[:, :, 3], torch.zeros(2, 4))
    weight = torch.randn(6, 3, 7, 7)
    by_cells = stem_file.cell_weight(weight)
    assert by_cells.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(
        stem_file.cell_weight(weight.to(memory_format=torch.channels_last)), by_cells
    )


@pytest.mark.parametrize("use_gn", [False, True])
def test_norm_and_relu_follow_the_cells(use_gn, make_stem, with_cells, monkeypatch):
    stem, x = make_stem(use_gn, device="cpu"), torch.randn(2, 3, 26, 33)
    expected = conv_norm_relu(stem, x)
    assert not with_cells  # on the CPU
    monkeypatch.setattr(stem_file, "_half_type", lambda x: x.dtype)
    got = conv_norm_relu(stem, x)
    assert with_cells
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        weight_gradient(got, stem), weight_gradient(expected, stem), rtol=1e-3, atol=1e-3
    )
    seen = []
    stem.conv1.register_forward_hook(lambda *_: seen.append("conv1"))
    torch.testing.assert_close(conv_norm_relu(stem, x), expected)
    assert seen == ["conv1"] and len(with_cells) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(64, 96), (61, 75)])
@pytest.mark.parametrize("use_gn", [False, True])
@pytest.mark.parametrize("amp", HALF)
def test_cuda_autocast_agrees_with_fp32(amp, use_gn, size, make_stem, with_cells):
    stem, x = make_stem(use_gn), torch.randn(2, 3, *size)
    on_cpu = copy.deepcopy(stem).cpu()
    expected, pooled = conv_norm_relu(on_cpu, x), on_cpu(x)
    with torch.autocast("cuda", amp):
        got = conv_norm_relu(stem, x.cuda())
        assert relative_difference(stem(x.cuda()), pooled) < 0.02
    assert with_cells == [torch.float32] * 2
    assert got.dtype == amp and got.shape == expected.shape
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert relative_difference(got, expected) < 0.02
    gradient = weight_gradient(got, stem)
    assert gradient.dtype == torch.float32
    # Rounding moves some values over the kink of the ReLU.
    assert relative_difference(gradient, weight_gradient(expected, on_cpu)) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
def test_cuda_models_in_half_precision_take_the_cells(dtype, make_stem, with_cells):
    stem, x = make_stem(dtype=dtype), torch.randn(2, 3, 64, 96).to(dtype)
    stem.requires_grad_(False)
    expected = conv_norm_relu(copy.deepcopy(stem).cpu().float(), x.float())
    got = conv_norm_relu(stem, x.cuda())
    assert with_cells == [dtype] and got.dtype == dtype and got.grad_fn is None
    assert relative_difference(got, expected) < 0.02
    with torch.inference_mode():
        torch.testing.assert_close(conv_norm_relu(stem, x.cuda()), got)


@pytest.mark.gpu
def test_cuda_leaves_the_rest_to_the_plain_convolution(make_stem, with_cells):
    stem, x = make_stem(), torch.randn(2, 3, 64, 96, device="cuda")
    conv, norm = stem.conv1, stem.bn1
    torch.testing.assert_close(conv_norm_relu(stem, x), mynn.conv_norm(conv, norm, x, relu=True))
    seen = []
    with torch.autocast("cuda", torch.bfloat16):
        watched = x.clone().requires_grad_()
        conv_norm_relu(stem, watched).float().sum().backward()
        assert watched.grad.abs().sum() > 0
        for module in (conv, norm):
            module.register_forward_hook(lambda module, *_: seen.append(module))
        conv_norm_relu(stem, x)
    assert seen == [conv, norm] and not with_cells


@pytest.mark.gpu
def test_exported_programs_have_the_plain_convolution(make_stem, with_cells):
    stem, x = make_stem(dtype=torch.bfloat16), torch.randn(1, 3, 64, 96, device="cuda").bfloat16()
    program = torch.export.export(stem, (x,), strict=False)
    assert not with_cells
    assert relative_difference(program.module()(x), stem(x)) < 0.02
    assert with_cells


@pytest.mark.gpu
@pytest.mark.parametrize("use_gn", [False, True])
def test_cuda_graphs_record_the_cells(use_gn, make_stem, with_cells):
    stem = make_stem(use_gn)
    first, second = torch.randn(2, 2, 3, 64, 96, device="cuda")
    x = first.clone()

    def step():
        stem.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            out = stem(x)
        out.float().square().mean().backward()
        return out

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        x.copy_(second)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = step().clone()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        gradient = stem.conv1.weight.grad.clone()
        x.copy_(first)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = step()
    captured = stem.conv1.weight.grad
    x.copy_(second)
    graph.replay()
    assert len(with_cells) == 5
    torch.testing.assert_close(out, expected)
    assert relative_difference(captured, gradient) < 0.02
