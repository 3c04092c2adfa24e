"""Matching of anchors: bit for bit the plain expression with a whole matrix of overlaps."""

from __future__ import annotations

import pytest
import torch

import utils.boxes as box_utils
from ops import match_anchors

SIZE = 120  # of the images, about


def reference(anchors, gt_boxes, gt_valid, im_info, positive_overlap, straddle_thresh):
    """All images' (inside, foreground, max_overlap, gt_index), by (A, G) matrices."""
    out = []
    for n, (gt, valid) in enumerate(zip(gt_boxes, gt_valid, strict=True)):
        own = anchors if anchors.dim() == 2 else anchors[n]
        inside = torch.ones(len(own), dtype=torch.bool, device=own.device)
        if im_info is not None and straddle_thresh >= 0:
            height, width = im_info[n, 0] + straddle_thresh, im_info[n, 1] + straddle_thresh
            inside = (own[:, :2] >= -straddle_thresh).all(dim=1)
            inside = inside & (own[:, 2] < width) & (own[:, 3] < height)
        overlaps = box_utils.bbox_overlaps(own, gt)
        overlaps = torch.where(inside[:, None] & valid, overlaps, -1.0)
        max_overlap, gt_index = overlaps.max(dim=1)
        ties = ((overlaps == overlaps.amax(dim=0)) & valid).any(dim=1)
        foreground = inside & (ties | (max_overlap >= positive_overlap))
        out.append((inside, foreground, max_overlap, gt_index))
    return tuple(torch.stack(x) for x in zip(*out, strict=True))


def random_boxes(shape, g, whole, low=-20, high=SIZE):
    """Boxes of sides up to 30 and corners between low and high; on a grid of 6 pixels if whole."""
    corner = torch.rand(*shape, 2, generator=g) * (high - low) + low
    boxes = torch.cat([corner, corner + torch.rand(*shape, 2, generator=g) * 30], dim=-1)
    return (boxes / 6).round() * 6 if whole else boxes


def problem(images, anchors, slots, *, whole=True, own=False, used=0.5, seed=0):
    """Arguments; most ground truths are in some anchor's reach."""
    g = torch.Generator().manual_seed(seed)
    boxes = random_boxes((images, anchors) if own else (anchors,), g, whole)
    gt_boxes = random_boxes((images, slots), g, whole, 10, SIZE - 60)
    gt_valid = torch.rand(images, slots, generator=g) < used
    gt_boxes[~gt_valid] = 0
    im_info = torch.rand(images, 3, generator=g) * 30 + SIZE - 30
    return boxes, gt_boxes, gt_valid, im_info, 0.6, 0.0


def assert_same(found, expected):
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.cpu(), b.cpu()), name


PROBLEMS = {
    "ties": {"images": 3, "anchors": 1501, "slots": 8},
    "fractions": {"images": 2, "anchors": 999, "slots": 16, "whole": False},
    "one slot": {"images": 16, "anchors": 257, "slots": 1, "used": 0.8},
    "one anchor": {"images": 5, "anchors": 1, "slots": 4},
    "crowded": {"images": 2, "anchors": 3001, "slots": 512, "used": 0.97},
    "odd slots": {"images": 2, "anchors": 640, "slots": 300, "used": 0.1},
    "no ground truth": {"images": 2, "anchors": 300, "slots": 8, "used": 0.0},
    "own anchors": {"images": 4, "anchors": 333, "slots": 32, "own": True},
}
problems = pytest.mark.parametrize("name", PROBLEMS)
straddles = pytest.mark.parametrize("straddle", [0.0, 7.5, -1.0])


@problems
@straddles
def test_results_are_those_of_the_plain_expression(name, straddle):
    args = (*problem(**PROBLEMS[name])[:5], straddle)
    assert_same(match_anchors(*args), reference(*args))


def test_random_problems_have_ties_and_outsiders():
    """What the comparison above would miss if the problems were too easy."""
    args = problem(**PROBLEMS["ties"])
    found, ties = match_anchors(*args), match_anchors(*args[:4], 2.0, 0.0)
    assert found.inside.any() and not found.inside.all()
    assert args[2].sum() < ties.foreground.sum() < found.foreground.sum() < found.inside.sum()


def test_a_ground_truth_out_of_reach_makes_every_anchor_inside_foreground():
    args = list(problem(**PROBLEMS["ties"]))
    args[1][1, 3] = torch.tensor([900.0, 900, 950, 950])
    args[2][1, 3] = True
    found = match_anchors(*args)
    assert torch.equal(found.foreground[1], found.inside[1])
    assert not torch.equal(found.foreground[0], found.inside[0])
    assert_same(found, reference(*args))


def test_the_first_of_equal_ground_truths_counts():
    gt = torch.tensor([[[50.0, 50, 59, 59], [0, 0, 9, 9], [0, 0, 9, 9], [5, 0, 14, 9]]])
    valid = torch.tensor([[False, True, True, True]])
    anchors = torch.tensor([[0.0, 0, 9, 9], [80, 80, 89, 89]])
    found = match_anchors(anchors, gt, valid, None, 0.7, 0)
    assert found.gt_index.tolist() == [[1, 1]] and found.max_overlap.tolist() == [[1.0, 0.0]]
    assert found.inside.all()


