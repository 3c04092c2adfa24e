"""group_norm: against torch's in float64."""

import pytest
import torch
import torch.nn.functional as F

from ops import group_norm

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# (N, C, H, W), groups: channels a group, sizes that 16 bytes do not divide, one pixel, one image
SHAPES = [
    ((2, 32, 5, 7), 32),
    ((3, 64, 8, 8), 32),
    ((2, 64, 14, 14), 8),
    ((1, 512, 9, 12), 32),
    ((2, 256, 3, 4), 4),
    ((5, 40, 1, 1), 4),
    ((2, 13, 6, 5), 13),
    ((2, 15, 7, 3), 5),
    ((2, 24, 17, 16), 1),
    ((1, 36, 11, 8), 9),
]
layouts = pytest.mark.parametrize("layout", LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
shapes = pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
fused = pytest.mark.parametrize(
    ("relu", "with_residual"), [(False, False), (True, False), (False, True), (True, True)]
)


def maps(shape, dtype, layout, count, device="cpu"):
    g = torch.Generator(device).manual_seed(0)
    drawn = [2 * torch.randn(shape, generator=g, device=device) + 0.5 for _ in range(count)]
    return [m.to(dtype).contiguous(memory_format=LAYOUTS[layout]) for m in drawn]


def parameters(channels, dtype):
    g = torch.Generator().manual_seed(1)
    weight = 1 + 0.3 * torch.randn(channels, generator=g)
    bias = 0.3 * torch.randn(channels, generator=g)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return weight.to(wide), bias.to(wide)


def plain(x, groups, weight, bias, eps, relu, residual):
    y = F.group_norm(x, groups, weight, bias, eps)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def differentiate(function, x, groups, weight, bias, relu, residual, grad, device="cpu"):
    """The result and the gradients of x, weight, bias and the residual if there is one."""
    inputs = [t.to(device).detach().requires_grad_() for t in (x, weight, bias)]
    added = None
    if residual is not None:
        added = residual.to(device).detach().requires_grad_()
        inputs.append(added)
    y = function(inputs[0], groups, inputs[1], inputs[2], 1e-5, relu, added)
    return y, torch.autograd.grad(y, inputs, grad.to(device))


def exactly(x, groups, weight, bias, relu, residual, grad):
    """In float64, of the same (rounded) inputs."""
    residual = None if residual is None else residual.double()
    arguments = (x.double(), groups, weight.double(), bias.double(), relu, residual, grad.double())
    return differentiate(plain, *arguments, x.device)


def check(result, expected, x):
    """Each tensor's error against its own largest value, which sums are rounded relative to."""
    y, grads = result
    assert y.dtype == x.dtype
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    assert y.is_contiguous(memory_format=layout)
    assert grads[0].is_contiguous(memory_format=layout)
    exact_y, exact_grads = expected
    step = {torch.float64: 1e-13, torch.float32: 2e-6}.get(x.dtype, torch.finfo(x.dtype).eps)
    for found, wanted in zip((y, *grads), (exact_y.detach(), *exact_grads), strict=True):
        found = found.detach().double()
        assert found.isfinite().all()
        # The parameters' sums are not rounded to half types.
        relative = step if found.dim() == 4 else max(1e-13, min(step, 2e-5))
        most = float(wanted.abs().max()) + 1.0
        assert float((found - wanted).abs().max()) <= relative * most


def compare(shape, groups, dtype, layout, relu, with_residual, device):
    x, residual, grad = maps(shape, dtype, layout, 3, device)
    residual = residual if with_residual else None
    weight, bias = (p.to(device) for p in parameters(shape[1], dtype))
    arguments = (x, groups, weight, bias, relu, residual, grad)
    if relu:  # a result within rounding of 0 may fall on either side
        y = plain(x.double(), groups, weight.double(), bias.double(), 1e-5, False, residual)
        arguments = (*arguments[:-1], grad.masked_fill(y.abs() < 1e-5, 0))
    expected = exactly(*arguments)
    check(differentiate(group_norm, *arguments, device), expected, x)


@layouts
@dtypes
@shapes
@fused
def test_result_and_gradients_are_the_definition_s(
    layout, dtype, shape, groups, relu, with_residual
):
    compare(shape, groups, dtype, layout, relu, with_residual, "cpu")


@layouts
@fused
@pytest.mark.parametrize("shape", [(1, 40, 90, 90), (9, 40, 30, 31)], ids=str)
def test_many_blocks_whatever_the_number_of_threads(layout, relu, with_residual, shape):
    """One image is shared out by blocks of pixels, many by image: the sums stay the same."""
    x, residual, grad = maps(shape, torch.float32, layout, 3)
    residual = residual if with_residual else None
    compare(shape, 8, torch.float32, layout, relu, with_residual, "cpu")
    arguments = (x, 8, *parameters(40, torch.float32), relu, residual, grad)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 16):
            torch.set_num_threads(count)
            results.append(differentiate(group_norm, *arguments))
    finally:
        torch.set_num_threads(threads)
    for y, grads in results[1:]:
        assert torch.equal(y, results[0][0])
        assert all(map(torch.equal, grads, results[0][1]))


