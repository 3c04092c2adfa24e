"""Convolutions with what follows them, against the layers one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import nn as mynn
import ops
from modeling.FPN import topdown_lateral_module
from modeling.ResNet import Bottleneck


def filled(module):
    """The module with random affine layers."""
    torch.manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, mynn.AffineChannel2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)
    return module


def run(module, *inputs):
    """Output, and the gradients of inputs and parameters for a fixed loss; all float64."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    trained = [p for p in module.parameters() if p.requires_grad]
    out = module(*inputs)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    grads = torch.autograd.grad((out.float() * weight).sum(), [*inputs, *trained])
    return [t.double() for t in (out, *grads)]


def relative_difference(one, other):
    return float((one.cpu() - other.cpu()).norm() / other.cpu().norm())


def force_fusion(monkeypatch):
    """Take the fused operator on the CPU too."""
    monkeypatch.setattr("nn.convolution._fused", lambda x: True)


@pytest.mark.parametrize("stride, dim_in", [(1, 32), (2, 16)])
def test_the_fused_bottleneck_equals_the_plain_one(cfg, monkeypatch, stride, dim_in):
    block = filled(Bottleneck(dim_in, 32, 8, stride, 1))
    x = torch.randn(2, dim_in, 10, 12)
    plain = run(block, x)
    force_fusion(monkeypatch)
    for fused, expected in zip(run(block, x), plain, strict=True):
        torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_gn", [False, True])
def test_the_fused_step_down_the_pyramid_equals_the_plain_one(cfg, monkeypatch, use_gn):
    cfg.FPN.USE_GN = use_gn
    module = topdown_lateral_module(8, 64)
    top, lateral = torch.randn(2, 64, 3, 4), torch.randn(2, 8, 6, 8)
    plain = run(module, top, lateral)
    force_fusion(monkeypatch)
    for fused, expected in zip(run(module, top, lateral), plain, strict=True):
        torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_gn", [False, True])
def test_the_compiled_step_down_the_pyramid_equals_the_plain_one(cfg, use_gn):
    cfg.FPN.USE_GN = use_gn
    module = topdown_lateral_module(8, 64)
    top, lateral = torch.randn(2, 64, 3, 4), torch.randn(2, 8, 6, 8)
    plain = run(module, top, lateral)
    module.compile(backend="aot_eager", fullgraph=True)
    for compiled, expected in zip(run(module, top, lateral), plain, strict=True):
        torch.testing.assert_close(compiled, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(top.bfloat16(), lateral).dtype == torch.bfloat16


def test_a_stack_is_its_layers_one_by_one(monkeypatch):
    layers = nn.Sequential(
        *(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(6, 8, 3, bias=False), nn.GroupNorm(2, 8), nn.ReLU(inplace=True)),
        *(nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True)),
    )
    x = torch.randn(2, 4, 7, 7)
    expected = layers(x)
    torch.testing.assert_close(mynn.conv_stack(layers, x), expected)
    force_fusion(monkeypatch)
    torch.testing.assert_close(mynn.conv_stack(layers, x), expected)


def test_a_deconvolution_takes_bias_and_relu(monkeypatch):
    layer, x = nn.ConvTranspose2d(4, 6, 2, stride=2), torch.randn(2, 4, 5, 5)
    expected = layer(x).relu()
    assert torch.equal(mynn.conv_norm(layer, None, x, relu=True), expected)
    force_fusion(monkeypatch)
    torch.testing.assert_close(mynn.conv_norm(layer, None, x, relu=True), expected)


def test_frozen_blocks_keep_nothing_for_backward(cfg, monkeypatch):
    block = filled(Bottleneck(16, 32, 8, 2, 1)).requires_grad_(False)
    force_fusion(monkeypatch)
    assert block(torch.randn(1, 16, 8, 8)).grad_fn is None


@pytest.mark.gpu
def test_compilers_see_the_plain_expression(cfg):
    block = filled(Bottleneck(16, 32, 8, 2, 1)).cuda()
    x = torch.randn(1, 16, 8, 8, device="cuda")
    program = torch.export.export(block, (x,), strict=False)
    assert "detectron" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), block(x), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("stride, dim_in", [(1, 256), (2, 128)])
