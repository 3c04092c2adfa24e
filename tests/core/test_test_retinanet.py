"""RetinaNet's detections against a slow reference: threshold, best of each level, boxes, NMS."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import nn as mynn
import utils.blob as blob_utils
from core.errors import UserError
from core.test import detect_batch, im_detect_all, im_detect_bbox
from retinanet_models import OPTION_SETS, by_anchor, narrow_retinanet

SMALL = {
    "TEST.SCALE": 96,
    "TEST.MAX_SIZE": 160,
    "TEST.DETECTIONS_PER_IM": 40,
    "RETINANET.PRE_NMS_TOP_N": 150,
}


def opinionated(options=None):
    """A model whose random predictions differ from place to place, in eval mode."""
    model = narrow_retinanet({**SMALL, **(options or {})}).eval()
    head = model.RetinaNet_Outs
    with torch.no_grad():
        for conv in (*head.cls_tower, *(head.bbox_tower or ()), head.cls_pred):
            mynn.init.MSRAFill(conv.weight)
        head.cls_pred.bias.mul_(0.6)
        head.bbox_pred.weight.normal_(std=0.03)
    return model


def image(seed: int = 0, height: int = 60, width: int = 90) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)


def iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0]) + 1
    h = min(a[3], b[3]) - max(a[1], b[1]) + 1
    areas = [(x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b)]
    return w * h / (sum(areas) - w * h) if w > 0 and h > 0 else 0.0


def decode(anchor, d):
    w, h = anchor[2] - anchor[0] + 1, anchor[3] - anchor[1] + 1
    cx, cy = anchor[0] + w / 2 + d[0] * w, anchor[1] + h / 2 + d[1] * h
    w, h = (s * math.exp(min(x, math.log(1000 / 16))) for s, x in ((w, d[2]), (h, d[3])))
    return [cx - w / 2, cy - h / 2, cx + w / 2 - 1, cy + h / 2 - 1]


@torch.no_grad()
def slow_candidates(model, im, softmax=False, bbox_reg=True, top_n=150):
    """[(score, class, box in image pixels)] of all levels."""
    data, (scale,), _ = blob_utils.prep_images([im], 96, 160, "cpu")
    head = model.RetinaNet_Outs
    logits, deltas = head.predict(model._features(data))
    found = []
    for level, x, d, anchors in zip(head.levels, logits, deltas, head.anchors(logits), strict=True):
        scores, boxes = by_anchor(x, 9)[0], by_anchor(d, 9)[0]
        if softmax:
            e = np.exp(scores)
            scores = (e / e.sum(axis=1, keepdims=True))[:, 1:]
        else:
            scores = 1 / (1 + np.exp(-scores))
        thresh = 0.0 if level == 7 else 0.05
        pairs = [(scores[i, c], i, c) for i, c in np.argwhere(scores > thresh)]
        for score, i, c in sorted(pairs, reverse=True)[:top_n]:
            slot = c if boxes.shape[1] > 4 else 0
            box = anchors[i].double().numpy()
            if bbox_reg:
                box = decode(box, boxes[i, 4 * slot : 4 * slot + 4])
            x1, y1, x2, y2 = np.asarray(box) / scale
            x1, x2 = (min(max(v, 0), im.shape[1] - 1) for v in (x1, x2))
            y1, y2 = (min(max(v, 0), im.shape[0] - 1) for v in (y1, y2))
            found.append((score, c + 1, (x1, y1, x2, y2)))
    return found


def slow_detections(candidates, limit=40, nms=0.5):
    """Class -> (n, 5), best first."""
    kept = []
    for score, c, box in sorted(candidates, reverse=True):
        if all(other != c or iou(box, b) < nms for _, other, b in kept):
            kept.append((score, c, box))
    found = {c: [] for c in (1, 2, 3)}
    for score, c, box in kept[:limit]:
        found[c].append((*box, score))
    return {c: np.array(rows).reshape(-1, 5) for c, rows in found.items()}


@pytest.mark.parametrize("name", OPTION_SETS)
def test_detections_agree_with_a_slow_reference(name, cfg):
    model = opinionated(OPTION_SETS[name])
    candidates = slow_candidates(model, image(), softmax=name == "softmax")
    assert len(candidates) > 300
    cls_boxes, cls_segms, cls_keyps = im_detect_all(model, image())
    assert cls_segms is None and cls_keyps is None and len(cls_boxes[0]) == 0
    assert sum(map(len, cls_boxes)) == 40
    for c, expected in slow_detections(candidates).items():
        np.testing.assert_allclose(cls_boxes[c], expected, atol=2e-3)


def test_without_box_regression_the_anchors_are_the_boxes(cfg):
    model = opinionated({"TEST.BBOX_REG": False})
    cls_boxes, _, _ = im_detect_all(model, image())
    expected = slow_detections(slow_candidates(model, image(), bbox_reg=False))
    # Clipped anchors tie in places: the scores tell.
    for c in (1, 2, 3):
        np.testing.assert_allclose(cls_boxes[c][:, 4], expected[c][:, 4], atol=1e-5)


def test_only_the_coarsest_level_shows_what_hardly_scores(cfg):
    model = opinionated({"RETINANET.INFERENCE_TH": 0.99, "RETINANET.PRE_NMS_TOP_N": 7})
    model.RetinaNet_Outs.cls_pred.bias.data.fill_(-3.0)
    cls_boxes, _, _ = im_detect_all(model, image())
    assert 0 < sum(map(len, cls_boxes)) <= 7


def test_neither_ties_nor_score_thresh_change_the_number_kept(cfg):
    model = opinionated({"TEST.DETECTIONS_PER_IM": 5, "TEST.SCORE_THRESH": 0.9})
    model.RetinaNet_Outs.cls_pred.weight.data.zero_()
    model.RetinaNet_Outs.cls_pred.bias.data.zero_()
    found = np.concatenate(im_detect_all(model, image())[0][1:])
    assert len(found) == 5
    np.testing.assert_allclose(found[:, 4], 0.5)


def test_soft_nms_lowers_scores_and_keeps_their_order(cfg):
    model = opinionated({"TEST.SOFT_NMS.ENABLED": True})
    hard = slow_detections(slow_candidates(model, image()), limit=10**6)
    cls_boxes, _, _ = im_detect_all(model, image())
    assert sum(map(len, cls_boxes)) == 40
    # The best of a class are as they were; those that hard NMS drops follow with less.
    assert all(cls_boxes[c][0, 4] == pytest.approx(hard[c][0, 4], abs=1e-5) for c in hard)
    assert all((np.diff(boxes[:, 4]) <= 0).all() for boxes in cls_boxes[1:])


def test_what_an_image_gives_does_not_depend_on_its_batch(cfg):
    model = opinionated()
    images = [image(seed) for seed in range(3)]
    together = detect_batch(model, images)
    for im, found in zip(images, together, strict=True):
        (alone,) = detect_batch(model, [im])
        torch.testing.assert_close(found.boxes, alone.boxes, atol=1e-3, rtol=0)
        torch.testing.assert_close(found.scores, alone.scores, atol=1e-5, rtol=0)
        assert torch.equal(found.classes, alone.classes)


def test_an_image_without_detections_is_an_empty_result(cfg):
    model = opinionated({"RETINANET.SOFTMAX": False})
    model.RetinaNet_Outs.cls_pred.bias.data.fill_(-200.0)
    cls_boxes, _, _ = im_detect_all(model, image())
    assert [len(boxes) for boxes in cls_boxes] == [0] * 4
    assert cls_boxes[1].shape == (0, 5)


def test_scores_by_proposal_are_refused(cfg):
    with pytest.raises(UserError, match="im_detect_all"):
        im_detect_bbox(opinionated(), image(), 96, 160)