def broken_problem():
    args = list(problem(2, 700, 16))
    args[0][::50, 1], args[0][1::50, 2] = torch.nan, torch.inf
    args[1][0, 2:4, 3], args[1][1, 5] = torch.nan, torch.inf
    args[2][:, 2:6] = True
    return args


def test_boxes_that_are_not_numbers_overlap_nothing():
    found = match_anchors(*broken_problem()[:3], None, 0.6, 0)
    assert found.max_overlap.isfinite().all()
    assert (found.max_overlap[:, ::50] == 0).all()
    assert ((found.gt_index >= 0) & (found.gt_index < 16)).all()


@pytest.mark.parametrize("images,anchors,slots", [(0, 5, 4), (2, 0, 4)])
def test_of_nothing(images, anchors, slots):
    found = match_anchors(*problem(images, anchors, slots))
    assert all(x.shape == (images, anchors) for x in found)


def test_no_slots():
    found = match_anchors(*problem(2, 30, 0))
    assert (found.max_overlap == -1).all() and not found.foreground.any()


def test_wrong_arguments_are_named():
    anchors, gt, valid, info, *rest = problem(2, 30, 4)
    with pytest.raises(ValueError, match=r"anchors must be \(A, 4\), or \(N, A, 4\) with N = 2"):
        match_anchors(anchors.expand(3, -1, -1), gt, valid, info, *rest)
    with pytest.raises(ValueError, match=r"gt_valid must be \(N, G\)"):
        match_anchors(anchors, gt, valid[:, :3], info, *rest)
    with pytest.raises(ValueError, match=r"im_info must be \(N, 3\)"):
        match_anchors(anchors, gt, valid, info[:1], *rest)
    with pytest.raises(TypeError, match="gt_valid must be Bool"):
        match_anchors(anchors, gt, valid.float(), info, *rest)


def test_opcheck():
    torch.library.opcheck(torch.ops.detectron.match_anchors.default, problem(2, 70, 4))


def on_gpu(args):
    return tuple(x.cuda() if isinstance(x, torch.Tensor) else x for x in args)


@pytest.mark.gpu
@problems
@straddles
def test_cuda_gives_the_same_bits_without_synchronising(name, straddle):
    args = (*problem(**PROBLEMS[name])[:5], straddle)
    inputs = on_gpu(args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = match_anchors(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(found, reference(*args))
    assert_same(found, reference(*inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [1, 8, 64, 256, 512, 1000])
@pytest.mark.parametrize("images", [1, 2, 16])
def test_cuda_on_fields_of_anchors(images, slots):
    """In the order that a feature map gives, of which a block's anchors are neighbours."""
    g = torch.Generator().manual_seed(slots)
    shift = torch.cartesian_prod(torch.arange(0, SIZE, 4.0), torch.arange(0, SIZE, 4.0)).flip(1)
    cells = torch.tensor([[-22.0, -10, 25, 13], [-14, -14, 17, 17], [-10.0, -22, 13, 25]])
    anchors = (shift.repeat(1, 2)[:, None] + cells).view(-1, 4)
    for whole in (True, False):
        args = list(problem(images, 5, slots, whole=whole, used=0.6, seed=slots))
        args[0] = anchors
        args[2] &= torch.rand(images, 1, generator=g) < 0.8  # some images have none
        assert_same(match_anchors(*on_gpu(args)), reference(*args))


@pytest.mark.gpu
def test_cuda_of_views_nothing_and_broken_boxes():
    anchors, gt, valid, info, *rest = on_gpu(problem(2, 300, 16))
    expected = match_anchors(anchors, gt, valid, info, *rest)
    odd = torch.cat([anchors.flatten().new_zeros(1), anchors.flatten()])[1:].view(-1, 4)
    wide = torch.cat([gt, gt], dim=2)[..., :4]
    flags = torch.stack([valid, ~valid], dim=2)[..., 0]
    assert_same(match_anchors(odd, wide, flags, info.double(), *rest), expected)
    for args in (problem(0, 5, 4), problem(2, 0, 4), problem(2, 30, 0), broken_problem()):
        assert_same(match_anchors(*on_gpu(args)), match_anchors(*args))
    torch.library.opcheck(torch.ops.detectron.match_anchors.default, on_gpu(problem(2, 70, 4)))


@pytest.mark.gpu
def test_cuda_graphs_replay_on_new_values():
    first, second = problem(2, 700, 32, seed=1), problem(2, 700, 32, seed=2)
    inputs = on_gpu(first)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        match_anchors(*inputs)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = match_anchors(*inputs)
    for args in (second, first):
        for target, value in zip(inputs[:4], args[:4], strict=True):
            target.copy_(value)
        graph.replay()
        assert_same(found, reference(*args))
