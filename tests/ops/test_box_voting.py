"""Box voting: against the definition and golden values; CUDA against the CPU."""

import numpy as np
import pytest
import torch

import utils.boxes as box_utils
from ops import box_voting

METHODS = ["ID", "TEMP_AVG", "AVG", "IOU_AVG", "GENERALIZED_AVG", "QUASI_SUM"]


def random_dets(count, seed=0, extent=100.0):
    g = torch.Generator().manual_seed(seed)
    dets = torch.rand(count, 5, generator=g)
    dets[:, :2] *= extent
    dets[:, 2:4] = dets[:, :2] + 30 + dets[:, 2:4] * 30
    return dets


def new_score(method, own, w, iou, beta):
    if method == "TEMP_AVG":
        yes, no = w ** (1 / beta), (1 - w) ** (1 / beta)
        return (yes / (yes + no)).mean()
    return {
        "ID": own,
        "AVG": w.mean(),
        "IOU_AVG": (iou * w).sum() / iou.sum(),
        "GENERALIZED_AVG": (w**beta).mean() ** (1 / beta),
        "QUASI_SUM": w.sum() / len(w) ** beta,
    }[method]


def reference(top, voters, thresh, method, beta):
    overlaps = box_utils.bbox_overlaps(top[:, :4], voters[:, :4]).double().numpy()
    top, voters = top.double().numpy(), voters.double().numpy()
    out = top.copy()
    for det, iou, result in zip(top, overlaps, out, strict=True):
        votes = iou >= thresh
        w = voters[votes, 4]
        result[:4] = np.average(voters[votes, :4], axis=0, weights=w)
        result[4] = new_score(method, det[4], w, iou[votes], beta)
    return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("beta", [1.0, 0.5, 2.0])
def test_votes_as_the_definition_does(method, beta):
    voters = random_dets(80)
    out = box_voting(voters[:30], voters, 0.4, method, beta)
    assert out.dtype == torch.float32
    expected = reference(voters[:30], voters, 0.4, method, beta)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("beta", "thresh"), [("1", 0.8), ("0.5", 0.6)])
def test_golden_values(shared, method, beta, thresh):
    golden = np.load(shared / "golden" / "units" / "nms.npz")
    top, voters = golden["vote_top"], golden["dets"]
    before = top.copy()
    out = box_utils.box_voting(top, voters, thresh, method, float(beta))
    assert isinstance(out, np.ndarray)
    np.testing.assert_allclose(out, golden[f"vote_{method}_{beta}"], rtol=1e-5)
    np.testing.assert_array_equal(top, before)


def grouped(seed=0):
    """Voters of three groups, one of them empty, and detections in no order of group."""
    voters = random_dets(70, seed)
    group = torch.randint(3, (40,), generator=torch.Generator().manual_seed(seed))
    return random_dets(40, seed + 1), voters, group, torch.tensor([0, 50, 50, 70])


def test_groups_vote_among_themselves():
    top, voters, group, offsets = grouped()
    out = box_voting(top, voters, 0.3, "AVG", 1.0, group, offsets)
    for g in range(3):
        alone = box_voting(
            top[group == g], voters[int(offsets[g]) : int(offsets[g + 1])], 0.3, "AVG"
        )
        assert torch.equal(out[group == g], alone)
    assert torch.equal(out[group == 1], top[group == 1])  # nobody votes there


def test_of_nothing():
    assert box_voting(torch.zeros(0, 5), random_dets(3), 0.5).shape == (0, 5)
    dets = random_dets(3)
    assert torch.equal(box_voting(dets, torch.zeros(0, 5), 0.5), dets)


def test_wrong_arguments_are_named():
    dets = random_dets(3)
    with pytest.raises(ValueError, match="scoring_method must be one of ID, .*, not 'MAX'"):
        box_voting(dets, dets, 0.5, "MAX")
    with pytest.raises(ValueError, match=r"top_dets must be \(K, 5\)"):
        box_voting(dets[:, :4], dets, 0.5)
    with pytest.raises(ValueError, match="beta must be > 0"):
        box_voting(dets, dets, 0.5, "QUASI_SUM", 0.0)


def test_opcheck():
    top, voters, group, offsets = grouped()
    args = (top, voters, group, offsets, 0.3, 2, 1.0)
    torch.library.opcheck(torch.ops.detectron.box_voting.default, args)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_cuda_votes_the_same_without_synchronising(method):
    top, voters, group, offsets = grouped()
    expected = box_voting(top, voters, 0.3, method, 0.7, group, offsets)
    inputs = [t.cuda() for t in (top, voters, group, offsets)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = box_voting(*inputs[:2], 0.3, method, 0.7, *inputs[2:])
        every = box_voting(*inputs[:2], 0.3, method)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu(), expected)
    torch.testing.assert_close(every.cpu(), box_voting(top, voters, 0.3, method))
    args = (*inputs, 0.3, 2, 1.0)
    torch.library.opcheck(torch.ops.detectron.box_voting.default, args)