def test_cuda_bottleneck_in_bf16_agrees_with_fp32(cfg, stride, dim_in):
    block = filled(Bottleneck(dim_in, 256, 64, stride, 1))
    x = torch.randn(4, dim_in, 24, 20)
    expected = run(block, x)
    on_gpu = copy.deepcopy(block).to("cuda", memory_format=torch.channels_last)
    data = x.cuda().contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        assert on_gpu(data).dtype == torch.bfloat16
        got = run(on_gpu, data)
    assert relative_difference(got[0], expected[0]) < 0.02
    # Rounding moves some values over the kink of a ReLU, and their gradients come or go as a whole.
    for one, other in zip(got[1:], expected[1:], strict=True):
        assert relative_difference(one, other) < 0.15


@pytest.mark.gpu
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_cuda_fused_and_plain_agree(cfg, monkeypatch, amp):
    block = filled(Bottleneck(128, 256, 64, 2, 1)).to("cuda", memory_format=torch.channels_last)
    down = topdown_lateral_module(256, 64).to("cuda", memory_format=torch.channels_last)
    data = torch.randn(2, 128, 32, 24, device="cuda").contiguous(memory_format=torch.channels_last)
    top = torch.randn(2, 64, 8, 6, device="cuda").contiguous(memory_format=torch.channels_last)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.down = block, down

        def forward(self, x, top):
            with torch.autocast("cuda", amp, enabled=amp is not None):
                top = top if amp is None else top.to(amp)
                out = self.down(top, self.block(x))
                assert out.is_contiguous(memory_format=torch.channels_last)
                return out

    fused = run(Both(), data, top)
    monkeypatch.setattr("nn.convolution._fused", lambda x: False)
    for one, other in zip(fused, run(Both(), data, top), strict=True):
        assert relative_difference(one, other) < (0.01 if amp is None else 0.15)


@pytest.mark.gpu
def test_cuda_graphs_capture_forward_and_backward(cfg):
    block = filled(Bottleneck(64, 64, 32, 1, 1)).to("cuda", memory_format=torch.channels_last)
    conv = nn.Conv2d(64, 12, 1).to("cuda", memory_format=torch.channels_last)
    data = torch.randn(2, 64, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last)
    parameters = [*(p for p in block.parameters() if p.requires_grad), *conv.parameters()]
    half = torch.randn(2, 64, 8, 8, device="cuda")

    def step():
        for p in parameters:
            p.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            x = ops.upsample_add(block(data), half.bfloat16())
            out = mynn.conv_norm(conv, None, x)
        out.float().square().mean().backward()
        return out

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = step().clone()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        gradients = [p.grad.clone() for p in parameters]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = step()
    captured = [p.grad for p in parameters]
    for tensor in (out, *captured):
        tensor.detach().zero_()
    graph.replay()
    torch.testing.assert_close(out, expected)
    for got, wanted in zip(captured, gradients, strict=True):
        assert relative_difference(got, wanted) < 0.01


def hooks_are_called(device: str) -> None:
    conv, norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), filled(mynn.AffineChannel2d(8))
    conv, norm = conv.to(device), norm.to(device)
    x = torch.randn(2, 8, 6, 5, device=device, requires_grad=True)
    expected = mynn.conv_norm(conv, norm, x, relu=True, residual=x)
    seen = []
    for module in (conv, norm):
        module.register_forward_hook(lambda module, _, out: seen.append((module, out.sum())))
        module.register_full_backward_hook(lambda module, *_: seen.append((module, None)))
    out = mynn.conv_norm(conv, norm, x, relu=True, residual=x)
    out.sum().backward()
    assert [module for module, _ in seen] == [conv, norm, norm, conv]
    assert relative_difference(out.detach(), expected.detach()) < 5e-3


def test_hooks_of_a_convolution_and_its_norm_are_called():
    hooks_are_called("cpu")


@pytest.mark.gpu
def test_hooks_are_called_on_a_gpu():
    hooks_are_called("cuda")
