"""nms and batched_nms: against the definition, torchvision, golden values; CUDA against the CPU."""

import numpy as np
import pytest
import torch
import torchvision

from ops import batched_nms, nms

needs_sizes = pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 500])


def reference(boxes, scores, thresh, one=1.0):
    """The definition, box by box in float32; ties by the lower index."""
    boxes = np.asarray(boxes, dtype=np.float32)
    one = np.float32(one)
    areas = (boxes[:, 2] - boxes[:, 0] + one) * (boxes[:, 3] - boxes[:, 1] + one)
    kept = []
    for i in np.argsort(-np.asarray(scores), kind="stable"):
        for k in kept:
            w = min(boxes[i, 2], boxes[k, 2]) - max(boxes[i, 0], boxes[k, 0]) + one
            h = min(boxes[i, 3], boxes[k, 3]) - max(boxes[i, 1], boxes[k, 1]) + one
            inter = max(np.float32(0), w) * max(np.float32(0), h)
            if inter / (areas[i] + areas[k] - inter) >= np.float32(thresh):
                break
        else:
            kept.append(i)
    return kept  # in score order


def random_boxes(count, seed=0, extent=200.0, size=60.0):
    g = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 4, generator=g)
    boxes[:, :2] *= extent
    boxes[:, 2:] = boxes[:, :2] + boxes[:, 2:] * size
    return boxes, torch.rand(count, generator=g)


def sorted_problems(problems, count, seed=0):
    """Boxes by descending score; a tenth invalid, in no order."""
    boxes = torch.stack([random_boxes(count, seed + p)[0] for p in range(problems)])
    g = torch.Generator().manual_seed(seed)
    return boxes, torch.rand(problems, count, generator=g) > 0.1


@needs_sizes
@pytest.mark.parametrize("plus_one", [True, False])
def test_keeps_what_the_definition_keeps_in_ascending_order(count, plus_one):
    boxes, scores = random_boxes(count)
    for thresh in (0.3, 0.7):
        kept = nms(boxes, scores, thresh, plus_one)
        assert kept.dtype == torch.int64
        assert kept.tolist() == sorted(reference(boxes, scores, thresh, float(plus_one)))


def test_equal_scores_go_to_the_lower_index_and_equal_iou_suppresses():
    boxes = torch.tensor([[0, 0, 9, 9], [0, 0, 9, 9], [0, 5, 9, 14], [50, 50, 59, 59.0]])
    scores = torch.tensor([0.5, 0.5, 0.5, 0.9])
    # boxes 0 and 2 share 5 of 15 rows: IoU exactly 50 / 150
    third = float(np.float32(50) / np.float32(150))
    assert nms(boxes, scores, third).tolist() == [0, 3]
    assert nms(boxes, scores, 0.34).tolist() == [0, 2, 3]


def test_ties_agree_with_the_definition():
    boxes, scores = random_boxes(300)
    scores = (scores * 5).round() / 5
    assert nms(boxes.round(), scores, 0.5).tolist() == sorted(reference(boxes.round(), scores, 0.5))


def test_agrees_with_torchvision_where_the_conventions_coincide():
    boxes, scores = random_boxes(3000, extent=800.0)
    expected = torchvision.ops.nms(boxes, scores, 0.6).sort().values
    assert torch.equal(nms(boxes, scores, 0.6, plus_one=False), expected)


@pytest.mark.parametrize("thresh", ["0.3", "0.5", "0.7"])
def test_golden_values(shared, thresh):
    golden = np.load(shared / "golden" / "units" / "nms.npz")
    dets = torch.from_numpy(golden["dets"])
    kept = nms(dets[:, :4], dets[:, 4], float(thresh))
    np.testing.assert_array_equal(kept.numpy(), golden[f"nms_{thresh}"])


def test_a_nan_box_is_kept_alone_and_a_nan_score_ranks_last():
    boxes = torch.tensor([[0, 0, 9, 9], [0, 0, float("nan"), 9], [0, 0, 9, 9.0]])
    assert nms(boxes, torch.tensor([0.2, 0.9, 0.5]), 0.5).tolist() == [1, 2]
    assert nms(boxes, torch.tensor([0.2, 0.9, float("nan")]), 0.5).tolist() == [0, 1]


