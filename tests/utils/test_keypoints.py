"""Keypoint names and flips."""

from __future__ import annotations

import numpy as np

import utils.keypoints as keypoint_utils


def test_golden_flip(shared):
    golden = np.load(shared / "golden/units/keypoints.npz")
    names, flip_map = keypoint_utils.get_keypoints()
    assert len(names) == 17 and len(flip_map) == 8
    flipped = keypoint_utils.flip_keypoints(names, flip_map, golden["kp_in"], 300)
    np.testing.assert_array_equal(flipped, golden["kp_flip"])


def test_left_and_right_swap_and_unlabelled_points_go_to_zero():
    names = ["nose", "left_ear", "right_ear"]
    flip_map = keypoint_utils.keypoint_flip_map(names)
    assert flip_map == {"left_ear": "right_ear"}
    points = np.array([[[3, 5, 0], [4, 6, 0], [2, 1, 0]]])
    flipped = keypoint_utils.flip_keypoints(names, flip_map, points, 10)
    assert flipped.tolist() == [[[6, 0, 4], [4, 0, 6], [2, 0, 1]]]


def test_a_name_without_partner_stays():
    assert keypoint_utils.keypoint_flip_map(["left_horn", "tail"]) == {}
