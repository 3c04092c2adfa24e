"""Whole models in eval mode against what the original computed on two photographs.

RPN and NMS are discrete, so that a difference in the last bit can replace a proposal: each stage is
fed with the recorded output of the one before, and then the whole chain is run at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from torch import Tensor

import utils.blob as blob_utils
import utils.boxes as box_utils
from core.config import cfg as global_cfg
from core.config import reset_cfg
from core.test import (
    box_results_with_nms_and_limit,
    im_detect_all,
    im_detect_bbox,
    im_detect_keypoints,
    im_detect_mask,
    keypoint_results,
    segm_results,
)
from golden_weights import fill_from_recipe, golden_cfg
from modeling.model_builder import Generalized_RCNN

IMAGES = {"A": "000000000139.jpg", "B": "000000000802.jpg"}
SIZES = {"256": (256, 448), "320": (320, 544)}
CASES = [
    ("tiny_mask_FPN", "A256"),
    ("tiny_mask_FPN", "B320"),
    ("e2e_faster_rcnn_R-50-FPN_1x", "A256"),
    ("e2e_faster_rcnn_R-50-FPN_1x", "B320"),
    ("e2e_mask_rcnn_R-50-FPN_1x", "A256"),
    ("e2e_mask_rcnn_R-50-FPN_2x_gn", "A256"),
    ("e2e_keypoint_rcnn_R-50-FPN_1x", "A256"),
    ("e2e_faster_rcnn_X-101-32x8d-FPN_1x", "A256"),
    ("e2e_faster_rcnn_R-50-C4_1x", "A256"),
    ("e2e_mask_rcnn_R-50-C4_1x", "A256"),
]
# A C4 box head takes a minute for all 1000 proposals. They are sorted by score and chosen greedily,
# so the first of them are what a smaller RPN_POST_NMS_TOP_N gives.
C4_ROIS = 60
SELECTIONS = {
    "cfg": ["TEST.SCORE_THRESH", 0.05, "TEST.DETECTIONS_PER_IM", 100],
    "t0": ["TEST.SCORE_THRESH", 0.0, "TEST.DETECTIONS_PER_IM", 400],
}
SCORE_TOLERANCE, BOX_TOLERANCE = 1e-4, 0.02


@dataclass
class Case:
    """A model with golden weights, its input, and what the original made of it."""

    job: str
    options: list
    shared: Path
    model: Generalized_RCNN
    image: np.ndarray
    data: Tensor
    im_info: Tensor
    features: list[Tensor]  # fine to coarse
    golden: Any
    recorded: dict[str, Any]

    @property
    def num_rois(self) -> int:
        return C4_ROIS if "C4" in self.job else len(self.golden["rois"])

    @property
    def blob_conv(self) -> list[Tensor] | Tensor:
        return self.model._roi_maps(self.features)

    def configure(self, selection: str = "cfg") -> None:
        """This case's config, selecting detections in one of the two recorded ways."""
        golden_cfg(self.job, self.shared, [*self.options, *SELECTIONS[selection]])


# The model of the case before: two images in a row may need the same.
_models: dict[str, Generalized_RCNN] = {}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def built(request, shared) -> Case:
    job, tag = request.param
    scale, max_size = SIZES[tag[1:]]
    options = ["TEST.SCALE", scale, "TEST.MAX_SIZE", max_size]
    options += ["TEST.RPN_POST_NMS_TOP_N", C4_ROIS] if "C4" in job else []
    golden_cfg(job, shared, options)
    if job not in _models:
        _models.clear()
        _models[job] = Generalized_RCNN().eval()
        fill_from_recipe(_models[job], job, shared)
    model = _models[job]
    image = cv2.imread(str(shared / "golden/images" / IMAGES[tag[0]]))
    data, _, im_info = blob_utils.prep_images([image], scale, max_size, "cpu")
    with torch.no_grad():
        features = model._features(data)
    reset_cfg()
    files = shared / "golden/model"
    golden = np.load(files / f"{job}.eval_{tag}.npz")
    recorded = json.loads((files / f"{job}.eval_{tag}.json").read_text())
    return Case(job, options, shared, model, image, data, im_info, features, golden, recorded)


