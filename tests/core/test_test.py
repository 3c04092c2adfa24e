"""Detections out of scored boxes, and what a batch may and may not change."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from core.config import merge_cfg_from_list
from core.errors import UserError
from core.suppression import class_nms_and_limit
from core.test import (
    box_results_with_nms_and_limit,
    detect_batch,
    im_detect_all,
    keypoint_results,
    network_size,
    segm_results,
)
from golden_weights import golden_cfg


def nms_slowly(boxes: np.ndarray, scores: np.ndarray, thresh: float) -> list[int]:
    """Greedy suppression, one pair of boxes at a time."""
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        if all(iou(boxes[i], boxes[k]) < thresh for k in kept):
            kept.append(int(i))
    return kept


def iou(a: np.ndarray, b: np.ndarray) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0]) + 1
    height = min(a[3], b[3]) - max(a[1], b[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


def results_slowly(boxes, scores, classes, images, thresh, limit) -> list[int]:
    """What class_nms_and_limit does, image by image and class by class."""
    out: list[int] = []
    for image in np.unique(images):
        kept: list[int] = []
        for cls in np.unique(classes[images == image]):
            index = np.flatnonzero((images == image) & (classes == cls))
            kept += sorted(index[nms_slowly(boxes[index], scores[index], thresh)])
        if 0 < limit < len(kept):
            cut = np.sort(scores[kept])[-limit]
            kept = [k for k in kept if scores[k] >= cut]
        out += kept
    return out


@pytest.mark.parametrize("limit", [0, 5, 12, 1000])
def test_agrees_with_nms_one_class_and_image_at_a_time(limit):
    rng = np.random.default_rng(limit)
    n = 300
    corner = rng.uniform(0, 60, (n, 2))
    boxes = np.hstack([corner, corner + rng.uniform(5, 40, (n, 2))]).astype(np.float32)
    # Few different scores: ties must be broken by position and may exceed the limit.
    scores = (rng.integers(1, 12, n) / 12).astype(np.float32)
    classes, images = rng.integers(1, 5, n), rng.choice([0, 1, 3], n)
    keep, kept_boxes, kept_scores = class_nms_and_limit(
        *map(torch.from_numpy, (boxes, scores, classes, images)), nms_thresh=0.4, limit=limit
    )
    assert keep.tolist() == results_slowly(boxes, scores, classes, images, 0.4, limit)
    np.testing.assert_array_equal(kept_boxes, boxes[keep])
    np.testing.assert_array_equal(kept_scores, scores[keep])


def test_nothing_found_is_no_detection(cfg):
    cfg.MODEL.FASTER_RCNN = True
    scores = np.full((3, 4), 0.01, np.float32)
    kept, boxes, cls_boxes = box_results_with_nms_and_limit(scores, np.zeros((3, 16), np.float32))
    assert kept.shape == (0,)
    assert boxes.shape == (0, 4)
    assert [len(b) for b in cls_boxes] == [0, 0, 0, 0]


class FindsNothing(torch.nn.Module):
    """A network in whose images no proposal, or none worth keeping, turns up."""

    def __init__(self, num_rois: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.num_rois = num_rois

    def forward(self, data, im_info):
        r = self.num_rois
        rois, scores = torch.zeros(r, 5), torch.full((r, 4), 0.01)
        deltas = torch.zeros(r, 16)
        return {"rois": rois, "cls_score": scores, "bbox_pred": deltas, "blob_conv": data}


@pytest.mark.parametrize("num_rois", [0, 5])
def test_an_image_may_hold_nothing(num_rois, cfg):
    options = ["MODEL.FASTER_RCNN", True, "MODEL.MASK_ON", True, "MODEL.NUM_CLASSES", 4]
    merge_cfg_from_list(options)
    image = np.zeros((20, 30, 3), np.uint8)
    cls_boxes, cls_segms, _ = im_detect_all(FindsNothing(num_rois), image)
    assert cls_segms == [[], [], [], []]
    assert cls_boxes[0] == []
    assert [boxes.shape for boxes in cls_boxes[1:]] == [(0, 5)] * 3


def test_no_detection_has_no_keypoints(cfg):
    cls_boxes = [[], np.zeros((0, 5), np.float32)]
    maps = np.zeros((0, 17, 56, 56), np.float32)
    assert keypoint_results(cls_boxes, maps, np.zeros((0, 4), np.float32)) == [[], []]
    assert [len(boxes) for boxes in cls_boxes] == [0, 0]


def test_a_batch_of_differently_padded_images_is_refused(cfg):
    merge_cfg_from_list(["MODEL.FASTER_RCNN", True])
    images = [np.zeros(size, np.uint8) for size in ((20, 30, 3), (30, 20, 3))]
    with pytest.raises(ValueError, match="equal padded sizes"):
        detect_batch(FindsNothing(1), images)


@pytest.mark.parametrize(
    "case",
    ["plain", "nms0.3", "thr0", "thr0.2", "nolimit", "limit10", "soft_linear", "soft_gauss"]
    + ["soft_hard", "vote", "vote_avg", "vote_iou", "soft_vote"],
)
def test_box_results_agree_with_the_original(case, shared, cfg):
    golden = np.load(shared / "golden/tta/box_results.npz")
    options = json.loads((shared / "golden/tta/box_results.json").read_text())[case]["opts"]
    golden_cfg("e2e_mask_rcnn_R-50-FPN_1x", shared, options)
    scores, boxes, cls_boxes = box_results_with_nms_and_limit(golden["scores"], golden["boxes"])

    dets = np.vstack(
        [np.c_[np.full(len(b), j), b] for j, b in enumerate(cls_boxes) if len(b)]
    ).astype(np.float32)
    if case.startswith(("soft", "vote")):  # sums and exponentials, rounded elsewhere
        np.testing.assert_allclose(dets, golden[f"dets_{case}"], rtol=1e-5)
    else:
        np.testing.assert_array_equal(dets, golden[f"dets_{case}"])
    np.testing.assert_array_equal(np.c_[boxes, scores], dets[:, 1:])


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [
        ("TEST.SOFT_NMS.METHOD", "cubic", "hard, linear, gaussian"),
        ("TEST.BBOX_VOTE.SCORING_METHOD", "MAX", "ID, TEMP_AVG"),
    ],
)
def test_an_unknown_method_is_named_even_when_nothing_is_found(key, value, known, cfg):
    enabled = key.rsplit(".", 1)[0] + ".ENABLED"
    merge_cfg_from_list(["MODEL.FASTER_RCNN", True, enabled, True, key, value])
    with pytest.raises(UserError, match=f"{key} must be one of {known}.*, not '{value}'"):
        box_results_with_nms_and_limit(np.zeros((1, 2), np.float32), np.zeros((1, 8), np.float32))


def test_classes_and_images_neither_lower_nor_move_each_other(cfg):
    """Soft-NMS and voting of several images at once give what each class of each alone gives."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 60, (200, 2))
    boxes = np.hstack([corner, corner + rng.uniform(10, 40, (200, 2))]).astype(np.float32)
    inputs = (boxes, rng.random(200).astype(np.float32), rng.integers(1, 4, 200))
    boxes, scores, classes = map(torch.from_numpy, inputs)
    images = torch.from_numpy(rng.integers(0, 3, 200))
    cfg.TEST.SOFT_NMS.ENABLED = cfg.TEST.BBOX_VOTE.ENABLED = True
    cfg.TEST.BBOX_VOTE.SCORING_METHOD = "AVG"
    options = {"soft_nms": cfg.TEST.SOFT_NMS, "bbox_vote": cfg.TEST.BBOX_VOTE}
    options |= {"nms_thresh": 0.4, "limit": 0}
    keep, moved, lowered = class_nms_and_limit(boxes, scores, classes, images, **options)
    for image in range(3):
        for cls in range(1, 4):
            rows = ((images == image) & (classes == cls)).nonzero()[:, 0]
            alone = class_nms_and_limit(
                boxes[rows], scores[rows], classes[rows], images[rows], **options
            )
            mine = (images[keep] == image) & (classes[keep] == cls)
            assert torch.equal(keep[mine], rows[alone[0]])
            assert torch.equal(moved[mine], alone[1]) and torch.equal(lowered[mine], alone[2])