def test_what_is_not_a_number_stays_so():
    """The ReLU hides no NaN."""
    (x,) = maps((2, 32, 4, 4), torch.float32, "channels_last", 1)
    x[1, 3, 2, 2] = float("nan")
    out = group_norm(x, 8, *parameters(32, torch.float32), 1e-5, relu=True)
    assert out[1, :4].isnan().all() and out[1, 4:].isfinite().all() and out[0].isfinite().all()


def steady(x, groups):
    """float64 F.group_norm without parameters."""
    return F.group_norm(x.double(), groups, eps=1e-5)


def far_from_zero(device, shape=(2, 64, 20, 24)):
    """Deviation 1 about 1,000, with a border of zeros in one of the images."""
    g = torch.Generator().manual_seed(2)
    x = 1000 + torch.randn(shape, generator=g)
    x[1, :, :, :3] = 0
    x[1, :, 0] = 0
    return x.to(device)


@layouts
def test_a_large_mean_costs_no_accuracy(layout):
    x = far_from_zero("cpu").contiguous(memory_format=LAYOUTS[layout])
    one, zero = torch.ones(64), torch.zeros(64)
    out = group_norm(x, 32, one, zero, 1e-5)
    torch.testing.assert_close(out.double(), steady(x, 32), atol=1e-3, rtol=0, check_stride=False)


def test_constant_maps_give_the_bias():
    weight, bias = parameters(32, torch.float32)
    out = group_norm(torch.full((2, 32, 4, 4), 7.0), 8, weight, bias, 1e-5)
    assert torch.equal(out, bias.view(1, -1, 1, 1).expand_as(out))


def test_views_are_taken_as_their_values():
    whole = torch.randn(2, 48, 10, 9).contiguous(memory_format=torch.channels_last)
    weight, bias = parameters(32, torch.float32)
    expected = group_norm(whole[:, 16:].contiguous(), 4, weight, bias, 1e-5)
    assert torch.equal(group_norm(whole[:, 16:], 4, weight, bias, 1e-5), expected)


@layouts
@pytest.mark.parametrize("shape", [(0, 16, 5, 4), (2, 16, 0, 4)])
def test_nothing_to_normalise(layout, shape):
    compare_empty(shape, layout, "cpu")


def compare_empty(shape, layout, device):
    x, residual, grad = maps(shape, torch.float32, layout, 3)
    weight, bias = parameters(16, torch.float32)
    y, grads = differentiate(group_norm, x, 4, weight, bias, True, residual, grad, device)
    assert y.shape == grads[0].shape == grads[3].shape == shape
    assert not grads[1].any() and not grads[2].any()


def gradcheck(device, layout, relu):
    g = torch.Generator().manual_seed(3)
    x, residual = (
        torch.randn(2, 6, 3, 4, dtype=torch.float64, generator=g)
        .to(device)
        .contiguous(memory_format=LAYOUTS[layout])
        .requires_grad_()
        for _ in range(2)
    )
    weight, bias = (p.to(device).requires_grad_() for p in parameters(6, torch.float64))
    for added in (residual, None):
        inputs = (x, weight, bias) if added is None else (x, weight, bias, added)
        assert torch.autograd.gradcheck(
            lambda x, w, b, r=None: group_norm(x, 3, w, b, 1e-5, relu, r), inputs
        )


