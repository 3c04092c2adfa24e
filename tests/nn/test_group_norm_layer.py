"""Group normalisation as the networks call it, against the plain expression."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nn as mynn
from nn.group_norm import group_norm

fused = pytest.mark.parametrize(
    ("relu", "with_residual"), [(False, False), (True, False), (False, True), (True, True)]
)


def make_norm(channels=64, groups=32):
    norm = nn.GroupNorm(groups, channels, eps=1e-5)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.2 * torch.randn(channels, generator=g))
        norm.bias.copy_(0.2 * torch.randn(channels, generator=g))
    return norm


def make_maps(count, dtype=torch.float32, shape=(2, 64, 12, 10)):
    g = torch.Generator().manual_seed(1)
    maps = [torch.randn(shape, generator=g).to(dtype) for _ in range(count)]
    return [m.contiguous(memory_format=torch.channels_last) for m in maps]


def plain(norm, x, relu, residual):
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


@fused
def test_on_the_cpu_it_does_what_the_plain_expression_does(relu, with_residual):
    norm, (x, residual) = make_norm(), make_maps(2)
    residual = residual if with_residual else None
    out = group_norm(norm, x, relu, residual)
    torch.testing.assert_close(out, plain(norm, x, relu, residual), atol=2e-6, rtol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_gradients_on_the_cpu():
    norm, (x, residual, grad) = make_norm(), make_maps(3)
    inputs = (x.requires_grad_(), residual.requires_grad_(), norm.weight, norm.bias)
    found = torch.autograd.grad(group_norm(norm, x, True, residual), inputs, grad)
    wanted = torch.autograd.grad(plain(norm, x, True, residual), inputs, grad)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_it_is_an_operator_when_compiled_and_plain_when_exported():
    block, (x,) = Block(group_norm), make_maps(1)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(block, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))
    operator = torch.ops.detectron.group_norm
    assert any(node.target is operator for node in graphs[0].graph.nodes)
    seen = []
    block.norm.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(torch.compile(block, backend="aot_eager")(x), block(x))
    assert len(seen) == 2
    block.norm._forward_hooks.clear()
    program = torch.export.export(block, (x,), strict=False)
    assert not any("detectron" in str(node.target) for node in program.graph.nodes)


class Block(nn.Module):
    """Convolution, norm, residual and ReLU as in a bottleneck."""

    def __init__(self, through):
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.norm = make_norm()
        self.through = through

    def forward(self, x):
        return self.through(self.norm, self.conv(x), True, x)


@pytest.mark.gpu
def test_cuda_under_autocast_stays_in_half_types_and_layout():
    block = Block(group_norm).cuda().to(memory_format=torch.channels_last)
    (x,) = make_maps(1)
    with torch.autocast("cuda", torch.bfloat16):
        out = block(x.cuda())
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_cuda_under_autocast_is_about_as_close_to_float32_as_torch_s_own():
    """A step of two blocks against float32 throughout. torch's own rounds no norm's result."""
    torch.manual_seed(0)
    ours = nn.Sequential(Block(group_norm), Block(group_norm)).cuda()
    ours.to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    for block in theirs:
        block.through = plain
    (x,) = make_maps(1)

    def step(model, amp):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            out = model(x.cuda())
        out.float().square().mean().backward()
        return out.detach().float(), [p.grad.float() for p in model.parameters()]

    exact, exact_grads = step(theirs, False)
    found, grads = step(ours, True)
    other, other_grads = step(theirs, True)
    pairs = [(found, other, exact), *zip(grads, other_grads, exact_grads, strict=True)]
    for a, b, e in pairs:
        assert (a - e).norm() <= 2.5 * (b - e).norm() + 2e-3 * e.norm()


@pytest.mark.gpu
@fused
def test_cuda_in_float32_agrees_with_torch_s_own(relu, with_residual):
    norm, (x, residual, grad) = make_norm().cuda(), make_maps(3)
    x, residual, grad = (m.cuda().requires_grad_() for m in (x, residual, grad))
    residual = residual if with_residual else None
    inputs = [t for t in (x, residual, norm.weight, norm.bias) if t is not None]
    found = group_norm(norm, x, relu, residual)
    wanted = plain(norm, x, relu, residual)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5, check_stride=False)
    for a, b in zip(
        torch.autograd.grad(found, inputs, grad),
        torch.autograd.grad(wanted, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, check_stride=False)


@pytest.mark.gpu
def test_cuda_half_precision_parameters_work():
    norm, (x,) = make_norm().cuda().bfloat16(), make_maps(1, torch.bfloat16)
    out = group_norm(norm, x.cuda(), relu=True)
    wanted = plain(make_norm(), x.float(), True, None).bfloat16()
    torch.testing.assert_close(out.cpu(), wanted, atol=0.02, rtol=0.02)
    out.float().sum().backward()
    assert norm.weight.grad.dtype == torch.bfloat16


def test_the_layers_of_a_network_are_normalised_through_it(monkeypatch):
    """conv_norm hands its norm, ReLU and residual on."""
    calls = []
    monkeypatch.setattr("nn.convolution.group_norm", lambda *args: calls.append(args) or args[1])
    norm, (x,) = make_norm(), make_maps(1)
    mynn.conv_norm(nn.Conv2d(64, 64, 1, bias=False), norm, x, relu=True, residual=x)
    ((given, _, relu, residual),) = calls
    assert given is norm and relu and residual is x
