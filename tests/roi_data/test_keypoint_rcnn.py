"""Keypoint targets against the original's records."""

from __future__ import annotations

import numpy as np
import torch

from roi_data.fast_rcnn import roi_pool_of
from roi_data.keypoint_rcnn import (
    KeypointQuota,
    keypoint_targets,
    keypoints_to_bins,
    visible_inside,
)


def test_bins_agree_with_the_original(shared):
    golden = np.load(shared / "golden/units/keypoints.npz")
    points = torch.from_numpy(golden["kp_in"]).float().transpose(1, 2)
    bins, weights = keypoints_to_bins(points, torch.from_numpy(golden["kp_rois"]), 56)
    np.testing.assert_array_equal(weights.numpy(), golden["kp_w"])
    np.testing.assert_array_equal(bins.numpy(), golden["kp_heat"])


def test_edges_belong_to_the_last_bin():
    points = torch.tensor([[[10.0, 20, 2], [30, 60, 1], [29.9, 59.9, 2], [31, 40, 2], [15, 30, 0]]])
    bins, weights = keypoints_to_bins(points, torch.tensor([[10.0, 20, 30, 60]]), 4)
    assert bins.tolist() == [[0, 15, 15, 0, 0]]
    assert weights.tolist() == [[1, 1, 1, 0, 0]]


def people():
    """One image: two people of three keypoints; the second has none visible."""
    gt = torch.tensor([[[10.0, 10, 50, 90], [100, 10, 150, 90], [0, 0, 0, 0]]])
    points = torch.zeros(1, 3, 3, 3)
    points[0, 0] = torch.tensor([[20.0, 30, 2], [40, 80, 1], [12, 88, 0]])
    points[0, 1] = torch.tensor([[120.0, 30, 0], [130, 50, 0], [140, 80, 0]])
    return gt, points


def test_only_boxes_with_a_visible_keypoint_take_part():
    gt, points = people()
    shifted = gt[:, :2] + 2
    pool = torch.cat([gt, shifted], dim=1)
    overlap = torch.tensor([[1.0, 1.0, -1.0, 0.9, 0.9]])
    index = torch.tensor([[0, 1, 0, 0, 1]])
    targets = keypoint_targets(
        pool, overlap, index, points, fg_thresh=0.5, max_rois=4, heatmap_size=8
    )
    assert targets.valid.sum() == 2
    found = {tuple(box) for box in targets.boxes[0][targets.valid[0]].tolist()}
    assert found == {tuple(gt[0, 0].tolist()), tuple(shifted[0, 0].tolist())}
    assert (targets.weights[~targets.valid] == 0).all()
    assert set(targets.weights[targets.valid].sum(dim=1).tolist()) == {2.0}


def test_the_quota_limits_the_draw():
    gt, points = people()
    pool = gt[:, :1].expand(1, 50, 4)
    targets = keypoint_targets(
        pool,
        torch.ones(1, 50),
        torch.zeros(1, 50).long(),
        points,
        fg_thresh=0.5,
        max_rois=6,
        heatmap_size=8,
    )
    assert targets.valid.sum() == 6


def test_visible_inside_counts_the_edges():
    points = torch.tensor([[10.0, 10, 1], [20, 20, 2], [21, 15, 2], [15, 15, 0]])
    assert visible_inside(points, torch.tensor([10.0, 10, 20, 20])).tolist() == [
        True,
        True,
        False,
        False,
    ]


def crowd_of(visible: list[int], proposals: int) -> dict[str, torch.Tensor]:
    """A mini-batch of one image: people in a row with that many visible keypoints each, and
    proposals right at the first one."""
    n, points = len(visible), torch.zeros(1, len(visible), 17, 3)
    boxes = torch.tensor([[[100.0 * i, 0, 100.0 * i + 80, 80] for i in range(n)]])
    for i, count in enumerate(visible):
        points[0, i, :count] = torch.tensor([100.0 * i + 40, 40, 2])
    return {
        "gt_boxes": boxes,
        "gt_classes": torch.ones(1, n, dtype=torch.int64),
        "gt_crowd": torch.zeros(1, n, dtype=torch.bool),
        "gt_keypoints": points,
        "proposals": boxes[:, :1].expand(-1, proposals, -1),
        "proposals_valid": torch.ones(1, proposals, dtype=torch.bool),
    }


def test_a_minibatch_must_have_more_keypoints_than_the_quota():
    # RoIs: the two people, and three proposals that show the first: 4 * 3 + 5 points
    batch = crowd_of([3, 5], 3)
    assert KeypointQuota(16, 0.5, 64).met_by(batch)
    assert not KeypointQuota(17, 0.5, 64).met_by(batch)
    batch["proposals_valid"][:] = False
    assert KeypointQuota(7, 0.5, 64).met_by(batch)
    assert not KeypointQuota(8, 0.5, 64).met_by(batch)
    assert not KeypointQuota(0, 0.5, 64).met_by(crowd_of([0, 0], 3))
    del batch["proposals"], batch["proposals_valid"]
    assert KeypointQuota(7, 0.5, 64).met_by(batch)


def test_the_quota_holds_whatever_is_drawn():
    # Two of five RoIs are drawn: those of the first person, with 3 points each, at the worst.
    batch = crowd_of([3, 17], 3)
    assert KeypointQuota(5, 0.5, 2).met_by(batch)
    assert not KeypointQuota(6, 0.5, 2).met_by(batch)


def test_the_count_is_that_of_the_targets():
    batch = crowd_of([3, 9, 1], 5)
    gt = [batch[key] for key in ("gt_boxes", "gt_classes", "gt_crowd")]
    pool = roi_pool_of(batch["proposals"], batch["proposals_valid"], *gt)
    targets = keypoint_targets(
        pool.boxes,
        pool.max_overlap,
        pool.gt_index,
        batch["gt_keypoints"],
        fg_thresh=0.5,
        max_rois=64,
        heatmap_size=56,
    )
    count = int(targets.weights.sum())
    assert KeypointQuota(count - 1, 0.5, 64).met_by(batch)
    assert not KeypointQuota(count, 0.5, 64).met_by(batch)


def test_only_keypoint_models_without_an_rpn_have_a_quota(cfg):
    assert KeypointQuota.from_cfg() is None
    cfg.MODEL.KEYPOINTS_ON = True
    assert KeypointQuota.from_cfg() == KeypointQuota(20, 0.5, 16)
    cfg.MODEL.FASTER_RCNN = True
    assert KeypointQuota.from_cfg() is None