@layouts
@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck(layout, relu):
    gradcheck("cpu", layout, relu)


def opcheck(device, layout, relu, with_residual):
    x, residual, grad = (m.to(device) for m in maps((2, 8, 3, 4), torch.float32, layout, 3))
    weight, bias = (p.to(device).requires_grad_() for p in parameters(8, torch.float32))
    added = residual.requires_grad_() if with_residual else None
    arguments = (x.requires_grad_(), weight, bias, added, 4, 1e-5, relu)
    torch.library.opcheck(torch.ops.detectron.group_norm.default, arguments)
    with torch.no_grad():
        y, mean, rstd = torch.ops.detectron.group_norm(*arguments)
        out = y if relu and with_residual else None
        arguments = [t.detach() for t in (grad, x, weight, bias, mean, rstd)]
        arguments = (*arguments, out, 4, relu)
        torch.library.opcheck(torch.ops.detectron.group_norm_backward.default, arguments)


@layouts
@fused
def test_opcheck(layout, relu, with_residual):
    opcheck("cpu", layout, relu, with_residual)


def test_it_compiles():
    x, residual, grad = maps((2, 8, 3, 4), torch.float32, "channels_last", 3)
    arguments = (x, 4, *parameters(8, torch.float32), True, residual, grad)
    compiled = torch.compile(group_norm, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(
        differentiate(compiled, *arguments)[1],
        differentiate(group_norm, *arguments)[1],
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_second_derivatives_are_refused():
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    weight, bias = parameters(4, torch.float32)
    y = group_norm(x, 2, weight, bias, 1e-5)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_wrong_arguments_are_named():
    x, weight, bias = torch.randn(2, 8, 3, 3), torch.ones(8), torch.zeros(8)
    for change, error, words in (
        ({"x": x[0]}, ValueError, r"x must be \(N, C, H, W\)"),
        ({"x": x.int()}, TypeError, "not Int"),
        ({"num_groups": 3}, ValueError, "8 channels do not divide into 3 groups"),
        ({"num_groups": 0}, ValueError, "into 0 groups"),
        ({"weight": weight[:4]}, ValueError, r"\(C,\) with C = 8"),
        ({"residual": x[:1]}, ValueError, "residual must be like x"),
        ({"residual": x.double()}, TypeError, "residual must be Float, not Double"),
    ):
        arguments = {"x": x, "num_groups": 4, "weight": weight, "bias": bias, "eps": 1e-5} | change
        with pytest.raises(error, match=words):
            group_norm(**arguments)


# ---- on a GPU -----------------------------------------------------------------------------------

# Beside those above: maps that are cut into several chunks, and one with a short last chunk.
LARGE = [
    ((2, 256, 100, 76), 32),
    ((1, 64, 201, 67), 32),
    ((2, 2048, 25, 38), 32),
    ((1, 96, 90, 91), 32),
    ((1, 1028, 50, 50), 4),
    ((2, 5, 300, 200), 5),
    ((70, 256, 14, 14), 32),
    ((3, 2048, 7, 7), 1),
    ((2, 4099, 3, 3), 1),
    ((66000, 8, 1, 2), 1),
]


@pytest.mark.gpu
@layouts
@dtypes
@pytest.mark.parametrize(("shape", "groups"), SHAPES + LARGE, ids=str)
@fused
def test_cuda_result_and_gradients_are_the_definition_s(
    layout, dtype, shape, groups, relu, with_residual
):
    compare(shape, groups, dtype, layout, relu, with_residual, "cuda")


@pytest.mark.gpu
@layouts
@pytest.mark.parametrize("shape", [(2, 64, 20, 24), (2, 64, 200, 240)])
def test_cuda_a_large_mean_costs_no_accuracy(layout, shape):
    x = far_from_zero("cuda", shape).contiguous(memory_format=LAYOUTS[layout])
    one, zero = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    out = group_norm(x, 32, one, zero, 1e-5)
    torch.testing.assert_close(out.double(), steady(x, 32), atol=1e-3, rtol=0, check_stride=False)


@pytest.mark.gpu
@layouts
@dtypes
@pytest.mark.parametrize("size", [(300, 256, 14, 14), (4, 256, 120, 100), (2, 128, 9, 9)], ids=str)
def test_cuda_repeats_bit_for_bit(layout, dtype, size):
    x, residual, grad = maps(size, dtype, layout, 3)
    arguments = (x, 32, *parameters(size[1], dtype), True, residual, grad, "cuda")
    first, *others = [differentiate(group_norm, *arguments) for _ in range(3)]
    for y, grads in others:
        assert torch.equal(y, first[0])
        assert all(map(torch.equal, grads, first[1]))


@pytest.mark.gpu
@layouts
@pytest.mark.parametrize("start", [1, 4])
def test_cuda_maps_at_odd_addresses(layout, start):
    """A view that begins in the middle of 16 bytes is read value by value."""
    x, residual, grad = maps((2, 64, 12, 10), torch.bfloat16, layout, 3)
    weight, bias = parameters(64, torch.bfloat16)
    room = torch.empty(x.numel() + start, dtype=x.dtype, device="cuda")
    shifted = room[start:].as_strided(x.shape, x.stride()).copy_(x)
    expected = differentiate(group_norm, x, 32, weight, bias, True, residual, grad, "cuda")
    found = differentiate(group_norm, shifted, 32, weight, bias, True, residual, grad, "cuda")
    torch.testing.assert_close(found[0], expected[0])
    for a, b in zip(found[1], expected[1], strict=True):  # the sums come in another order
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1.6e-2)


@pytest.mark.gpu
@layouts
@pytest.mark.parametrize("shape", [(0, 16, 5, 4), (2, 16, 0, 4)])
def test_cuda_nothing_to_normalise(layout, shape):
    compare_empty(shape, layout, "cuda")


@pytest.mark.gpu
@layouts
@pytest.mark.parametrize("relu", [False, True])
def test_cuda_gradcheck(layout, relu):
    gradcheck("cuda", layout, relu)


@pytest.mark.gpu
@layouts
@fused
def test_cuda_opcheck(layout, relu, with_residual):
    opcheck("cuda", layout, relu, with_residual)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 256, 14, 14), (2, 256, 100, 152)], ids=str)
