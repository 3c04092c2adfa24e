"""Proposals against the values the original computed from the same scores and deltas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modeling import generate_proposals as gp
from modeling.generate_anchors import anchor_field, generate_anchors


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden/units/proposals.npz")


def run(golden, prefix, im_info, cells, stride, **options):
    """Proposals of one level, with recorded probabilities turned back into logits."""
    scores = torch.from_numpy(golden[f"{prefix}_scores"]).double()
    logits = torch.log(scores / (1 - scores))
    deltas = torch.from_numpy(golden[f"{prefix}_deltas"])
    anchors = anchor_field(torch.tensor(cells).float(), stride, *scores.shape[-2:])
    return gp.generate_proposals(
        [logits], [deltas], [anchors], torch.from_numpy(im_info), **options
    )


def check(proposals, rois, probs):
    """Same boxes and scores; equal scores may come in any order."""
    for image in range(len(proposals.boxes)):
        valid = proposals.valid[image]
        wanted = rois[:, 0] == image
        assert valid.sum() == wanted.sum()
        got = np.column_stack([proposals.scores[image][valid], proposals.boxes[image][valid]])
        want = np.column_stack([probs[wanted, 0], rois[wanted, 1:]])
        got, want = (x[np.lexsort(np.round(x, 2).T[::-1])] for x in (got, want))
        np.testing.assert_allclose(got, want, atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize("mode,pre,post", [("TRAIN", 300, 200), ("TEST", 150, 100)])
@pytest.mark.parametrize("level", [2, 3, 4, 5, 6])
def test_fpn_levels_agree_with_the_original(golden, mode, pre, post, level):
    cells = generate_anchors(2**level, (32 * 2 ** (level - 2),), (0.5, 1, 2))
    prefix = f"{mode}_fpn{level}"
    im_info = golden["im_info"][: len(golden[f"{prefix}_scores"])]
    options = {"pre_nms_top_n": pre, "post_nms_top_n": post, "nms_thresh": 0.7, "min_size": 0}
    proposals = run(golden, prefix, im_info, cells, 2**level, **options)
    check(proposals, golden[f"{prefix}_rois"], golden[f"{prefix}_probs"])


@pytest.mark.parametrize(
    "name,pre,post,thresh,min_size",
    [
        ("TRAIN_min0", 2000, 300, 0.7, 0),
        ("TEST_min0", 1000, 150, 0.7, 0),
        ("TEST_min16", 1000, 150, 0.7, 16),
        ("TEST_nonms_min0", 1000, 150, 0.0, 0),
        ("TEST_all_min0", 0, 150, 0.7, 0),
    ],
)
def test_single_level_agrees_with_the_original(golden, name, pre, post, thresh, min_size):
    prefix = f"c4_{name}"
    cells = generate_anchors(16, (32, 64, 128, 256, 512), (0.5, 1, 2))
    options = {
        "pre_nms_top_n": pre,
        "post_nms_top_n": post,
        "nms_thresh": thresh,
        "min_size": min_size,
    }
    proposals = run(golden, prefix, golden[f"{prefix}_im_info"], cells, 16, **options)
    check(proposals, golden[f"{prefix}_rois"], golden[f"{prefix}_probs"])


@pytest.mark.parametrize("scale,total", [(1, 200), (0.5, 100)])
def test_collect_cuts_over_the_whole_batch(golden, scale, total):
    levels = [(golden[f"TRAIN_fpn{k}_rois"], golden[f"TRAIN_fpn{k}_probs"]) for k in range(2, 7)]
    boxes, scores = torch.zeros(2, 1000, 4), torch.full((2, 1000), -1.0)
    for image in range(2):
        start = 0
        for rois, probs in levels:
            own = rois[:, 0] == image
            boxes[image, start : start + own.sum()] = torch.from_numpy(rois[own, 1:])
            scores[image, start : start + own.sum()] = torch.from_numpy(probs[own, 0])
            start += own.sum()
    cut = gp.collect_over_batch(gp.Proposals(boxes, scores), int(200 * scale + 0.5))
    assert cut.valid.sum() == total
    expected = golden[f"TRAIN_collect_scale{scale}"]
    for image in range(2):
        got = cut.boxes[image][cut.valid[image]].numpy()
        want = expected[expected[:, 0] == image, 1:]
        np.testing.assert_array_equal(got[np.lexsort(got.T)], want[np.lexsort(want.T)])


def test_collect_per_image_sorts_and_keeps_empty_slots_last():
    scores = torch.tensor([[0.1, -1.0, 0.9], [0.2, 0.3, -1.0]])
    boxes = torch.arange(24.0).view(2, 3, 4)
    best = gp.collect_per_image(gp.Proposals(boxes, scores), 2)
    torch.testing.assert_close(best.scores, torch.tensor([[0.9, 0.1], [0.3, 0.2]]))
    torch.testing.assert_close(best.boxes[0, 0], boxes[0, 2])


def test_levels_of_different_sizes_are_padded_apart():
    """A level with fewer candidates than another yields only its own."""
    cells = torch.tensor(generate_anchors(16, (32,), (1,))).float()
    logits = [torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 1, 1)]
    deltas = [torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 1, 1)]
    anchors = [anchor_field(cells, 16, *x.shape[-2:]) for x in logits]
    proposals = gp.generate_proposals(
        logits,
        deltas,
        anchors,
        torch.tensor([[64.0, 64.0, 1.0]]),
        pre_nms_top_n=100,
        post_nms_top_n=100,
        nms_thresh=0.99,
        min_size=0,
    )
    assert proposals.boxes.shape == (1, 32, 4)
    assert proposals.valid.sum() == 17
