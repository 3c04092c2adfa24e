"""What roi_pool, roi_crop and ps_roi_pool have in common; CUDA against the CPU."""

import pytest
import torch
from roi_cases import (
    HUGE_ROIS,
    LAYOUTS,
    ODD_LEVELS,
    ODD_ROIS,
    SCALES,
    pool_and_differentiate,
    pyramid,
    random_levels,
    random_rois,
)

from ops import ps_roi_pool, roi_crop, roi_pool

# pool(features, rois, levels, scales) to 3 x 3
POOLS = {
    "roi_pool": lambda f, r, lv, s: roi_pool(f, r, 3, s, lv),
    "roi_crop": lambda f, r, lv, s: roi_crop(f, r, 3, s, lv),
    "roi_crop_max": lambda f, r, lv, s: roi_crop(f, r, 3, s, lv, max_pool=True),
    "ps_roi_pool": lambda f, r, lv, s: ps_roi_pool(f, r, 3, s, lv),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
pools = pytest.mark.parametrize("name", POOLS)


def out_channels(name, channels):
    return channels // 9 if name == "ps_roi_pool" else channels


def random_weight(name, rows, channels, dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    return torch.randn(rows, out_channels(name, channels), 3, 3, generator=g).to(dtype)


@pools
@layouts
def test_levels_in_one_call_are_the_levels_one_by_one(name, layout):
    features, rois, levels = pyramid(18, layout=layout), random_rois(50), random_levels(50)
    weight = random_weight(name, 50, 18)
    out, grads = pool_and_differentiate(POOLS[name], features, rois, levels, SCALES, weight)
    assert out.is_contiguous(memory_format=LAYOUTS[layout])
    for k in range(4):
        rows = levels == k
        alone, (grad,) = pool_and_differentiate(
            POOLS[name], features[k : k + 1], rois[rows], None, SCALES[k : k + 1], weight[rows]
        )
        assert torch.equal(out[rows], alone)
        assert torch.equal(grads[k], grad)
        assert grads[k].is_contiguous(memory_format=LAYOUTS[layout])


@pools
def test_layouts_agree(name):
    rois, levels = torch.cat([random_rois(30), HUGE_ROIS]), random_levels(35)
    weight = random_weight(name, 35, 18)
    results = [
        pool_and_differentiate(POOLS[name], pyramid(18, layout=k), rois, levels, SCALES, weight)
        for k in LAYOUTS
    ]
    assert torch.equal(results[0][0], results[1][0])
    for first, second in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(first, second, check_stride=False)


@pools
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_accumulate_in_float32(name, dtype):
    features, rois, levels = pyramid(18, dtype), random_rois(30), random_levels(30)
    weight = random_weight(name, 30, 18, dtype)
    out, grads = pool_and_differentiate(POOLS[name], features, rois, levels, SCALES, weight)
    exact, exact_grads = pool_and_differentiate(
        POOLS[name], [f.float() for f in features], rois, levels, SCALES, weight
    )
    assert out.dtype == dtype and grads[0].dtype == dtype
    assert torch.equal(out, exact.to(dtype))  # one rounding, at the end
    for grad, expected in zip(grads, exact_grads, strict=True):
        assert torch.equal(grad, expected.to(dtype))


@pools
@layouts
def test_rois_that_point_nowhere_give_zeros_and_no_gradient(name, layout):
    features = [f + 5 for f in pyramid(18, layout=layout)]
    weight = torch.ones_like(random_weight(name, len(ODD_ROIS), 18))
    out, grads = pool_and_differentiate(POOLS[name], features, ODD_ROIS, ODD_LEVELS, SCALES, weight)
    assert not out.any()
    assert not any(grad.any() for grad in grads)


@pools
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_and_inverted_rois_are_finite(name, dtype):
    features = pyramid(18, dtype)
    out = POOLS[name](features[0], HUGE_ROIS.to(dtype), None, 1 / 4)
    assert out.isfinite().all()
    assert POOLS[name](features[0], HUGE_ROIS, None, 1e30).isfinite().all()


@pools
@layouts
def test_no_rois_no_images_and_no_pixels(name, layout):
    features, none = pyramid(18, layout=layout), torch.zeros(0, 5)
    out, grads = pool_and_differentiate(
        POOLS[name], features, none, none[:, 0].long(), SCALES, random_weight(name, 0, 18)
    )
    assert out.shape == (0, out_channels(name, 18), 3, 3)
    assert not any(grad.any() for grad in grads)
    for shape in ((0, 18, 8, 8), (2, 18, 0, 8), (2, 18, 8, 0)):
        weight = random_weight(name, 9, 18)
        out, (grad,) = pool_and_differentiate(
            POOLS[name], [torch.zeros(shape)], random_rois(9), None, [0.1], weight
        )
        assert not out.any()
        assert grad.shape == shape and not grad.any()


@pools
def test_a_map_of_one_pixel(name):
    feature = torch.full((1, 18, 1, 1), 3.0)
    out = POOLS[name](feature, torch.tensor([[0, 0, 0, 0, 0.0]]), None, 1.0)
    assert (out == 3).all()


@pools
def test_features_rois_and_gradient_may_be_views(name):
    feature = torch.randn(2, 27, 20, 20, generator=torch.Generator().manual_seed(0))
    rois, weight = random_rois(10), random_weight(name, 10, 18)
    wide = torch.cat([rois, rois], dim=1)
    spread = torch.cat([weight, weight], dim=1)[:, : weight.shape[1]]
    results = [
        pool_and_differentiate(POOLS[name], [f], r, None, [0.1], w)
        for f, r, w in (
            (feature[:, :18].contiguous(), rois, weight),
            (feature[:, :18], wide[:, :5], spread),
        )
    ]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1][0], results[1][1][0])