def test_cuda_graph_replays_forward_and_backward(shape):
    x, residual, grad = (m.cuda() for m in maps(shape, torch.bfloat16, "channels_last", 3))
    weight, bias = (p.cuda().requires_grad_() for p in parameters(256, torch.bfloat16))
    x.requires_grad_(), residual.requires_grad_()
    inputs = (x, weight, bias, residual)

    def step():
        y = group_norm(x, 32, weight, bias, 1e-5, True, residual)
        return y, *torch.autograd.grad(y, inputs, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.mul_(-0.7)
    graph.replay()
    for found, wanted in zip(captured, step(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.gpu
def test_cuda_does_not_wait_for_the_device():
    x, residual, grad = maps((4, 64, 30, 20), torch.bfloat16, "channels_last", 3)
    x, residual, grad = (m.cuda() for m in (x, residual, grad))
    weight, bias = (p.cuda() for p in parameters(64, torch.bfloat16))
    torch.cuda.set_sync_debug_mode("error")
    try:
        differentiate(group_norm, x, 32, weight, bias, True, residual, grad, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@layouts
def test_cuda_indexes_beyond_two_to_the_31(layout):
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    # the last image lies beyond 2**31 values
    x = torch.zeros(9, 256, 1024, 1024, dtype=torch.bfloat16, device="cuda")
    x = x.contiguous(memory_format=LAYOUTS[layout])
    x[8, :, ::2] = 2
    weight, bias = torch.ones(256, device="cuda"), torch.zeros(256, device="cuda")
    out = group_norm(x, 32, weight, bias, 1e-5)
    assert (out[8, :, ::2] == 1).all() and (out[8, :, 1::2] == -1).all()
    assert not out[0].any()
