"""roi_align: against the definition, torchvision, golden values; CUDA against the CPU."""

import math

import numpy as np
import pytest
import roi_cases
import torch
import torchvision
from roi_cases import LAYOUTS, SCALES, pyramid, random_rois

from ops import roi_align

layouts = pytest.mark.parametrize("layout", LAYOUTS)


def bilinear(plane, y, x):
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    top = plane[y0, x0] * (1 - (x - x0)) + plane[y0, x1] * (x - x0)
    bottom = plane[y1, x0] * (1 - (x - x0)) + plane[y1, x1] * (x - x0)
    return top * (1 - (y - y0)) + bottom * (y - y0)


def reference(feature, roi, size, scale, ratio, aligned=False):
    """The definition for one RoI, sample by sample in float64."""
    shift = 0.5 if aligned else 0.0
    image, x1, y1, x2, y2 = roi.tolist()
    x1, y1, x2, y2 = (v * scale - shift for v in (x1, y1, x2, y2))
    least = 0.0 if aligned else 1.0
    width, height = max(x2 - x1, least), max(y2 - y1, least)
    bin_w, bin_h = width / size, height / size
    ny, nx = ratio or math.ceil(bin_h), ratio or math.ceil(bin_w)
    out = np.zeros((feature.shape[1], size, size))
    for c in range(feature.shape[1]):
        plane = feature[int(image), c].double().numpy()
        for by in range(size):
            for bx in range(size):
                samples = [
                    bilinear(
                        plane,
                        y1 + (by + (i + 0.5) / ny) * bin_h,
                        x1 + (bx + (j + 0.5) / nx) * bin_w,
                    )
                    for i in range(ny)
                    for j in range(nx)
                ]
                out[c, by, bx] = sum(samples) / max(len(samples), 1)
    return out


def pool_and_differentiate(features, rois, levels, scales, ratio, weight):
    def pool(*inputs):
        features, rois, levels, scales = inputs
        return roi_align(features, rois, 7, scales, ratio, levels)

    return roi_cases.pool_and_differentiate(pool, features, rois, levels, scales, weight)


@layouts
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 2])
def test_is_the_mean_of_bilinear_samples(layout, aligned, ratio):
    feature = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    feature = feature.contiguous(memory_format=LAYOUTS[layout])
    rois = random_rois(12, extent=150.0)
    rois[0, 3:] = rois[0, 1:3] + 0.5  # smaller than a feature pixel
    out = roi_align(feature, rois, 5, 1 / 8, ratio, aligned=aligned)
    assert out.is_contiguous(memory_format=LAYOUTS[layout])
    for row, roi in zip(out, rois, strict=True):
        expected = reference(feature, roi, 5, 1 / 8, ratio, aligned)
        np.testing.assert_allclose(row.numpy(), expected, atol=2e-5)


def test_golden_values(shared):
    golden = np.load(shared / "golden" / "units" / "layers.npz")
    feature, rois = torch.from_numpy(golden["ra_feat"]), torch.from_numpy(golden["ra_rois"])
    for key, size, ratio in (
        ("roi_align_sr0", 7, 0),
        ("roi_align_sr2", 7, 2),
        ("roi_align_14_sr0", 14, 0),
    ):
        out = roi_align(feature, rois, size, 1 / 16, ratio)
        np.testing.assert_allclose(out.numpy(), golden[key], atol=2e-6)


@layouts
@pytest.mark.parametrize("ratio", [0, 2])
def test_output_and_gradient_agree_with_torchvision(layout, ratio):
    feature = torch.randn(2, 33, 40, 50).contiguous(memory_format=LAYOUTS[layout])
    rois, weight = random_rois(60, extent=400.0), torch.randn(60, 33, 7, 7)
    out, (grad,) = pool_and_differentiate([feature], rois, None, [1 / 8], ratio, weight)
    other = feature.detach().clone().requires_grad_()
    expected = torchvision.ops.roi_align(other, rois, 7, 1 / 8, ratio, aligned=False)
    expected.backward(weight)
    torch.testing.assert_close(out, expected.detach(), atol=1e-5, rtol=1e-5, check_stride=False)
    torch.testing.assert_close(grad, other.grad, atol=1e-4, rtol=1e-5, check_stride=False)
    assert grad.is_contiguous(memory_format=LAYOUTS[layout])