def test_segm_results_agree_with_the_original(shared, cfg):
    golden = np.load(shared / "golden/units/segms.npz")
    expected = json.loads((shared / "golden/units/segms.json").read_text())["rles"]
    order = np.argsort(golden["cls"], kind="stable")
    masks = np.zeros((len(order), 81, 28, 28), np.float32)
    masks[np.arange(len(order)), golden["cls"][order]] = golden["masks_cls"][order]
    cls_boxes = [golden["boxes"][golden["cls"] == j] for j in range(81)]

    cls_segms = segm_results(cls_boxes, masks, golden["boxes"][order], 300, 400)

    assert [len(segms) for segms in cls_segms] == [len(boxes) for boxes in cls_boxes]
    assert [rle for segms in cls_segms for rle in segms] == [expected[i] for i in order]


@pytest.mark.parametrize(
    ("size", "fpn", "expected"),
    [
        ((480, 640), True, (800, 1088)),
        ((480, 640), False, (800, 1067)),
        ((500, 1500), True, (448, 1344)),  # the long side rules: 1333, then padded
    ],
)
def test_network_size(size, fpn, expected, cfg):
    merge_cfg_from_list(["TEST.SCALE", 800, "TEST.MAX_SIZE", 1333, "FPN.FPN_ON", fpn])
    assert network_size(*size) == expected