def small_problem(layout, device="cpu"):
    g = torch.Generator().manual_seed(3)
    features = [
        torch.randn(2, 9, size, size + 1, dtype=torch.float64, generator=g)
        .to(device)
        .contiguous(memory_format=LAYOUTS[layout])
        .requires_grad_()
        for size in (5, 3)
    ]
    rois = random_rois(4, extent=40.0).double().to(device)
    return features, rois, torch.tensor([0, 1, 0, 1], device=device), [1 / 8, 1 / 16]


@pools
@layouts
def test_gradcheck(name, layout):
    features, rois, levels, scales = small_problem(layout)

    def pool(*maps):
        return POOLS[name](list(maps), rois, levels, scales)

    assert torch.autograd.gradcheck(pool, features)


def raw_calls(name, features, rois, levels, scales):
    """(operator, arguments) of the forward and of the backward."""
    ops = torch.ops.detectron
    sizes = [*features[0].shape[:2], *(extent for f in features for extent in f.shape[2:])]
    last = not features[0].is_contiguous()
    shape = (len(rois), out_channels(name, features[0].shape[1]), 3, 3)
    grad = torch.ones(shape, dtype=features[0].dtype, device=rois.device)
    head, tail = (features, rois, levels, scales), (rois, levels, scales, sizes)
    if name == "ps_roi_pool":
        return (ops.ps_roi_pool, (*head, 3)), (ops.ps_roi_pool_backward, (grad, *tail, last))
    if name == "roi_pool":
        index = torch.zeros(shape, dtype=torch.int32, device=rois.device)
        return (ops.roi_pool, (*head, 3, 3)), (ops.roi_pool_backward, (grad, index, *tail, last))
    maximum = name == "roi_crop_max"
    index = torch.zeros(shape if maximum else (0,), dtype=torch.uint8, device=rois.device)
    backward = (ops.roi_crop_backward, (grad, index, *tail, maximum, last))
    return (ops.roi_crop, (*head, 3, 3, maximum)), backward


@pools
@layouts
def test_opcheck(name, layout):
    for operator, arguments in raw_calls(name, *small_problem(layout)):
        torch.library.opcheck(operator.default, arguments)


@pools
def test_the_index_saved_for_backward_is_never_trusted(name):
    if name == "ps_roi_pool":
        pytest.skip("saves none")
    features, rois, levels, scales = small_problem("nchw")
    operator, (grad, index, *rest) = raw_calls(name, features, rois, levels, scales)[1]
    for value in (torch.iinfo(index.dtype).min, torch.iinfo(index.dtype).max):
        grads = operator(grad, torch.full_like(index, value), *rest)
        assert all(g.isfinite().all() for g in grads)


@pools
def test_a_second_derivative_is_refused(name):
    features, rois, levels, scales = small_problem("nchw")
    out = POOLS[name](features, rois, levels, scales)
    (grad, _) = torch.autograd.grad((out**2).sum(), features, create_graph=True)
    with pytest.raises(NotImplementedError, match="roi_.* has no second derivative"):
        grad.sum().backward()


