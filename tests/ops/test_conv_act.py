"""conv_act and the operators it is made of, against torch's own layers one after the other."""

import pytest
import torch
import torch.nn.functional as F

from ops import conv_act

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# 1 pixel, odd numbers of channels, vectors that fit and that do not, several blocks of channels.
SHAPES = [(2, 3, 5, 7), (1, 12, 6, 4), (3, 81, 4, 4), (2, 64, 7, 9), (1, 264, 3, 8), (5, 256, 1, 1)]
EPILOGUE = torch.ops.detectron


def maps(shape, dtype, layout, device, count=1):
    generator = torch.Generator().manual_seed(sum(shape))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [m.to(device, dtype).contiguous(memory_format=layout) for m in made]


def epsilon(dtype):
    """Relative tolerance of one rounding."""
    return 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_residual_and_relu_are_rounded_once(shape, layout, dtype, device):
    y, residual = maps(shape, dtype, layout, device, 2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for bias_dtype in {dtype, wide}:
        bias = torch.linspace(-2, 2, shape[1]).to(device, bias_dtype)
        for b in (None, bias):
            for r in (None, residual):
                for relu in (False, True):
                    expected = y.double()
                    expected = expected if b is None else expected + b.double().view(-1, 1, 1)
                    expected = expected if r is None else expected + r.double()
                    expected = expected.relu() if relu else expected
                    out = y.clone()
                    EPILOGUE.bias_act_(out, b, r, relu)
                    assert out.stride() == y.stride()
                    torch.testing.assert_close(
                        out.double(), expected, rtol=epsilon(dtype), atol=epsilon(wide)
                    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (1, 81, 4, 2), (2, 64, 10, 6), (1, 264, 2, 4)])
def test_a_residual_of_half_the_size_is_upsampled(shape, layout, dtype, device):
    (y,) = maps(shape, dtype, layout, device)
    small = (*shape[:2], shape[2] // 2, shape[3] // 2)
    (residual,) = maps(small, dtype, layout, device)
    bias = torch.linspace(-1, 1, shape[1], device=device, dtype=dtype)
    expected = y.double() + bias.double().view(-1, 1, 1)
    expected = expected + F.interpolate(residual.double(), scale_factor=2, mode="nearest")
    EPILOGUE.bias_act_(y, bias, residual, True)
    tolerance = {"rtol": epsilon(dtype), "atol": 1e-6}
    torch.testing.assert_close(y.double(), expected.relu(), **tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 256, 60, 50), (2, 6, 70, 90), (1, 2048, 33, 20)])
def test_masked_gradient_and_bias_gradient(shape, layout, dtype, device):
    y, grad = maps(shape, dtype, layout, device, 2)
    for given in (grad, grad.contiguous(), grad.contiguous(memory_format=torch.channels_last)):
        masked, total = EPILOGUE.relu_backward(given, y, True)
        assert torch.equal(masked, torch.where(y <= 0, 0, grad))
        assert masked.stride() == y.stride()
        expected = masked.double().sum((0, 2, 3))
        scale = masked.double().abs().sum((0, 2, 3)).max()
        tolerance = {"rtol": 0, "atol": float(scale) * 1e-6}
        torch.testing.assert_close(total.double(), expected, **tolerance)
        alone, none = EPILOGUE.relu_backward(given, y, False)
        assert torch.equal(alone, masked) and len(none) == 0
        # Without ReLU; and what is computed twice comes out equal.
        torch.testing.assert_close(EPILOGUE.channel_sum(masked).double(), expected, **tolerance)
        assert torch.equal(EPILOGUE.relu_backward(given, y, True)[1], total)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_a_number_stays_so(device):
    y = torch.full((1, 8, 2, 2), torch.nan, device=device)
    EPILOGUE.bias_act_(y, None, None, True)
    assert y.isnan().all()
    masked, total = EPILOGUE.relu_backward(torch.full_like(y, torch.inf), torch.ones_like(y), True)
    assert masked.isinf().all() and total.isinf().all()