def test_views_and_other_dtypes_give_the_same():
    boxes, scores = random_boxes(200)
    boxes = boxes.round()
    expected = nms(boxes, scores, 0.5)
    wide = torch.cat([torch.zeros(200, 1), boxes, scores[:, None]], dim=1)
    assert torch.equal(nms(wide[:, 1:5], wide[:, 5], 0.5), expected)
    assert torch.equal(nms(boxes.double(), scores.double(), 0.5), expected)
    assert torch.equal(nms(boxes.half(), scores, 0.5), nms(boxes.half().float(), scores, 0.5))


@needs_sizes
def test_batched_keeps_the_best_of_each_problem_in_score_order(count):
    boxes, valid = sorted_problems(3, count)
    max_out = 20
    keep, kept = batched_nms(boxes, valid, 0.5, max_out)
    assert keep.shape == (3, max_out)
    for p in range(3):
        usable = valid[p].nonzero().squeeze(1).tolist()
        ranks = -np.arange(len(usable), dtype=np.float64)
        expected = [usable[k] for k in reference(boxes[p][valid[p]], ranks, 0.5)][:max_out]
        assert kept[p] == len(expected)
        assert keep[p].tolist() == expected + [-1] * (max_out - len(expected))


def grouped_problems(problems, count, seed=0):
    """sorted_problems, and three groups of the boxes, which the problems number differently."""
    boxes, valid = sorted_problems(problems, count, seed)
    g = torch.Generator().manual_seed(seed)
    groups = torch.randint(3, (problems, count), generator=g)
    return boxes, valid, groups + torch.arange(problems)[:, None]


@needs_sizes
def test_groups_do_not_suppress_each_other_but_share_the_places(count):
    boxes, valid, groups = grouped_problems(2, count)
    keep, kept = batched_nms(boxes, valid, 0.5, 20, groups=groups)
    for p in range(2):
        expected = []
        for group in range(p, p + 3):
            usable = (valid[p] & (groups[p] == group)).nonzero().squeeze(1)
            ranks = -np.arange(len(usable), dtype=np.float64)
            expected += usable[reference(boxes[p][usable], ranks, 0.5)].tolist()
        expected = sorted(expected)[:20]
        assert keep[p].tolist() == expected + [-1] * (20 - len(expected))
        assert kept[p] == len(expected)


def test_batched_of_nothing():
    keep, kept = batched_nms(torch.zeros(0, 5, 4), torch.zeros(0, 5, dtype=torch.bool), 0.5, 3)
    assert keep.shape == (0, 3) and kept.shape == (0,)
    boxes, valid = sorted_problems(2, 10)
    assert batched_nms(boxes, torch.zeros_like(valid), 0.5, 3)[0].tolist() == [[-1] * 3] * 2
    assert batched_nms(boxes, valid, 0.5, 0)[0].shape == (2, 0)


@pytest.mark.parametrize(
    ("boxes", "scores", "error", "words"),
    [
        (torch.zeros(3, 5), torch.zeros(3), ValueError, r"boxes must be \(K, 4\)"),
        (torch.zeros(3, 4), torch.zeros(2), ValueError, r"scores must be \(K,\) with K = 3"),
        (torch.zeros(3, 4).long(), torch.zeros(3), TypeError, "boxes must be floating point"),
        (torch.zeros(3, 4), torch.zeros(3).long(), TypeError, "scores must be floating point"),
    ],
)
def test_wrong_arguments_are_named(boxes, scores, error, words):
    with pytest.raises(error, match=words):
        nms(boxes, scores, 0.5)


def test_batched_needs_a_bool_mask():
    with pytest.raises(TypeError, match="valid must be Bool"):
        batched_nms(torch.zeros(1, 2, 4), torch.ones(1, 2), 0.5, 2)


def test_batched_needs_a_group_a_box():
    boxes, valid = sorted_problems(2, 10)
    with pytest.raises(ValueError, match=r"groups must be \(P, K\)"):
        batched_nms(boxes, valid, 0.5, 2, groups=torch.zeros(10, dtype=torch.int64))
    with pytest.raises(TypeError, match="groups must be Long"):
        batched_nms(boxes, valid, 0.5, 2, groups=valid)


