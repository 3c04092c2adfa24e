"""upsample_add against torch's interpolation and addition."""

import pytest
import torch
import torch.nn.functional as F

from ops import upsample_add

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    (2, 3, 5, 7),
    (1, 12, 1, 1),
    (3, 81, 4, 2),
    (2, 64, 7, 9),
    (1, 264, 3, 8),
    (2, 256, 25, 38),
]


def inputs(shape, dtype, layout, device):
    """lateral, top and a gradient, whose sums of four stay in float16's range."""
    generator = torch.Generator().manual_seed(0)
    fine = (*shape[:2], 2 * shape[2], 2 * shape[3])
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in (fine, shape, fine)]
    return [m.to(device, dtype).contiguous(memory_format=layout) for m in made]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_rounded_once(shape, layout, dtype, device):
    lateral, top, grad = inputs(shape, dtype, layout, device)
    lateral.requires_grad_()
    top.requires_grad_()
    out = upsample_add(lateral, top)
    assert out.dtype == dtype and out.stride() == lateral.stride()
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    exact = [t.detach().double().requires_grad_() for t in (lateral, top)]
    expected = exact[0] + F.interpolate(exact[1], scale_factor=2, mode="nearest")
    torch.testing.assert_close(out.double(), expected, **tolerance)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for given in (grad, grad.contiguous(), grad.contiguous(memory_format=torch.channels_last)):
        got = torch.autograd.grad(out, (lateral, top), given, retain_graph=True)
        for one, other in zip(got, wanted, strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one.double(), other, **tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_layouts_may_differ(device):
    lateral, top, _ = inputs((2, 8, 3, 4), torch.float32, torch.channels_last, device)
    expected = lateral + F.interpolate(top, scale_factor=2, mode="nearest")
    for one in (lateral, lateral.contiguous()):
        for other in (top, top.contiguous()):
            torch.testing.assert_close(upsample_add(one, other), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck(device):
    lateral, top, _ = inputs((1, 3, 2, 2), torch.float64, torch.contiguous_format, device)
    arguments = lateral.requires_grad_(), top.requires_grad_()
    assert torch.autograd.gradcheck(upsample_add, arguments, fast_mode=True)


@pytest.mark.parametrize("device", DEVICES)
def test_empty_maps(device):
    lateral = torch.empty(0, 4, 6, 8, device=device, requires_grad=True)
    top = torch.empty(0, 4, 3, 4, device=device, requires_grad=True)
    out = upsample_add(lateral, top)
    out.sum().backward()
    assert out.shape == lateral.shape and top.grad.shape == top.shape


def test_wrong_arguments_are_named():
    lateral, top, _ = inputs((1, 4, 3, 3), torch.float32, torch.contiguous_format, "cpu")
    with pytest.raises(ValueError, match="half as high and wide as lateral"):
        upsample_add(lateral[:, :, :5], top)
    with pytest.raises(TypeError, match="top must be Float"):
        upsample_add(lateral, top.double())


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    lateral, top, _ = inputs((2, 8, 3, 4), torch.float32, torch.channels_last, device)
    torch.library.opcheck(torch.ops.detectron.add_upsampled.default, (lateral, top))
    torch.library.opcheck(torch.ops.detectron.sum_2x2.default, (lateral,))