@layouts
def test_levels_in_one_call_are_the_levels_one_by_one(layout):
    features, scales = pyramid(layout=layout), SCALES
    rois, levels = random_rois(50), torch.randint(0, 4, (50,))
    weight = torch.randn(50, 8, 7, 7)
    out, grads = pool_and_differentiate(features, rois, levels, scales, 2, weight)
    for k in range(4):
        rows = levels == k
        alone, (grad,) = pool_and_differentiate(
            features[k : k + 1], rois[rows], None, scales[k : k + 1], 2, weight[rows]
        )
        assert torch.equal(out[rows], alone)
        torch.testing.assert_close(grads[k], grad)


@layouts
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_accumulate_in_float32(layout, dtype):
    features, scales = pyramid(dtype=dtype, layout=layout), SCALES
    rois, levels, weight = random_rois(30), torch.randint(0, 4, (30,)), torch.randn(30, 8, 7, 7)
    weight = weight.to(dtype)
    out, grads = pool_and_differentiate(features, rois, levels, scales, 0, weight)
    exact, exact_grads = pool_and_differentiate(
        [f.float() for f in features], rois, levels, scales, 0, weight
    )
    assert out.dtype == dtype and grads[0].dtype == dtype
    torch.testing.assert_close(out, exact.to(dtype))  # one rounding, at the end
    for grad, expected in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad, expected.to(dtype))


ODD_ROIS = torch.tensor(
    [
        [-1, 0, 0, 50, 50],  # a padding row
        [2, 0, 0, 50, 50],  # no such image
        [float("nan"), 0, 0, 50, 50],
        [0, float("nan"), 0, 50, 50],
        [0, 0, 0, float("inf"), 50],
        [0, -3e38, 0, 3e38, 50],
        [0, 1000, 1000, 1100, 1100],  # off the map
        [0, 0, 0, 50, 50],  # on no level, see below
    ]
)


@layouts
@pytest.mark.parametrize("ratio", [0, 2])
def test_rois_that_point_nowhere_give_zeros_and_no_gradient(layout, ratio):
    features, scales = pyramid(layout=layout), SCALES
    levels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 7])
    weight = torch.ones(len(ODD_ROIS), 8, 7, 7)
    out, grads = pool_and_differentiate(features, ODD_ROIS, levels, scales, ratio, weight)
    assert not out.any()
    assert not any(grad.any() for grad in grads)


def test_huge_and_inverted_rois_are_finite_and_quick():
    features, scales = pyramid(), SCALES
    rois = torch.tensor([[0, -1e7, -1e7, 1e7, 1e7], [0, 60, 60, 20, 20.0]])
    for aligned in (False, True):
        for ratio in (0, 2):
            out = roi_align(features[0], rois, 7, scales[0], ratio, aligned=aligned)
            assert out.isfinite().all()
    inverted = roi_align(features[0], rois[1:], 1, scales[0], 2)
    one_pixel = roi_align(features[0], torch.tensor([[0, 60, 60, 64, 64.0]]), 1, scales[0], 2)
    torch.testing.assert_close(inverted, one_pixel)


def test_no_rois_and_no_images():
    features, scales = pyramid(), SCALES
    none = torch.zeros(0, 5)
    out, grads = pool_and_differentiate(
        features, none, torch.zeros(0, dtype=torch.int64), scales, 2, torch.zeros(0, 8, 7, 7)
    )
    assert out.shape == (0, 8, 7, 7)
    assert not any(grad.any() for grad in grads)
    assert roi_align(torch.zeros(0, 3, 8, 8), none, (2, 3), 1.0, 2).shape == (0, 3, 2, 3)


def test_features_and_rois_may_be_views():
    feature = torch.randn(2, 8, 20, 20)
    rois = random_rois(10)
    expected = roi_align(feature[:, :4].contiguous(), rois, 7, 0.1, 2)
    assert torch.equal(roi_align(feature[:, :4], rois, 7, 0.1, 2), expected)
    wide = torch.cat([rois, rois], dim=1)
    assert torch.equal(roi_align(feature[:, :4], wide[:, :5], 7, 0.1, 2), expected)


