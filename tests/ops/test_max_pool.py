"""max_pool against torch's own, which it is on the CPU and where there is a gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ops


def plain(x):
    return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class Called(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize(
    "shape", [(2, 64, 12, 10), (1, 5, 7, 9), (3, 16, 1, 1), (2, 3, 2, 5), (0, 4, 6, 6)], ids=str
)
def test_cuda_values_are_torchs(layout, dtype, shape):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=torch.float64).to("cuda", dtype)
    x = x.contiguous(memory_format=layout)
    out = ops.max_pool(x)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=layout) or not len(x)
    assert torch.equal(out, plain(x))


@pytest.mark.gpu
def test_cuda_nan_and_infinity_come_through():
    x = torch.full((1, 8, 6, 6), -torch.inf, device="cuda")
    x[0, 0, 2, 2], x[0, 1, 5, 5], x[0, 2, 0] = torch.nan, torch.inf, torch.nan
    x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ops.max_pool(x), plain(x), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_with_a_gradient_it_is_torchs_own(device):
    x = torch.randn(2, 8, 7, 6, device=device, requires_grad=True)
    with Called() as called:
        out = ops.max_pool(x)
    assert not any("detectron" in name for name in called.names)
    (found,) = torch.autograd.grad(out.square().sum(), x)
    (wanted,) = torch.autograd.grad(plain(x).square().sum(), x)
    assert torch.equal(found, wanted)
    with torch.no_grad(), Called() as called:
        assert torch.equal(ops.max_pool(x), plain(x))
    assert any("detectron" in name for name in called.names) == (device == "cuda")


@pytest.mark.gpu
def test_cuda_slices_opcheck_and_wrong_arguments():
    x = torch.randn(2, 33, 9, 8, device="cuda").contiguous(memory_format=torch.channels_last)
    for part in (x[:, 1:], x[:, :, 1:, 2:], x.transpose(2, 3), x[1:]):
        assert torch.equal(ops.max_pool(part), plain(part))
    torch.library.opcheck(torch.ops.detectron.max_pool.default, (x[:, 1:],))
    with pytest.raises(ValueError, match="x must be"):
        ops.max_pool(x[0])
    with pytest.raises(TypeError, match="must be float32"):
        ops.max_pool(x.int())