@pools
def test_wrong_arguments_are_named(name):
    features, rois, levels = pyramid(18), random_rois(4), torch.zeros(4, dtype=torch.int64)
    for change, error, words in (
        ({"r": rois[:, :4]}, ValueError, r"rois must be \(R, 5\)"),
        ({"r": rois.long()}, TypeError, "rois must be floating point"),
        ({"lv": None}, ValueError, "levels must be given"),
        ({"lv": levels.int()}, TypeError, "levels must be Long"),
        ({"lv": levels[:2]}, ValueError, "levels must be .R,. with R = 4"),
        ({"s": SCALES[:2]}, ValueError, "4 feature levels but 2 spatial scales"),
        ({"f": [f.long() for f in features]}, TypeError, "features must be floating point"),
        ({"f": [features[0].double(), *features[1:]]}, TypeError, "must be Double, not Float"),
        ({"f": [features[0][:1], *features[1:]]}, ValueError, "agree in images and channels"),
        ({"f": [], "s": []}, ValueError, "no feature level"),
        ({"f": features * 3, "s": SCALES * 3}, ValueError, "between 1 and 8 feature levels"),
    ):
        arguments = {"f": features, "r": rois, "lv": levels, "s": SCALES} | change
        with pytest.raises(error, match=f"{name.removesuffix('_max')}: .*{words}"):
            POOLS[name](**arguments)


# A half gradient is summed in float32 and rounded once.
TOLERANCES = {
    torch.float64: {"atol": 1e-10, "rtol": 1e-10},
    torch.float32: {"atol": 1e-4, "rtol": 1e-4},
    torch.float16: {"atol": 1e-3, "rtol": 2e-3},
    torch.bfloat16: {"atol": 1e-2, "rtol": 1e-2},
}


def on_cuda(features, rois, levels, weight):
    return [f.cuda() for f in features], rois.cuda(), levels.cuda(), weight.cuda()


@pytest.mark.gpu
@pools
@layouts
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("channels", [72, 9])
@pytest.mark.parametrize("deterministic", [False, True])
def test_cuda_agrees_with_the_cpu(name, layout, dtype, channels, deterministic):
    features = pyramid(channels, dtype, layout)
    rois = torch.cat([random_rois(120), HUGE_ROIS, ODD_ROIS])
    levels = torch.cat([random_levels(120 + len(HUGE_ROIS)), ODD_LEVELS])
    weight = random_weight(name, len(rois), channels, dtype)
    expected, expected_grads = pool_and_differentiate(
        POOLS[name], features, rois, levels, SCALES, weight
    )
    maps, rois, levels, weight = on_cuda(features, rois, levels, weight)
    torch.use_deterministic_algorithms(deterministic)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, grads = pool_and_differentiate(POOLS[name], maps, rois, levels, SCALES, weight)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.cuda.set_sync_debug_mode("default")
    assert out.is_contiguous(memory_format=LAYOUTS[layout])
    torch.testing.assert_close(out.cpu(), expected)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        assert grad.is_contiguous(memory_format=LAYOUTS[layout])
        torch.testing.assert_close(grad.cpu(), wanted, **TOLERANCES[dtype])


