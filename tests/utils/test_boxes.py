"""Box arithmetic against the values the original computed (`golden/units/boxes.npz`)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import utils.boxes as box_utils
import utils.fpn as fpn_utils


@pytest.fixture(scope="module")
def golden(shared):
    return np.load(shared / "golden/units/boxes.npz")


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_coding_agrees_with_the_original(golden, weights):
    tag = f"w{int(weights[0])}"
    coded = box_utils.bbox_transform_inv(golden["a"], golden["g"], weights)
    np.testing.assert_allclose(coded, golden[f"inv_{tag}"], atol=1e-5, rtol=1e-5)
    decoded = box_utils.bbox_transform(golden["a"], golden["deltas"], weights)
    np.testing.assert_allclose(decoded, golden[f"fwd_{tag}"], atol=1e-2, rtol=1e-5)


def test_decoding_inverts_coding():
    rng = np.random.RandomState(0)
    corner, side = rng.uniform(0, 500, (2, 50, 2)), rng.uniform(1, 300, (2, 50, 2))
    boxes, targets = np.concatenate([corner, corner + side], axis=2).astype(np.float32)
    weights = (10.0, 10.0, 5.0, 5.0)
    deltas = box_utils.bbox_transform_inv(boxes, targets, weights)
    back = box_utils.bbox_transform(boxes, deltas, weights)
    np.testing.assert_allclose(back, targets, atol=1e-2)


def test_decoding_clips_the_growth():
    box = torch.tensor([[0.0, 0.0, 15.0, 15.0]])
    grown = box_utils.bbox_transform(box, torch.tensor([[0.0, 0.0, 50.0, 50.0]]))
    assert (grown[0, 2] - grown[0, 0] + 1).item() == pytest.approx(16 * 1000 / 16, rel=1e-5)
    assert pytest.approx(math.log(1000 / 16)) == box_utils.BBOX_XFORM_CLIP


def test_small_helpers_agree_with_the_original(golden):
    boxes = golden["a"]
    np.testing.assert_allclose(box_utils.boxes_area(boxes), golden["areas"], rtol=1e-6)
    np.testing.assert_allclose(box_utils.flip_boxes(boxes, 640), golden["flip"], atol=1e-4)
    np.testing.assert_allclose(box_utils.expand_boxes(boxes, 30 / 28), golden["expand"], atol=1e-3)
    np.testing.assert_allclose(box_utils.xyxy_to_xywh(boxes), golden["xywh"], atol=1e-4)
    np.testing.assert_allclose(box_utils.xywh_to_xyxy(golden["xywh"]), golden["xyxy"], atol=1e-3)
    np.testing.assert_array_equal(box_utils.unique_boxes(golden["unique_in"]), golden["unique"])


def test_overlaps_agree_with_the_original(golden):
    overlaps = box_utils.bbox_overlaps(golden["a"][:60], golden["g"][:70])
    np.testing.assert_allclose(overlaps, golden["overlaps"], atol=1e-6)


def test_clipping_is_to_the_last_pixel():
    boxes = np.array([[-5.0, -1.0, 700.0, 500.0, 3.0, 4.0, 5.0, 6.0]], dtype=np.float32)
    clipped = box_utils.clip_tiled_boxes(boxes, (480, 640, 3))
    np.testing.assert_array_equal(clipped, [[0, 0, 639, 479, 3, 4, 5, 6]])


def test_no_boxes_are_no_trouble():
    none = torch.zeros(0, 8)
    assert box_utils.bbox_transform(torch.zeros(0, 4), none).shape == (0, 8)
    assert box_utils.clip_tiled_boxes(none, (10, 10)).shape == (0, 8)
    assert box_utils.bbox_overlaps(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)
    assert box_utils.nms(np.zeros((0, 5), np.float32), 0.5).shape == (0,)


def test_numpy_in_numpy_out_and_tensors_stay_tensors(golden):
    assert isinstance(box_utils.boxes_area(golden["a"]), np.ndarray)
    assert isinstance(box_utils.boxes_area(torch.from_numpy(golden["a"])), torch.Tensor)


@pytest.mark.parametrize("high", [5, 6])
def test_levels_agree_with_the_original(golden, high):
    levels = fpn_utils.map_rois_to_fpn_levels(torch.from_numpy(golden["lvl_in"]), 2, high)
    np.testing.assert_array_equal(levels.numpy(), golden[f"lvl_2_{high}"])


def test_a_box_of_side_224_belongs_to_level_4():
    assert fpn_utils.map_rois_to_fpn_levels(torch.tensor([0.0, 0.0, 223.0, 223.0]), 2, 5) == 4
