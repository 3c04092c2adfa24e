"""RPN labels: the deterministic part against a slow reference and the original's records, the
draws by their invariants."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import utils.boxes as box_utils
from modeling.generate_anchors import anchor_field, generate_anchors
from ops import AnchorMatches, match_anchors
from roi_data.rpn import rpn_targets, sample_anchors

OPTIONS = {
    "positive_overlap": 0.7,
    "negative_overlap": 0.3,
    "batch_size": 256,
    "fg_fraction": 0.5,
    "straddle_thresh": 0,
}


def random_boxes(rng, count, size=400.0):
    corner = rng.uniform(-20, size, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(1, 150, (count, 2))], axis=1)


def iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0]) + 1
    h = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if w <= 0 or h <= 0:
        return 0.0
    area = [(x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b)]
    return w * h / (sum(area) - w * h)


def test_matching_agrees_with_a_slow_reference():
    rng = np.random.RandomState(1)
    anchors = random_boxes(rng, 200).astype(np.float32)
    gt = random_boxes(rng, 6).astype(np.float32)
    gt[3] = anchors[50]
    valid = np.array([True, True, True, True, False, False])  # the last two: crowd, padding
    im_info = torch.tensor([[380.0, 390.0, 1.0]])
    matches = match_anchors(
        torch.from_numpy(anchors),
        torch.from_numpy(gt)[None],
        torch.from_numpy(valid)[None],
        im_info,
        0.7,
        0,
    )
    inside = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < 390) & (anchors[:, 3] < 380)
    table = np.array([[iou(a, g) for g in gt[:4]] for a in anchors])
    best_of_gt = table[inside].max(axis=0)
    for i in range(len(anchors)):
        assert matches.inside[0, i] == inside[i]
        if not inside[i]:
            assert not matches.foreground[0, i]
            continue
        assert matches.max_overlap[0, i] == pytest.approx(table[i].max(), abs=1e-5)
        expected = table[i].max() >= 0.7 or any(np.isclose(table[i], best_of_gt, rtol=1e-6))
        assert matches.foreground[0, i] == expected
        if table[i].max() > 0:
            assert matches.gt_index[0, i] == table[i].argmax()


FPN_CELLS = {f"_fpn{k}": (2**k, (32 * 2 ** (k - 2),)) for k in range(2, 7)}
C4_CELLS = {"": (16, (32, 64, 128, 256, 512))}


@pytest.mark.parametrize(
    "job,levels",
    [("tiny_mask_FPN", FPN_CELLS), ("e2e_faster_rcnn_R-50-C4_1x", C4_CELLS)],
    ids=["FPN", "C4"],
)
def test_labels_and_targets_agree_with_the_original(job, levels, golden_roidb, shared):
    """Sampled labels are drawn from the foreground and background found here; targets are equal."""
    record = json.loads((shared / f"golden/model/{job}.train.json").read_text())
    im_info = torch.from_numpy(np.load(shared / f"golden/model/{job}.train.npz")["im_info"])
    blobs = np.load(shared / f"golden/model/{job}.rpn_blobs.npz")
    anchors, labels, targets, weights = recorded_field(blobs, levels)
    checked = 0
    for image, index in enumerate(record["indices"]):
        entry = golden_roidb[index]
        assert entry["image"].endswith(record["images"][image])
        gt = torch.from_numpy(entry["boxes"] * im_info[image, 2].numpy())
        own = torch.from_numpy(~entry["is_crowd"])
        matches = match_anchors(anchors, gt[None], own[None], im_info[image : image + 1], 0.7, 0)
        foreground = matches.foreground[0]
        candidates = matches.inside[0] & (matches.max_overlap[0] < 0.3)
        sampled = labels[image]
        assert foreground[sampled == 1].all()
        assert candidates[sampled == 0].all()
        if foreground.sum() <= 128:  # nothing to draw: all of it, but what background overwrote
            assert torch.equal(foreground & (sampled != 0), sampled == 1)
        used = torch.nonzero(weights[image] > 0)[:, 0]
        own_targets = box_utils.bbox_transform_inv(anchors[used], gt[matches.gt_index[0, used]])
        np.testing.assert_allclose(own_targets, targets[image, used], atol=1e-5, rtol=1e-5)
        assert weights[image, used[0]] == pytest.approx(1 / (sampled >= 0).sum().item(), rel=1e-6)
        checked += len(used)
    assert checked > 10


def recorded_field(blobs, levels):
    """Anchors (A, 4) and recorded labels, targets and weights (N, A[, 4]) of whole fields."""
    parts = []
    for name, (stride, sizes) in levels.items():
        n, a, h, w = blobs[f"rpn_labels_int32_wide{name}.shape"]
        cells = torch.tensor(generate_anchors(stride, sizes, (0.5, 1, 2))).float()

        def dense(kind, fill, name=name, n=n, a=a, h=h, w=w):
            key = f"rpn_{kind}_wide{name}"
            values = np.full(blobs[f"{key}.shape"], fill, np.float32)
            values.ravel()[blobs[f"{key}.idx"]] = blobs[f"{key}.val"]
            values = torch.from_numpy(values).view(n, a, -1, h, w).permute(0, 3, 4, 1, 2)
            return values.reshape(n, h * w * a, -1)

        weight = dense("bbox_inside_weights", 0) * dense("bbox_outside_weights", 0)
        field = anchor_field(cells, stride, int(h), int(w))
        parts.append(
            (field, dense("labels_int32", -1)[..., 0], dense("bbox_targets", 0), weight[..., 0])
        )
    anchors, labels, targets, weights = zip(*parts, strict=True)
    return torch.cat(anchors), *(torch.cat(x, dim=1) for x in (labels, targets, weights))


def labels_of(index, labels, num_anchors):
    """(N, A) labels of all anchors; those without a slot that counts have -1."""
    dense = torch.full((len(index), num_anchors), -1)
    for row, anchors, own in zip(dense, index, labels, strict=True):
        row[anchors[own >= 0]] = own[own >= 0].long()
        assert (row >= 0).sum() == (own >= 0).sum()  # no anchor has two
    return dense


def matches_of(foreground, overlap):
    """AnchorMatches of anchors that all lie inside."""
    return AnchorMatches(
        torch.ones_like(foreground), foreground, overlap, torch.zeros_like(foreground).long()
    )


def test_draws_keep_their_quotas():
    torch.manual_seed(0)
    overlap = torch.rand(2, 5000) * 0.29
    foreground = torch.zeros(2, 5000, dtype=torch.bool)
    foreground[0, :1000] = True
    foreground[1, :10] = True
    overlap[foreground] = 0.8
    drawn = sample_anchors(matches_of(foreground, overlap), 0.3, 256, 128)
    labels = labels_of(*drawn, 5000)
    assert (labels == 1).sum(1).tolist() == [128, 10]
    assert foreground[labels == 1].all() and not foreground[labels == 0].any()
    # Drawn with replacement: a few fewer distinct ones than asked for.
    background = (labels == 0).sum(1)
    assert 120 <= background[0] <= 128 and 235 <= background[1] <= 246


def test_few_background_candidates_are_all_taken():
    overlap = torch.cat([torch.zeros(1, 20), torch.full((1, 30), 0.5)], dim=1)
    matches = matches_of(torch.zeros(1, 50, dtype=torch.bool), overlap)
    labels = labels_of(*sample_anchors(matches, 0.3, 256, 128), 50)
    assert (labels[0, :20] == 0).all() and (labels[0, 20:] == -1).all()


def test_anchors_outside_are_no_background():
    inside = torch.arange(50)[None] < 7
    matches = matches_of(torch.zeros(1, 50, dtype=torch.bool), torch.zeros(1, 50))
    drawn = sample_anchors(matches._replace(inside=inside), 0.3, 256, 128)
    assert torch.equal(labels_of(*drawn, 50) == 0, inside)


def test_background_may_overwrite_low_overlap_foreground():
    """Every anchor is foreground by a tie at IoU 0.1 and a background candidate as well."""
    matches = matches_of(torch.ones(1, 40, dtype=torch.bool), torch.full((1, 40), 0.1))
    labels = labels_of(*sample_anchors(matches, 0.3, 256, 128), 40)
    assert (labels == 0).all()


def test_overwritten_foreground_learns_no_box():
    """One anchor, foreground by a tie and background by its overlap."""
    anchors = torch.tensor([[0.0, 0, 15, 15]])
    gt = torch.tensor([[[0.0, 0, 150, 150]]])
    valid = torch.ones(1, 1, dtype=torch.bool)
    targets = rpn_targets(anchors, gt, valid, torch.tensor([[200.0, 200, 1]]), **OPTIONS)
    assert targets.labels.clamp(min=0).sum() == 0 and (targets.labels == 0).sum() == 1
    assert not targets.bbox_targets.any() and not targets.bbox_weights.any()


def test_no_ground_truth_leaves_background_alone():
    anchors = torch.tensor([[0.0, 0, 15, 15], [16, 0, 31, 15], [90, 90, 130, 130]])
    targets = rpn_targets(
        anchors,
        torch.zeros(1, 8, 4),
        torch.zeros(1, 8, dtype=torch.bool),
        torch.tensor([[100.0, 100.0, 1.0]]),
        **OPTIONS,
    )
    assert labels_of(targets.index, targets.labels, 3).tolist() == [[0, 0, -1]]
    assert targets.bbox_weights.sum() == 0 and targets.bbox_targets.sum() == 0


def test_weights_are_one_over_the_used_anchors():
    anchors = torch.tensor([[0.0, 0, 15, 15], [16, 0, 31, 15], [32, 0, 47, 15]])
    gt = torch.tensor([[[0.0, 0, 15, 15]]])
    targets = rpn_targets(
        anchors,
        gt,
        torch.ones(1, 1, dtype=torch.bool),
        torch.tensor([[100.0, 100.0, 1.0]]),
        **OPTIONS,
    )
    assert labels_of(targets.index, targets.labels, 3).tolist() == [[1, 0, 0]]
    weights = torch.where(targets.labels == 1, 1 / 3, 0.0)
    torch.testing.assert_close(targets.bbox_weights, weights)
    assert targets.bbox_targets.abs().sum() == 0


def test_deltas_lead_from_each_anchor_to_its_own_ground_truth():
    torch.manual_seed(0)
    rng = np.random.RandomState(4)
    gt = torch.from_numpy(random_boxes(rng, 12, 300).clip(0, 399)).float().view(2, 6, 4)
    anchors = torch.cat([gt[0] + 1, gt[1] - 2, torch.from_numpy(random_boxes(rng, 300)).float()])
    valid = torch.ones(2, 6, dtype=torch.bool)
    im_info = torch.tensor([[400.0, 400, 1]] * 2)
    targets = rpn_targets(anchors, gt, valid, im_info, **OPTIONS)
    matches = match_anchors(anchors, gt, valid, im_info, 0.7, 0)
    for image in range(2):
        own = targets.labels[image] == 1
        index = targets.index[image, own]
        assert len(index) >= 4
        moved = box_utils.bbox_transform(anchors[index], targets.bbox_targets[image, own])
        torch.testing.assert_close(
            moved, gt[image, matches.gt_index[image, index]], atol=1e-3, rtol=0
        )
        assert not targets.bbox_targets[image, ~own].any()