@pytest.mark.gpu
@pools
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size, channels, rows", [(7, 294, 300), (6, 36, 2), (20, 400, 9)])
def test_cuda_agrees_however_the_work_is_shared_out(name, layout, dtype, size, channels, rows):
    # a block has threads for 5, for 7 and for less than 1 channel; many blocks an RoI where few are
    def pool(features, rois, levels, scales):
        if name == "ps_roi_pool":
            return ps_roi_pool(features, rois, size, scales, levels)
        if name == "roi_pool":
            return roi_pool(features, rois, size, scales, levels)
        return roi_crop(features, rois, size, scales, levels, max_pool=name == "roi_crop_max")

    # whole numbers, many of them equal: sums are exact, and ties show which comes first
    g = torch.Generator().manual_seed(4)
    features = [torch.randint(-3, 4, f.shape, generator=g).to(f) for f in pyramid(channels)]
    features = [f.to(dtype).contiguous(memory_format=LAYOUTS[layout]) for f in features]
    rois, levels = random_rois(rows, extent=150.0), random_levels(rows)
    shape = (rows, channels // size**2 if name == "ps_roi_pool" else channels, size, size)
    weight = torch.randint(-3, 4, shape, generator=g).to(dtype)
    expected, expected_grads = pool_and_differentiate(pool, features, rois, levels, SCALES, weight)
    problem = on_cuda(features, rois, levels, weight)
    out, grads = pool_and_differentiate(pool, *problem[:3], SCALES, problem[3])
    torch.testing.assert_close(out.cpu(), expected)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        if name == "roi_pool":
            assert torch.equal(grad.cpu(), wanted)
        torch.testing.assert_close(grad.cpu(), wanted, atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
@layouts
def test_cuda_sums_the_gradients_of_cells_with_one_largest_value(layout):
    # cells smaller than a pixel: runs of equal indices, within a row of cells and across rows
    feature = torch.randn(1, 70, 9, 9, generator=torch.Generator().manual_seed(0))
    feature = feature.contiguous(memory_format=LAYOUTS[layout]).cuda().requires_grad_()
    roi_pool(feature, torch.tensor([[0, 2, 2, 3, 3.0]], device="cuda"), 40, 1.0).sum().backward()
    assert (feature.grad[:, :, 2:4, 2:4].sum((2, 3)) == 1600).all()
    assert feature.grad.sum() == 70 * 1600


@pytest.mark.gpu
@pools
@layouts
def test_cuda_deterministic_gradient_repeats_bit_for_bit(name, layout):
    features, rois, levels = pyramid(36, layout=layout), random_rois(3000), random_levels(3000)
    weight = random_weight(name, 3000, 36)
    problem = on_cuda(features, rois, levels, weight)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            pool_and_differentiate(POOLS[name], *problem[:3], SCALES, problem[3])[1]
            for _ in range(3)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for grads in runs[1:]:
        for grad, first in zip(grads, runs[0], strict=True):
            assert torch.equal(grad, first)


@pytest.mark.gpu
@pools
@layouts
def test_cuda_gradcheck_and_opcheck(name, layout):
    features, rois, levels, scales = small_problem(layout, "cuda")

    def pool(*maps):
        return POOLS[name](list(maps), rois, levels, scales)

    assert torch.autograd.gradcheck(pool, features, nondet_tol=1e-10)
    for operator, arguments in raw_calls(name, features, rois, levels, scales):
        # the gradient's sums come in any order
        torch.library.opcheck(operator.default, arguments, atol=1e-6, rtol=1e-6)


@pytest.mark.gpu
@pools
@layouts
def test_cuda_empty_inputs(name, layout):
    for shape, rows in (((2, 18, 8, 8), 0), ((0, 18, 8, 8), 9), ((2, 18, 0, 8), 9)):
        feature = torch.zeros(shape, device="cuda").contiguous(memory_format=LAYOUTS[layout])
        weight = random_weight(name, rows, 18).cuda()
        out, (grad,) = pool_and_differentiate(
            POOLS[name], [feature], random_rois(9)[:rows].cuda(), None, [0.1], weight
        )
        assert not out.any()
        assert grad.shape == shape and not grad.any()


@pytest.mark.gpu
@pools
def test_cuda_the_index_saved_for_backward_is_never_trusted(name):
    if name == "ps_roi_pool":
        pytest.skip("saves none")
    problem = small_problem("channels_last", "cuda")
    operator, (grad, index, *rest) = raw_calls(name, *problem)[1]
    for value in (torch.iinfo(index.dtype).min, torch.iinfo(index.dtype).max):
        grads = operator(grad, torch.full_like(index, value), *rest)
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.gpu
@pools
def test_cuda_indexes_beyond_two_to_the_31(name):
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    # the last image starts beyond 2**31 elements
    feature = torch.zeros(9, 252, 1024, 1024, dtype=torch.bfloat16, device="cuda")
    feature[8] = 1
    feature.requires_grad_()
    rois = torch.tensor([[8, 0, 0, 1000, 1000.0], [0, 0, 0, 1000, 1000.0]], device="cuda")
    out = POOLS[name](feature, rois, None, 1.0)
    assert (out[0] == 1).all() and (out[1] == 0).all()
    out[0].sum().backward()
    assert not feature.grad[:8].any() and feature.grad[8].any()


@pytest.mark.gpu
@pools
def test_mixed_devices_are_named(name):
    features, rois = pyramid(18), random_rois(3)
    with pytest.raises(ValueError, match="rois is on cpu but features is on cuda:0"):
        POOLS[name](features[0].cuda(), rois, None, 0.25)