@pytest.mark.parametrize("device", DEVICES)
def test_views_at_odd_addresses(device):
    """Neither vectors of 16 bytes nor pixels of whole vectors."""
    store = torch.randn(2 * 16 * 3 * 5 + 1, device=device, dtype=torch.bfloat16)
    y = store[1:].view(2, 3, 5, 16).permute(0, 3, 1, 2)
    expected = (y.float() + 1).relu()
    grad = torch.randn_like(y)
    assert torch.equal(EPILOGUE.relu_backward(grad, y, False)[0], torch.where(y <= 0, 0, grad))
    EPILOGUE.bias_act_(y, torch.ones(16, device=device), None, True)
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_empty_maps(device):
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3)):
        y = torch.empty(shape, device=device)
        EPILOGUE.bias_act_(y, torch.ones(4, device=device), y.clone(), True)
        masked, total = EPILOGUE.relu_backward(y, y, True)
        assert masked.shape == shape and torch.equal(total, torch.zeros(4, device=device))
    x = torch.empty(0, 3, 8, 8, device=device, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
    out = conv_act(x, weight, bias=torch.ones(4, device=device), relu=True, padding=(1, 1))
    assert out.shape == (0, 4, 8, 8)
    out.sum().backward()
    assert not weight.grad.any()


# name -> (shape of x, shape of weight, geometry)
CONVOLUTIONS = {
    "1x1": ((2, 4, 6, 6), (5, 4, 1, 1), {}),
    "3x3": ((2, 4, 7, 6), (6, 2, 3, 3), {"stride": (2, 2), "padding": (1, 1), "groups": 2}),
    "dilated": ((1, 3, 8, 8), (4, 3, 3, 3), {"padding": (2, 2), "dilation": (2, 2)}),
    "transposed": ((2, 3, 4, 5), (3, 4, 2, 2), {"stride": (2, 2), "transposed": True}),
}


def plain(
    x, weight, scale=None, bias=None, residual=None, relu=False, transposed=False, **geometry
):
    """The same from torch's layers."""
    weight = weight if scale is None else weight * scale.view(-1, 1, 1, 1)
    convolution = F.conv_transpose2d if transposed else F.conv2d
    out = convolution(x, weight, bias, **geometry)
    if residual is not None:
        if residual.shape != out.shape:
            residual = F.interpolate(residual, scale_factor=2, mode="nearest")
        out = out + residual
    return out.relu() if relu else out


def case(name, device, with_scale, with_bias, residual, relu, layout=torch.contiguous_format):
    """Float64 inputs that need gradients, and the other arguments."""
    x_shape, weight_shape, geometry = CONVOLUTIONS[name]
    generator = torch.Generator().manual_seed(3)

    def leaf(*shape):
        made = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        made = made.contiguous(memory_format=layout) if made.dim() == 4 else made
        return made.requires_grad_()

    tensors = {"x": leaf(*x_shape), "weight": leaf(*weight_shape)}
    with torch.no_grad():
        out = plain(**tensors, **geometry)
    if with_bias:
        tensors["bias"] = leaf(out.shape[1])
    if residual == "same":
        tensors["residual"] = leaf(*out.shape)
    elif residual == "half":
        tensors["residual"] = leaf(*out.shape[:2], out.shape[2] // 2, out.shape[3] // 2)
    fixed = {**geometry, "relu": relu}
    if with_scale:
        fixed["scale"] = leaf(out.shape[1]).detach()
    return tensors, fixed


CASES = [  # convolution, scale, bias, residual, relu
    ("1x1", True, True, "same", True),
    ("1x1", False, True, "half", False),
    ("1x1", False, False, None, False),
    ("3x3", True, True, None, True),
    ("3x3", False, False, "same", True),
    ("dilated", False, True, None, True),
    ("dilated", True, False, "half", True),
    ("transposed", False, True, None, True),
    ("transposed", False, True, None, False),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_output_and_gradients_are_those_of_single_layers(arguments, layout, device):
    tensors, fixed = case(arguments[0], device, *arguments[1:], layout)
    expected, out = plain(**tensors, **fixed), conv_act(**tensors, **fixed)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, list(tensors.values()), grad)
    got = torch.autograd.grad(out, list(tensors.values()), grad)
    for name, one, other in zip(tensors, got, wanted, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("arguments", CASES[:2] + CASES[-2:-1], ids=str)
def test_gradcheck(arguments, device):
    tensors, fixed = case(arguments[0], device, *arguments[1:])

    def function(*values):
        return conv_act(**dict(zip(tensors, values, strict=True)), **fixed)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "residual"])
def test_what_needs_no_gradient_gets_none(frozen, device):
    tensors, fixed = case("1x1", device, True, True, "same", True)
    tensors[frozen].requires_grad_(False)
    needing = [t for t in tensors.values() if t.requires_grad]
    wanted = torch.autograd.grad(plain(**tensors, **fixed).square().sum(), needing)
    got = torch.autograd.grad(conv_act(**tensors, **fixed).square().sum(), needing)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("device", DEVICES)
def test_without_gradients_nothing_is_kept(device):
    tensors, fixed = case("3x3", device, True, True, None, True)
    expected = plain(**tensors, **fixed)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = conv_act(**tensors, **fixed)
        assert out.grad_fn is None
        torch.testing.assert_close(out.clone(), expected.detach())
    frozen = {name: t.detach() for name, t in tensors.items()}
    assert conv_act(**frozen, **fixed).grad_fn is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arguments", CASES, ids=str)
def test_autocast_rounds_like_layers_and_keeps_master_gradients(arguments, dtype, device):
    tensors, fixed = case(arguments[0], device, *arguments[1:], torch.channels_last)
    exact = plain(**tensors, **fixed)
    wanted = torch.autograd.grad(exact.square().sum(), list(tensors.values()))
    narrow = {name: t.detach().float().requires_grad_() for name, t in tensors.items()}
    if "scale" in fixed:
        fixed["scale"] = fixed["scale"].float()
    with torch.autocast(device, dtype):
        out = conv_act(**narrow, **fixed)
        loss = out.float().square().sum()
    assert out.dtype == dtype
    loss.backward()
    error = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        out.double(), exact, rtol=error, atol=error * float(exact.detach().abs().max())
    )
    for name, expected in zip(narrow, wanted, strict=True):
        got = narrow[name].grad
        assert got.dtype == torch.float32
        largest = float(expected.abs().max())
        torch.testing.assert_close(got.double(), expected, rtol=0.1, atol=4 * error * largest)