@layouts
@pytest.mark.parametrize("ratio", [0, 2])
def test_gradcheck(layout, ratio):
    g = torch.Generator().manual_seed(3)
    features = [
        torch.randn(2, 2, size, size + 1, dtype=torch.float64, generator=g)
        .contiguous(memory_format=LAYOUTS[layout])
        .requires_grad_()
        for size in (5, 3)
    ]
    rois = random_rois(4, extent=40.0).double()
    levels = torch.tensor([0, 1, 0, 1])

    def pool(*maps):
        return roi_align(maps, rois, 2, [1 / 8, 1 / 16], ratio, levels)

    assert torch.autograd.gradcheck(pool, features)
    assert torch.autograd.gradgradcheck(pool, features, fast_mode=True)


@layouts
def test_opcheck(layout):
    features, scales = pyramid(channels=4, layout=layout), SCALES
    features = [f.requires_grad_() for f in features]
    rois, levels = random_rois(6), torch.tensor([0, 1, 2, 3, 0, 1])
    args = (features, rois, levels, scales, 3, 3, 2, False)
    torch.library.opcheck(torch.ops.detectron.roi_align.default, args)
    sizes = [2, 4, *(extent for f in features for extent in f.shape[2:])]
    grad = torch.randn(6, 4, 3, 3, requires_grad=True)
    args = (grad, rois, levels, scales, sizes, 2, False, layout == "channels_last")
    torch.library.opcheck(torch.ops.detectron.roi_align_backward.default, args)


def test_wrong_arguments_are_named():
    features, scales = pyramid(), SCALES
    rois, levels = random_rois(4), torch.zeros(4, dtype=torch.int64)
    for change, error, words in (
        ({"rois": rois[:, :4]}, ValueError, r"rois must be \(R, 5\)"),
        ({"levels": None}, ValueError, "levels must be given"),
        ({"levels": levels.int()}, TypeError, "levels must be Long"),
        ({"spatial_scale": scales[:2]}, ValueError, "4 feature levels but 2 spatial scales"),
        ({"output_size": 0}, ValueError, "output size must be positive"),
        ({"features": [features[0], features[1].double()]}, TypeError, "must be Float, not Double"),
        ({"features": [features[0], features[1][:1]]}, ValueError, "agree in images and channels"),
        ({"features": []}, ValueError, "no feature level"),
    ):
        arguments = {
            "features": features,
            "rois": rois,
            "output_size": 7,
            "spatial_scale": scales,
            "sampling_ratio": 2,
            "levels": levels,
        } | change
        if "features" in change:
            arguments["spatial_scale"] = scales[: len(change["features"])]
        with pytest.raises(error, match=words):
            roi_align(**arguments)


def on_cuda(features, rois, levels):
    levels = None if levels is None else levels.cuda()
    return [f.cuda() for f in features], rois.cuda(), levels


TOLERANCES = {
    torch.float64: {"atol": 1e-11, "rtol": 1e-11},
    torch.float32: {"atol": 1e-4, "rtol": 1e-4},
}


@pytest.mark.gpu
@layouts
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("channels", [8, 13, 64, 264])
def test_cuda_agrees_with_the_cpu(layout, dtype, ratio, channels):
    features, scales = pyramid(channels, dtype, layout), SCALES
    rois = torch.cat([random_rois(120), ODD_ROIS])
    levels = torch.randint(0, 4, (len(rois),), generator=torch.Generator().manual_seed(1))
    levels[-1] = 9
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(len(rois), channels, 7, 7, generator=g).to(dtype)
    expected, expected_grads = pool_and_differentiate(features, rois, levels, scales, ratio, weight)
    maps, device_rois, device_levels = on_cuda(features, rois, levels)
    weight = weight.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, grads = pool_and_differentiate(maps, device_rois, device_levels, scales, ratio, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.is_contiguous(memory_format=LAYOUTS[layout])
    half = dtype in (torch.float16, torch.bfloat16)
    exact = {} if half else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(out.cpu(), expected, **exact)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        assert grad.is_contiguous(memory_format=LAYOUTS[layout])
        torch.testing.assert_close(grad.cpu(), wanted, **TOLERANCES.get(dtype, {}))


@pytest.mark.gpu
@layouts
def test_cuda_gradient_repeats_bit_for_bit(layout):
    features, scales = pyramid(32, torch.bfloat16, layout), SCALES
    rois, levels = random_rois(3000), torch.randint(0, 4, (3000,))
    maps, rois, levels = on_cuda(features, rois, levels)
    weight = torch.randn(3000, 32, 7, 7).cuda()
    runs = [pool_and_differentiate(maps, rois, levels, scales, 2, weight)[1] for _ in range(3)]
    for grads in runs[1:]:
        for grad, first in zip(grads, runs[0], strict=True):
            assert torch.equal(grad, first)


@pytest.mark.gpu
@layouts
def test_cuda_at_full_size_agrees_with_torchvision(layout):
    feature = torch.randn(4, 256, 200, 304, device="cuda")
    feature = feature.contiguous(memory_format=LAYOUTS[layout])
    rois = random_rois(1000, images=4, extent=600.0).cuda()
    weight = torch.randn(1000, 256, 14, 14, device="cuda")
    ours, theirs = (feature.detach().clone().requires_grad_() for _ in range(2))
    out = roi_align(ours, rois, 14, 1 / 4, 2)
    expected = torchvision.ops.roi_align(theirs, rois, 14, 1 / 4, 2, aligned=False)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4, check_stride=False)
    out.backward(weight)
    expected.backward(weight)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-3, rtol=1e-3, check_stride=False)