@pytest.fixture
def case(built, cfg) -> Case:
    built.configure()
    return built


def assert_map_agrees(case: Case, name: str, values: Tensor) -> None:
    """A feature map against the recorded corner and norm."""
    corner = case.golden[f"crop_{name}"]
    channels = corner.shape[1]
    size = np.abs(corner).max()
    np.testing.assert_allclose(
        values[:, :channels, :8, :8].numpy(), corner, atol=1e-5 * size, rtol=1e-4, err_msg=name
    )
    assert list(values.shape) == case.recorded[name]["shape"]
    assert values.double().norm().item() == pytest.approx(case.recorded[name]["l2"], rel=1e-5)


@torch.no_grad()
def test_backbone_and_rpn(case):
    for i, features in enumerate(reversed(case.features)):
        assert_map_agrees(case, f"conv{i}", features)
    logits, deltas = case.model.RPN.predict(case.features)
    for level, scores, shifts in zip(case.model.RPN.level_names, logits, deltas, strict=True):
        assert_map_agrees(case, f"rpn_cls_logits{level}", scores)
        assert_map_agrees(case, f"rpn_bbox_pred{level}", shifts)


@torch.no_grad()
def test_proposals(case):
    proposals = case.model.RPN.propose(*case.model.RPN.predict(case.features), case.im_info)
    boxes = proposals.boxes[proposals.valid].numpy()
    expected = case.golden["rois"][: case.num_rois, 1:]
    assert len(boxes) == len(expected)
    # Two proposals whose scores are equal but for the last bit may change places, and an overlap
    # at the threshold may fall on the other side.
    distance = np.abs(boxes[:, None] - expected[None]).max(axis=2)
    assert (distance.min(axis=0) < BOX_TOLERANCE).mean() >= 0.995
    assert (np.abs(boxes - expected).max(axis=1) < BOX_TOLERANCE).mean() >= 0.9


@torch.no_grad()
def test_box_head_on_recorded_proposals(case):
    rois = torch.from_numpy(case.golden["rois"][: case.num_rois])
    x = case.model.Box_Head(case.blob_conv, {"rois": rois})
    scores, deltas = case.model.Box_Outs(x)
    n = case.num_rois
    np.testing.assert_allclose(scores, case.golden["cls_score"][:n], atol=SCORE_TOLERANCE, rtol=0)
    np.testing.assert_allclose(deltas, case.golden["bbox_pred"][:n], atol=1e-4, rtol=1e-4)


def recorded_boxes(case: Case) -> np.ndarray:
    """(R, 4C) boxes decoded from the recorded proposals and deltas."""
    rois = case.golden["rois"][:, 1:] / np.float32(case.golden["im_scale"][0])
    boxes = box_utils.bbox_transform(
        rois, case.golden["bbox_pred"], global_cfg.MODEL.BBOX_REG_WEIGHTS
    )
    return box_utils.clip_tiled_boxes(boxes, case.image.shape)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_detections_of_recorded_outputs(case, selection):
    case.configure(selection)
    boxes = recorded_boxes(case)
    np.testing.assert_allclose(boxes[:50], case.golden["pred_boxes_first50"], atol=1e-3)
    _, _, cls_boxes = box_results_with_nms_and_limit(case.golden["cls_score"], boxes)
    dets, expected = rows(cls_boxes), case.golden[f"dets_{selection}"]
    np.testing.assert_array_equal(dets[:, [0, 5]], expected[:, [0, 5]])
    np.testing.assert_allclose(dets[:, 1:5], expected[:, 1:5], atol=1e-3)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_masks_of_recorded_detections(case, selection):
    if not global_cfg.MODEL.MASK_ON:
        pytest.skip("a model without masks")
    dets = case.golden[f"dets_{selection}"][: 30 if "C4" in case.job else 100]
    masks = im_detect_mask(case.model, case.golden["im_scale"][0], dets[:, 1:5], case.blob_conv)
    own = masks[np.arange(12), dets[:12, 0].astype(int)]
    np.testing.assert_allclose(own, case.golden[f"mask_probs_{selection}"], atol=1e-4)
    norms = np.sqrt(np.square(masks, dtype=np.float64).sum(axis=(1, 2, 3)))
    np.testing.assert_allclose(
        norms, case.golden[f"mask_l2_all_{selection}"][: len(dets)], rtol=1e-4
    )
    if selection == "t0":  # no run lengths were recorded
        return

    cls_boxes = [dets[dets[:, 0] == j, 1:] for j in range(global_cfg.MODEL.NUM_CLASSES)]
    segms = segm_results(cls_boxes, masks, dets[:, 1:5], *case.image.shape[:2])
    expected = [rle for of_class in case.recorded["segms_cfg"] for rle in of_class]
    found = [rle for of_class in segms for rle in of_class]
    assert_masks_agree(found, expected[: len(found)])


