"""RoI matching, sampling and regression targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import utils.boxes as box_utils
from roi_data.fast_rcnn import bbox_targets, draw_rois, match_rois, roi_pool_of, sample_rois

OPTIONS = {
    "batch_size": 64,
    "fg_fraction": 0.25,
    "fg_thresh": 0.5,
    "bg_thresh_hi": 0.5,
    "bg_thresh_lo": 0.0,
    "bbox_thresh": 0.5,
    "bbox_reg_weights": (10.0, 10.0, 5.0, 5.0),
}
CASES = [
    "faster_FPN_b512_pair0",
    "faster_FPN_b64_pair1",
    "faster_C4_b512_pair1",
    "faster_FPN_agnostic_b512_pair0",
    "mask_FPN_b512_pair1",
]


def image_of(golden, image):
    """Boxes, classes, crowd flags and recorded matches of one image of a recorded case."""
    return {
        name: golden[f"im{image}_{name}"]
        for name in (
            "boxes",
            "gt_classes",
            "max_overlaps",
            "max_classes",
            "box_to_gt_ind_map",
            "is_crowd",
        )
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("image", [0, 1])
def test_matches_agree_with_the_original(case, image, shared):
    golden = np.load(shared / f"golden/targets/{case}.npz")
    one = image_of(golden, image)
    gt = one["gt_classes"] > 0
    matches = match_rois(
        torch.from_numpy(one["boxes"])[None],
        torch.from_numpy(~one["is_crowd"])[None],
        torch.from_numpy(one["boxes"][gt])[None],
        torch.from_numpy(one["gt_classes"][gt]).long()[None],
        num_own=int(gt.sum()),
    )
    own = ~one["is_crowd"]
    np.testing.assert_allclose(matches.max_overlap[0][own], one["max_overlaps"][own], atol=1e-6)
    np.testing.assert_array_equal(matches.gt_class[0][own], one["max_classes"][own])
    met = own & (one["max_overlaps"] > 0)
    np.testing.assert_array_equal(matches.gt_index[0][met], one["box_to_gt_ind_map"][met])


@pytest.mark.parametrize("case", CASES)
def test_regression_targets_agree_with_the_original(case, shared):
    """Deltas of the RoIs that the original sampled, found again in its pool by their boxes."""
    golden = np.load(shared / f"golden/targets/{case}.npz")
    shape = golden["bbox_targets.shape"]
    dense = np.zeros(shape, np.float32)
    dense.ravel()[golden["bbox_targets.idx"]] = golden["bbox_targets.val"]
    agnostic = "agnostic" in case
    checked = 0
    for image in (0, 1):
        one = image_of(golden, image)
        scale = golden["im_scales"][image]
        rows = np.flatnonzero((golden["rois"][:, 0] == image) & (golden["labels_int32"] > 0))
        pool = torch.from_numpy(one["boxes"] * scale)
        gt = torch.from_numpy(one["boxes"][one["gt_classes"] > 0])
        for row in rows:
            distance = (pool - torch.from_numpy(golden["rois"][row, 1:])).abs().amax(dim=1)
            at = int(distance.argmin())
            assert distance[at] < 1e-3
            got = bbox_targets(
                torch.from_numpy(one["boxes"][at])[None, None],
                gt[None],
                torch.tensor([[int(one["box_to_gt_ind_map"][at])]]),
                torch.ones(1, 1, dtype=torch.bool),
                (10.0, 10.0, 5.0, 5.0),
            )
            label = 1 if agnostic else golden["labels_int32"][row]
            want = dense[row, 4 * label : 4 * label + 4]
            np.testing.assert_allclose(got[0, 0], want, atol=1e-5, rtol=1e-5)
            checked += 1
    assert checked > 10


def scene():
    """Two images of 300 proposals around their objects; the second object of image 0 is a crowd."""
    rng = np.random.RandomState(2)
    gt = torch.tensor(
        [
            [[10.0, 10, 80, 90], [100, 100, 220, 240], [0, 0, 0, 0]],
            [[50.0, 40, 120, 160]] + [[0] * 4] * 2,
        ]
    )
    classes = torch.tensor([[3, 7, 0], [5, 0, 0]])
    crowd = torch.tensor([[False, True, False], [False, False, False]])
    noise = torch.from_numpy(rng.uniform(-40, 40, (2, 300, 4))).float()
    boxes = gt[:, :1] + noise
    boxes[0, :100] = gt[0, 1] + noise[0, :100] / 8
    boxes[..., 2:] = torch.maximum(boxes[..., 2:], boxes[..., :2] + 1)
    valid = torch.ones(2, 300, dtype=torch.bool)
    valid[1, 200:] = False
    return boxes, valid, gt, classes, crowd


def test_sampling_keeps_its_invariants():
    torch.manual_seed(0)
    boxes, valid, gt, classes, crowd = scene()
    sampled = sample_rois(roi_pool_of(boxes, valid, gt, classes, crowd), gt, **OPTIONS)
    assert sampled.boxes.shape == (2, 64, 4)
    assert sampled.valid.all()
    foreground = sampled.foreground.sum(dim=1)
    assert (foreground <= 16).all() and (foreground > 0).all()
    for image in range(2):
        count = int(foreground[image])
        assert sampled.foreground[image, :count].all()  # foreground comes first
        assert len(torch.unique(sampled.boxes[image], dim=0)) == 64  # without replacement
    # A proposal on the crowd takes the crowd's class; the crowd box itself is never drawn.
    assert set(sampled.labels[0].tolist()) == {0, 3, 7}
    assert not (sampled.boxes[0] == gt[0, 1]).all(dim=1).any()
    assert (sampled.bbox_targets[~sampled.foreground] == 0).all()


def deltas_slowly(box, goal) -> list[float]:
    (x, y, w, h), (gx, gy, gw, gh) = (
        (b[0] + 0.5 * (b[2] - b[0] + 1), b[1] + 0.5 * (b[3] - b[1] + 1), b[2] - b[0] + 1,
         b[3] - b[1] + 1)
        for b in (box, goal)
    )  # fmt: skip
    return [10 * (gx - x) / w, 10 * (gy - y) / h, 5 * np.log(gw / w), 5 * np.log(gh / h)]


def test_file_proposals_are_regressed_to_objects_only():
    """As e2e the crowd gives the class, but the deltas lead to the best object."""
    torch.manual_seed(0)
    boxes, valid, gt, classes, crowd = scene()
    own = (classes > 0) & ~crowd
    pool = roi_pool_of(boxes, valid, gt, classes, crowd)
    sampled = sample_rois(pool, gt, **OPTIONS, regress_to=own)
    on_crowd = 0
    for image, rois in enumerate(sampled.boxes):
        for row in sampled.foreground[image].nonzero()[:, 0]:
            label, box = int(sampled.labels[image, row]), rois[row].tolist()
            on_crowd += label == 7
            # each image has one object
            goal = deltas_slowly(box, gt[image, 0].tolist())
            np.testing.assert_allclose(
                sampled.bbox_targets[image, row].numpy(), goal, rtol=1e-4, atol=1e-4
            )
    assert on_crowd > 3
    assert (sampled.regressed == sampled.foreground).all()
    only_crowd = torch.zeros_like(own)
    assert not sample_rois(pool, gt, **OPTIONS, regress_to=only_crowd).regressed.any()


def test_deltas_are_learned_from_bbox_thresh_on():
    torch.manual_seed(0)
    boxes, valid, gt, classes, crowd = scene()
    pool = roi_pool_of(boxes, valid, gt, classes, crowd)
    sampled = sample_rois(pool, gt, **{**OPTIONS, "bbox_thresh": 0.75})
    for image in range(2):
        for row in sampled.foreground[image].nonzero()[:, 0]:
            box, goal = sampled.boxes[image, row], gt[image, sampled.gt_index[image, row]]
            iou = box_utils.bbox_overlaps(box[None], goal[None]).item()
            assert bool(sampled.regressed[image, row]) == (iou >= 0.75)
    assert 0 < sampled.regressed.sum() < sampled.foreground.sum()


def test_few_proposals_leave_empty_slots():
    boxes, valid, gt, classes, crowd = scene()
    valid[:] = False
    valid[:, 150:170] = True
    sampled = sample_rois(roi_pool_of(boxes, valid, gt, classes, crowd), gt, **OPTIONS)
    assert sampled.valid.sum(dim=1).tolist() == [21, 21]  # and one ground truth each
    assert (sampled.labels[~sampled.valid] == 0).all()


def test_an_image_without_objects_gives_background_only():
    boxes, valid, gt, classes, crowd = scene()
    sampled = sample_rois(
        roi_pool_of(boxes, valid, gt, torch.zeros_like(classes), crowd & False), gt, **OPTIONS
    )
    assert sampled.valid.all()
    assert not sampled.foreground.any()


def test_background_has_a_lower_bound():
    overlap = torch.tensor([[0.05, 0.2, 0.3, 0.6, 0.45, -1.0]])
    index, valid = draw_rois(overlap, 6, 2, 0.5, 0.5, 0.1)
    assert sorted(index[0][valid[0]].tolist()) == [1, 2, 3, 4]
    assert index[0, 0] == 3


def test_two_objects_in_the_same_box_keep_their_classes():
    box = torch.tensor([[[5.0, 5, 50, 50], [5, 5, 50, 50]]])
    matches = match_rois(
        box, torch.ones(1, 2, dtype=torch.bool), box, torch.tensor([[4, 9]]), num_own=2
    )
    assert matches.gt_class.tolist() == [[4, 9]]