@pytest.mark.gpu
def test_cuda_indexes_beyond_two_to_the_31():
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    # the last image starts beyond 2**31 elements
    feature = torch.zeros(9, 256, 1024, 1024, dtype=torch.bfloat16, device="cuda")
    feature[8] = 1
    rois = torch.tensor([[8, 0, 0, 1000, 1000.0], [0, 0, 0, 1000, 1000.0]], device="cuda")
    out = roi_align(feature, rois, 7, 1.0, 2)
    assert (out[0] == 1).all() and (out[1] == 0).all()


@pytest.mark.gpu
def test_cuda_huge_and_inverted_rois_agree_with_the_cpu():
    features, scales = pyramid(), SCALES
    rois = torch.tensor([[0, -1e5, -1e5, 1e5, 1e5], [0, 60, 60, 20, 20.0]])
    for aligned in (False, True):
        for ratio in (0, 2):
            arguments = (7, scales[0], ratio, None, aligned)
            out = roi_align(features[0].cuda(), rois.cuda(), *arguments)
            torch.testing.assert_close(
                out.cpu(), roi_align(features[0], rois, *arguments), atol=1e-4, rtol=1e-4
            )


HALF_CASES = {
    # (images, channels, height, width), RoIs, scale
    "a RoI over many tiles": ((1, 24, 37, 53), [[0, -400, -300, 900, 800], [0, 0, 0, 52, 36]], 1),
    "samples at the borders": ((2, 8, 9, 13), [[1, -1, -1, 13, 9], [0, 12, 8, 14, 10]], 1),
    "inverted": ((1, 8, 20, 20), [[0, 15, 15, 3, 2], [0, 2, 15, 14, 3.5]], 1),
    "one pixel": ((1, 64, 1, 9), [[0, 0, 0, 8, 8], [0, 3, 0, 4, 1]], 1),
    "a crowd": ((2, 72, 21, 24), random_rois(1500, extent=60.0).tolist(), 1 / 4),
    "more RoIs than are listed at a time": (
        (3, 8, 21, 24),
        random_rois(6000, 3, 60.0).tolist(),
        1 / 2,
    ),
    "more channels than a warp has": ((1, 520, 13, 9), random_rois(30, 1, 40.0).tolist(), 1 / 4),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", HALF_CASES)
def test_cuda_half_gradient_agrees_with_the_cpu(dtype, case):
    shape, rois, scale = HALF_CASES[case]
    g = torch.Generator().manual_seed(4)
    feature = torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    rois = torch.tensor(rois, dtype=torch.float32)
    for size, ratio, aligned in ((7, 2, False), ((3, 14), 0, False), (2, 2, True), (5, 9, True)):
        size = size if isinstance(size, tuple) else (size, size)
        weight = torch.randn(len(rois), shape[1], *size, generator=g).to(dtype)

        def pool(features, rois, levels, scales, options=(size, ratio, aligned)):
            size, ratio, aligned = options
            return roi_align(features, rois, size, scales, ratio, levels, aligned)

        _, (expected,) = roi_cases.pool_and_differentiate(
            pool, [feature.float()], rois, None, [scale], weight
        )
        _, (grad,) = roi_cases.pool_and_differentiate(
            pool, [feature.cuda()], rois.cuda(), None, [scale], weight.cuda()
        )
        assert grad.is_contiguous(memory_format=torch.channels_last)
        # weights are kept to 2**-17 in bfloat16
        atol = 1e-5 * max(1.0, expected.abs().max().item())
        rtol = 1.6e-2 if dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(grad.cpu(), expected.to(dtype), atol=atol, rtol=rtol)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cuda_values_that_are_not_finite_reach_only_the_pixels_of_their_cells(dtype):
    features, scales = pyramid(72, dtype, "channels_last"), SCALES
    rois, levels = random_rois(40), torch.randint(0, 4, (40,))
    weight = torch.randn(40, 72, 7, 7).to(dtype)
    weight[3, 5, 2, 2] = weight[11, 3] = math.inf
    weight[9, :, 6, 6] = weight[12, 3] = -math.inf
    weight[7, 70, 0, 0] = math.nan
    _, expected = pool_and_differentiate(features, rois, levels, scales, 2, weight)
    maps, rois, levels = on_cuda(features, rois, levels)
    _, grads = pool_and_differentiate(maps, rois, levels, scales, 2, weight.cuda())
    assert not all(grad.isfinite().all() for grad in expected)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.cpu(), wanted, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [7, 14])