@pytest.mark.parametrize("selection", SELECTIONS)
def test_keypoints_of_recorded_detections(case, selection):
    if not global_cfg.MODEL.KEYPOINTS_ON:
        pytest.skip("a model without keypoints")
    dets = case.golden[f"dets_{selection}"][:100]
    maps = im_detect_keypoints(case.model, case.golden["im_scale"][0], dets[:, 1:5], case.blob_conv)
    np.testing.assert_allclose(maps[:3], case.golden[f"heatmaps_{selection}"], atol=1e-3)
    norms = np.sqrt(np.square(maps, dtype=np.float64).sum(axis=(1, 2, 3)))
    np.testing.assert_allclose(
        norms, case.golden[f"heatmaps_l2_{selection}"][: len(dets)], rtol=1e-4
    )
    _, of_person = keypoint_results([[], dets[:, 1:]], maps, dets[:, 1:5])
    points, expected = np.stack(of_person), case.golden[f"keyps_{selection}"][: len(dets)]
    np.testing.assert_allclose(points[:, 2:], expected[:, 2:], atol=1e-3, rtol=1e-3)
    # Random weights have maps with two peaks that differ in the last bits.
    near = np.abs(points[:, :2] - expected[:, :2]).max(axis=1) < 0.05
    assert near.mean() >= 0.995


def assert_masks_agree(found: list[dict], expected: list[dict]) -> None:
    """Random weights give noise around the threshold, so a pixel here and there may tip over."""
    different = (mask_util.decode(found) != mask_util.decode(expected)).sum(axis=(0, 1))
    assert different.max() <= 3, different
    assert (different == 0).mean() >= 0.9, different


def test_the_whole_chain(case):
    if "C4" in case.job:
        scores, boxes, _, _ = im_detect_bbox(case.model, case.image, *case.options[1:4:2])
        expected = recorded_boxes(case)[:C4_ROIS]
        np.testing.assert_allclose(scores, case.golden["cls_score"][:C4_ROIS], atol=SCORE_TOLERANCE)
        np.testing.assert_allclose(boxes, expected, atol=BOX_TOLERANCE)
        return
    cls_boxes, cls_segms, cls_keyps = im_detect_all(case.model, case.image)
    assert (cls_keyps is not None) == global_cfg.MODEL.KEYPOINTS_ON
    dets, expected = rows(cls_boxes), case.golden["dets_cfg"]
    tolerance = np.array([0.5] + [BOX_TOLERANCE] * 4 + [SCORE_TOLERANCE])
    same = (np.abs(dets[:, None] - expected[None]) < tolerance).all(axis=2)
    assert len(dets) == len(expected)
    assert same.any(axis=0).mean() >= 0.97, "too many of the original's detections are missing"

    assert (cls_segms is not None) == global_cfg.MODEL.MASK_ON
    if cls_segms is not None:
        found = [rle for of_class in cls_segms for rle in of_class]
        original = [rle for of_class in case.recorded["segms_cfg"] for rle in of_class]
        pairs = np.argwhere(same)
        assert_masks_agree([found[i] for i, _ in pairs], [original[k] for _, k in pairs])


def rows(cls_boxes: list) -> np.ndarray:
    """Detections as recorded: `[class, x1, y1, x2, y2, score]` in class order."""
    parts = [np.c_[np.full(len(b), j), b] for j, b in enumerate(cls_boxes) if len(b)]
    return np.vstack(parts).astype(np.float32)
