"""Soft-NMS: against the definition and golden values; CUDA against the CPU."""

import numpy as np
import pytest
import torch

import utils.boxes as box_utils
from ops import batched_soft_nms, nms, soft_nms

METHODS = ["hard", "linear", "gaussian"]


def random_boxes(count, seed=0, extent=200.0, size=60.0):
    g = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 4, generator=g)
    boxes[:, :2] *= extent
    boxes[:, 2:] = boxes[:, :2] + boxes[:, 2:] * size
    return boxes, torch.rand(count, generator=g)


def reference(boxes, scores, sigma, overlap_thresh, score_thresh, method):
    """The definition; indices and scores in the order they are taken."""
    overlaps = box_utils.bbox_overlaps(boxes, boxes).numpy()
    scores = scores.numpy().copy()
    left = {i for i in range(len(scores)) if scores[i] >= score_thresh}
    taken = []
    while left:
        best = min(left, key=lambda i: (-scores[i], i))
        left.remove(best)
        taken.append((best, scores[best]))
        for i in list(left):
            iou = overlaps[best, i]
            if method == "gaussian":
                weight = np.exp(-(iou**2) / sigma)
            elif iou > overlap_thresh:
                weight = 1 - iou if method == "linear" else 0.0
            else:
                weight = 1.0
            scores[i] *= weight
            if scores[i] < score_thresh:
                left.remove(i)
    return [i for i, _ in taken], np.array([s for _, s in taken], np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [0, 1, 2, 150])
def test_takes_and_lowers_as_the_definition_does(method, count):
    boxes, scores = random_boxes(count)
    keep, lowered = soft_nms(boxes, scores, 0.4, 0.3, 0.05, method)
    expected, expected_scores = reference(boxes, scores, 0.4, 0.3, 0.05, method)
    assert keep.dtype == torch.int64 and keep.tolist() == expected
    np.testing.assert_allclose(lowered.numpy(), expected_scores, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("thresholds", [(0.3, 0.001), (0.5, 0.0001), (0.5, 0.3)])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_golden_values(shared, method, thresholds, kind):
    golden = np.load(shared / "golden" / "units" / "nms.npz")
    overlap, score = thresholds
    dets = golden["dets"] if kind == "numpy" else torch.from_numpy(golden["dets"])
    found, keep = box_utils.soft_nms(dets, 0.5, overlap, score, method)
    assert isinstance(found, type(dets)) and isinstance(keep, type(dets))
    name = f"soft_{method}_{overlap}_{score}"
    np.testing.assert_array_equal(np.asarray(keep), golden[f"{name}_keep"])
    np.testing.assert_allclose(np.asarray(found), golden[f"{name}_dets"], rtol=1e-5)


def test_hard_keeps_what_nms_keeps():
    boxes, scores = random_boxes(400)
    keep, lowered = soft_nms(boxes, scores, 0.5, 0.4, 1e-4, "hard")
    assert torch.equal(keep.sort().values, nms(boxes, scores, 0.4))
    assert torch.equal(lowered, scores[keep])


def test_equal_scores_go_to_the_lower_index_and_nan_scores_are_dropped():
    boxes = torch.tensor([[0, 0, 9, 9], [20, 0, 29, 9], [0, 0, 9, 9], [50, 0, 59, 9.0]])
    scores = torch.tensor([0.5, 0.5, 0.5, float("nan")])
    keep, lowered = soft_nms(boxes, scores, 0.5, 0.3, 0.001, "gaussian")
    assert keep.tolist() == [0, 1, 2]
    assert lowered[2].item() == pytest.approx(0.5 * np.exp(-2))


def test_a_nan_box_overlaps_nothing():
    boxes = torch.tensor([[0, 0, float("nan"), 9], [0, 0, 9, 9.0]])
    keep, lowered = soft_nms(boxes, torch.tensor([0.9, 0.5]))
    assert keep.tolist() == [0, 1] and lowered.tolist() == pytest.approx([0.9, 0.5])


def problems(count, seed=0):
    drawn = [random_boxes(count, seed + p) for p in range(4)]
    g = torch.Generator().manual_seed(seed)
    valid = torch.rand(4, count, generator=g) > 0.2
    valid[3] = False
    return torch.stack([d[0] for d in drawn]), torch.stack([d[1] for d in drawn]), valid


@pytest.mark.parametrize("method", METHODS)
def test_batched_solves_each_problem_by_itself(method):
    boxes, scores, valid = problems(60)
    keep, lowered, count = batched_soft_nms(boxes, scores, valid, 0.5, 0.3, 0.02, method)
    for p in range(4):
        usable = valid[p].nonzero()[:, 0]
        alone, alone_scores = soft_nms(boxes[p][usable], scores[p][usable], 0.5, 0.3, 0.02, method)
        n = len(alone)
        assert count[p] == n
        assert keep[p].tolist() == usable[alone].tolist() + [-1] * (60 - n)
        assert torch.equal(lowered[p, :n], alone_scores) and not lowered[p, n:].any()


def test_wrong_arguments_are_named():
    boxes, scores = random_boxes(3)
    with pytest.raises(ValueError, match="method must be one of hard, linear, gaussian, not 'lin'"):
        soft_nms(boxes, scores, method="lin")
    with pytest.raises(ValueError, match=r"scores must be \(P, K\)"):
        soft_nms(boxes, scores[:2])
    with pytest.raises(ValueError, match="sigma must be > 0"):
        soft_nms(boxes, scores, sigma=0.0, method="gaussian")


def test_opcheck():
    boxes, scores, valid = problems(10)
    args = (boxes, scores, valid, 0.5, 0.3, 0.01, 1)
    torch.library.opcheck(torch.ops.detectron.batched_soft_nms.default, args)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 31, 256, 257, 1000])
def test_cuda_takes_the_same_without_synchronising(method, count):
    boxes, scores, valid = problems(count)
    scores = (scores * 500).round() / 500  # with ties
    boxes[1, ::9, 2] = float("nan")
    scores[1, ::11] = float("nan")
    expected = batched_soft_nms(boxes, scores, valid, 0.5, 0.3, 0.01, method)
    inputs = [t.cuda() for t in (boxes, scores, valid)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        keep, lowered, kept = batched_soft_nms(*inputs, 0.5, 0.3, 0.01, method)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(keep.cpu(), expected[0])
    torch.testing.assert_close(lowered.cpu(), expected[1])
    assert torch.equal(kept.cpu(), expected[2])


@pytest.mark.gpu
def test_cuda_of_nothing_and_opcheck():
    empty = torch.zeros(0, 4).cuda()
    assert soft_nms(empty, torch.zeros(0).cuda())[0].shape == (0,)
    args = tuple(t.cuda() for t in problems(10)) + (0.5, 0.3, 0.01, 2)
    torch.library.opcheck(torch.ops.detectron.batched_soft_nms.default, args)