def test_cuda_half_gradient_at_full_size_is_the_float_gradient(size):
    g = torch.Generator("cuda").manual_seed(5)
    shapes = [(3, 256, 200 >> k, 304 >> k) for k in range(4)]
    rois = torch.cat([random_rois(900, 3, 500.0), random_rois(900, 3, 90.0)]).cuda()
    levels = torch.randint(0, 4, (len(rois),), device="cuda", generator=g)
    weight = torch.randn(len(rois), 256, size, size, device="cuda", generator=g).bfloat16()
    grads = {}
    for dtype in (torch.bfloat16, torch.float32):
        features = [
            torch.zeros(shape, dtype=dtype, device="cuda")
            .contiguous(memory_format=torch.channels_last)
            .requires_grad_()
            for shape in shapes
        ]
        out = roi_align(features, rois, size, SCALES, 2, levels)
        grads[dtype] = torch.autograd.grad(out, features, weight.to(dtype))
    for half, exact in zip(grads[torch.bfloat16], grads[torch.float32], strict=True):
        atol = 1e-5 * max(1.0, exact.abs().max().item())
        torch.testing.assert_close(half, exact.bfloat16(), atol=atol, rtol=1.6e-2)


@pytest.mark.gpu
def test_cuda_empty_inputs():
    features, scales = pyramid(), SCALES
    none = torch.zeros(0, dtype=torch.int64)
    maps, rois, levels = on_cuda(features, torch.zeros(0, 5), none)
    weight = torch.zeros(0, 8, 7, 7, device="cuda")
    out, grads = pool_and_differentiate(maps, rois, levels, scales, 2, weight)
    assert out.shape == (0, 8, 7, 7)
    assert not any(grad.any() for grad in grads)


@pytest.mark.gpu
@layouts
def test_cuda_gradcheck_and_opcheck(layout):
    features = [
        torch.randn(2, 2, size, size + 1, dtype=torch.float64, device="cuda")
        .contiguous(memory_format=LAYOUTS[layout])
        .requires_grad_()
        for size in (6, 4)
    ]
    rois = random_rois(5, extent=40.0).double().cuda()
    levels = torch.tensor([0, 1, 0, 1, 0], device="cuda")
    scales = [1 / 8, 1 / 16]

    def pool(*maps):
        return roi_align(maps, rois, 3, scales, 2, levels)

    assert torch.autograd.gradcheck(pool, features, nondet_tol=1e-10)
    torch.library.opcheck(
        torch.ops.detectron.roi_align.default,
        (features, rois, levels, scales, 3, 3, 2, False),
        # the gradient's sums come in any order
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.gpu
def test_mixed_devices_are_named():
    features, scales = pyramid(), SCALES
    with pytest.raises(ValueError, match="rois is on cpu but features is on cuda:0"):
        roi_align(features[0].cuda(), random_rois(3), 7, scales[0], 2)
