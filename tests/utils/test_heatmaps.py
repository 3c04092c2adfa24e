"""Heat maps to points against the original's values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.heatmaps import compute_oks, flip_heatmaps, heatmaps_to_keypoints, nms_oks


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden/units/keypoints.npz")


@pytest.mark.parametrize("min_size", [0, 1, 64])
def test_points_agree_with_the_original(golden, min_size):
    maps, boxes = torch.from_numpy(golden["maps"]), torch.from_numpy(golden["rois"])
    points = heatmaps_to_keypoints(maps, boxes, min_size).numpy()
    np.testing.assert_allclose(points, golden[f"kps_min{min_size}"], atol=2e-3, rtol=1e-4)


def test_no_boxes_give_no_points():
    assert heatmaps_to_keypoints(torch.zeros(0, 17, 56, 56), torch.zeros(0, 4)).shape == (0, 4, 17)


def test_flipping_swaps_sides_and_twice_is_nothing(golden):
    maps = torch.from_numpy(golden["maps"])
    pairs = [(i, i + 1) for i in range(1, 17, 2)]  # COCO: left and right alternate after the nose
    flipped = flip_heatmaps(maps, pairs)
    torch.testing.assert_close(flipped[:, 1], maps[:, 2].flip(-1))
    torch.testing.assert_close(flip_heatmaps(flipped, pairs), maps)
    np.testing.assert_allclose(flipped[0].numpy(), golden["flip_heatmaps_sum"], atol=1e-3)


def test_similarity_and_suppression_agree_with_the_original(golden):
    people = golden["oks_in"]
    boxes = golden["kp_rois"]
    np.testing.assert_allclose(
        compute_oks(people[0], boxes[0], people[1:]), golden["oks_0_vs_rest"], atol=1e-6
    )
    assert nms_oks(people, boxes, 0.3) == golden["oks_keep_0.3"].tolist()