def test_a_second_derivative_is_refused():
    tensors, fixed = case("1x1", "cpu", False, True, None, True)
    loss = conv_act(**tensors, **fixed).sum()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(loss, tensors["x"], create_graph=True)


def test_wrong_arguments_are_named():
    y = torch.zeros(1, 4, 4, 6)
    with pytest.raises(ValueError, match=r"bias must be \(C,\) with C = 4"):
        EPILOGUE.bias_act_(y, torch.zeros(3), None, False)
    with pytest.raises(ValueError, match="or of half that height and width"):
        EPILOGUE.bias_act_(y, None, torch.zeros(1, 4, 2, 2), False)
    with pytest.raises(TypeError, match="residual must be Float"):
        EPILOGUE.bias_act_(y, None, y.double(), False)
    with pytest.raises(ValueError, match="grad must be like y"):
        EPILOGUE.relu_backward(y[:, :2], y, False)
    with pytest.raises(ValueError, match=r"x must be \(N, C, H, W\)"):
        conv_act(y[0], torch.zeros(4, 4, 1, 1))
    with pytest.raises(ValueError, match="not transposed"):
        conv_act(y, torch.zeros(4, 4, 1, 1), scale=torch.ones(4), transposed=True)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    y, other = maps((2, 8, 4, 6), torch.float32, torch.channels_last, device, 2)
    bias = torch.ones(8, device=device)
    half = torch.ones(2, 8, 2, 3, device=device)
    for residual in (None, other, half):
        torch.library.opcheck(EPILOGUE.bias_act_.default, (y, bias, residual, True))
    for with_sum in (True, False):
        torch.library.opcheck(EPILOGUE.relu_backward.default, (other, y, with_sum))
    torch.library.opcheck(EPILOGUE.channel_sum.default, (y,))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 256, 100, 152), (64, 256, 7, 7), (2, 81, 200, 200)])
def test_cuda_agrees_with_the_cpu_on_large_maps(shape):
    y, residual, grad = maps(shape, torch.bfloat16, torch.channels_last, "cpu", 3)
    bias = torch.linspace(-1, 1, shape[1])
    on_gpu = [t.cuda() for t in (y, bias, residual, grad)]
    EPILOGUE.bias_act_(on_gpu[0], *on_gpu[1:3], True)
    EPILOGUE.bias_act_(y, bias, residual, True)
    assert torch.equal(on_gpu[0].cpu(), y)
    masked, total = EPILOGUE.relu_backward(on_gpu[3], on_gpu[0], True)
    expected, expected_total = EPILOGUE.relu_backward(grad, y, True)
    assert torch.equal(masked.cpu(), expected)
    torch.testing.assert_close(total.cpu(), expected_total, rtol=1e-3, atol=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trained", [False, True])
def test_what_is_not_finite_comes_through_relu(trained, layout, dtype, bad):
    """A network that diverges must not look healthy behind ReLU: NaN stays NaN, as in layers."""
    x, residual = (
        m.requires_grad_(trained) for m in maps((2, 64, 12, 16), dtype, layout, "cuda", 2)
    )
    weight = torch.linspace(-1, 1, 64 * 64, device="cuda", dtype=dtype).view(64, 64, 1, 1)
    bias = torch.zeros(64, device="cuda", dtype=dtype)
    with torch.no_grad():
        x[0, 3, 4, 5] = bad
        x[0, 40, 4, 5] = bad
    for added in (None, residual):
        out = conv_act(x, weight, bias=bias, residual=added, relu=True)
        expected = F.conv2d(x, weight, bias)
        expected = F.relu(expected if added is None else expected + added)
        assert not expected.isfinite().all()
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())