def test_opcheck():
    boxes, scores = random_boxes(20)
    torch.library.opcheck(torch.ops.detectron.nms.default, (boxes, scores, 0.5))
    problems, valid = sorted_problems(2, 20)
    torch.library.opcheck(torch.ops.detectron.batched_nms.default, (problems, valid, 0.5, 5))
    boxes, valid, groups = grouped_problems(2, 20)
    batched = torch.ops.detectron.batched_nms.default
    torch.library.opcheck(batched, (boxes, valid, 0.5, 5, True, groups))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 2000, 4096, 4097, 12000])
@pytest.mark.parametrize("thresh", [0.0, 0.3, 0.7])
def test_cuda_keeps_the_same(count, thresh):
    boxes, scores = random_boxes(count, extent=600.0)
    scores = (scores * 1000).round() / 1000  # with ties
    expected = nms(boxes, scores, thresh)
    assert torch.equal(nms(boxes.cuda(), scores.cuda(), thresh).cpu(), expected)


@pytest.mark.gpu
def test_cuda_keeps_the_same_of_nan_boxes_views_and_100000():
    boxes, scores = random_boxes(300)
    boxes[::7, 2] = float("nan")
    scores[::11] = float("nan")
    assert torch.equal(nms(boxes.cuda(), scores.cuda(), 0.4).cpu(), nms(boxes, scores, 0.4))
    flat = torch.zeros(1 + 4 * 300).cuda()
    flat[1:] = boxes.reshape(-1).cuda()
    unaligned = flat[1:].view(300, 4)
    assert torch.equal(nms(unaligned, scores.cuda(), 0.4).cpu(), nms(boxes, scores, 0.4))
    boxes, scores = random_boxes(100_000, extent=2000.0, size=200.0)
    assert torch.equal(nms(boxes.cuda(), scores.cuda(), 0.5).cpu(), nms(boxes, scores, 0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 64, 65, 2000, 9000])
@pytest.mark.parametrize("max_out", [1, 100, 10_000])
def test_cuda_batched_keeps_the_same_without_synchronising(count, max_out):
    boxes, valid = sorted_problems(5, count)
    expected = batched_nms(boxes, valid, 0.7, max_out)
    device_boxes, device_valid = boxes.cuda(), valid.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = batched_nms(device_boxes, device_valid, 0.7, max_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(result[0].cpu(), expected[0])
    assert torch.equal(result[1].cpu(), expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 64, 65, 2000, 9000])
@pytest.mark.parametrize("max_out", [1, 100, 10_000])
def test_cuda_groups_as_the_cpu_does(count, max_out):
    boxes, valid, groups = grouped_problems(5, count)
    expected = batched_nms(boxes, valid, 0.5, max_out, groups=groups)
    result = batched_nms(boxes.cuda(), valid.cuda(), 0.5, max_out, groups=groups.cuda())
    assert torch.equal(result[0].cpu(), expected[0])
    assert torch.equal(result[1].cpu(), expected[1])


@pytest.mark.gpu
def test_cuda_batched_works_inside_a_captured_graph():
    boxes, valid = (t.cuda() for t in sorted_problems(4, 5000, seed=0))
    static_boxes, static_valid = boxes.clone(), valid.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        batched_nms(static_boxes, static_valid, 0.6, 300)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep, count = batched_nms(static_boxes, static_valid, 0.6, 300)
    for seed in (1, 2):
        boxes, valid = sorted_problems(4, 5000, seed=seed)
        static_boxes.copy_(boxes)
        static_valid.copy_(valid)
        graph.replay()
        expected = batched_nms(boxes, valid, 0.6, 300)
        assert torch.equal(keep.cpu(), expected[0])
        assert torch.equal(count.cpu(), expected[1])


@pytest.mark.gpu
def test_mixed_devices_are_named():
    with pytest.raises(ValueError, match="scores is on cpu but boxes is on cuda:0"):
        nms(torch.zeros(2, 4).cuda(), torch.zeros(2), 0.5)


@pytest.mark.gpu
def test_cuda_opcheck():
    boxes, scores = (t.cuda() for t in random_boxes(20))
    torch.library.opcheck(torch.ops.detectron.nms.default, (boxes, scores, 0.5))
    problems, valid = (t.cuda() for t in sorted_problems(2, 20))
    torch.library.opcheck(torch.ops.detectron.batched_nms.default, (problems, valid, 0.5, 5))
