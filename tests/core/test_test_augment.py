"""Test-time augmentation: what the original computed, and rules that hold for any network."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from core.config import ConfigError, assert_and_infer_cfg, merge_cfg_from_list
from core.test import (
    class_results,
    detect_batch,
    im_detect_all,
    im_detect_bbox,
    im_detect_bbox_aug,
    im_detect_keypoints_aug,
    im_detect_mask,
    im_detect_mask_aspect_ratio,
    im_detect_mask_aug,
    im_detect_mask_hflip,
)
from core.test_augment import augmented_views
from core.test_forward import View
from golden_weights import fill_from_recipe, golden_cfg
from modeling.model_builder import Generalized_RCNN
from utils.heatmaps import nms_oks

SIZES = ["TEST.SCALE", 256, "TEST.MAX_SIZE", 448]
CASES = [
    "tiny_mask_FPN.base",
    "tiny_mask_FPN.box_hflip",
    "tiny_mask_FPN.box_all",
    "tiny_mask_FPN.mask_soft_avg",
    "tiny_mask_FPN.mask_soft_max",
    "tiny_mask_FPN.both",
    "tiny_keypoint_FPN.base",
    "tiny_keypoint_FPN.kps_avg",
]
_models: dict[str, Generalized_RCNN] = {}


def load(case: str, shared: Path) -> tuple[Generalized_RCNN, np.ndarray, Any, dict[str, Any]]:
    """Configure a golden case; the model, the image and what was recorded."""
    files = shared / "golden/tta"
    recorded = json.loads((files / f"{case}.json").read_text())
    aug = [item for key, value in recorded["aug"].items() for item in (f"TEST.{key}", value)]
    job = case.split(".")[0]
    stem = recorded["config"] if "keypoint" in job else job
    golden_cfg(stem, shared, [*recorded["opts"], *SIZES, *aug])
    if job not in _models:
        _models[job] = Generalized_RCNN().eval()
        fill_from_recipe(_models[job], job, shared)
    image = cv2.imread(str(shared / "golden/images/000000000139.jpg"))
    return _models[job], image, np.load(files / f"{case}.npz"), recorded


@pytest.mark.parametrize("case", CASES)
def test_the_whole_chain_agrees_with_the_original(case, shared, cfg):
    model, image, golden, _ = load(case, shared)
    cls_boxes, _, _ = im_detect_all(model, image)
    dets = np.vstack([np.c_[np.full(len(b), j), b] for j, b in enumerate(cls_boxes) if len(b)])
    near = np.abs(dets[:, None] - golden["dets"][None]) < [0.5, 0.02, 0.02, 0.02, 0.02, 1e-4]
    assert len(dets) == len(golden["dets"])
    # Random weights: a proposal here and there tips over at a threshold.
    assert near.all(axis=2).any(axis=0).mean() >= 0.97


@pytest.mark.parametrize("case", ["tiny_mask_FPN.box_hflip", "tiny_mask_FPN.box_all"])
def test_boxes_of_all_views_agree_with_the_original(case, shared, cfg):
    model, image, _, recorded = load(case, shared)
    scores, boxes, scale, blob_conv = im_detect_bbox_aug(model, image)
    assert_statistics(scores, recorded["aug_scores"])
    assert_statistics(boxes, recorded["aug_boxes"])
    # The plain view comes last, and its feature maps are what masks are pooled from.
    alone = im_detect_bbox(model, image, cfg.TEST.SCALE, cfg.TEST.MAX_SIZE)
    np.testing.assert_allclose(boxes[-len(alone[1]) :], alone[1], atol=0.02)
    assert scale == alone[2]
    assert [x.shape for x in blob_conv] == [x.shape for x in alone[3]]


def assert_statistics(values: np.ndarray, recorded: dict[str, Any]) -> None:
    assert list(values.shape) == recorded["shape"]
    values = values.astype(np.float64)
    found = [values.mean(), values.std(), np.sqrt((values**2).sum())]
    np.testing.assert_allclose(found, [recorded[k] for k in ("mean", "std", "l2")], rtol=1e-4)


@pytest.mark.parametrize("case", ["soft_avg", "soft_max"])
def test_masks_of_all_views_agree_with_the_original(case, shared, cfg):
    model, image, golden, recorded = load(f"tiny_mask_FPN.mask_{case}", shared)
    dets = golden["dets"]
    _, _, scale, blob_conv = im_detect_bbox(model, image, cfg.TEST.SCALE, cfg.TEST.MAX_SIZE)
    masks = im_detect_mask_aug(model, image, dets[:, 1:5], scale, blob_conv)
    assert_statistics(masks, recorded["mask"])
    own = masks[np.arange(20), dets[:20, 0].astype(int)]
    np.testing.assert_allclose(own, golden["mask_probs"], atol=1e-4)


def test_keypoints_of_all_views_agree_with_the_original(shared, cfg):
    model, image, golden, _ = load("tiny_keypoint_FPN.kps_avg", shared)
    boxes = golden["dets"][:, 1:5]
    _, _, scale, blob_conv = im_detect_bbox(model, image, cfg.TEST.SCALE, cfg.TEST.MAX_SIZE)
    maps = im_detect_keypoints_aug(model, image, boxes, scale, blob_conv)
    np.testing.assert_allclose(maps[:3], golden["heatmaps"], atol=1e-3)


def test_the_views_come_in_detectron_s_order(cfg):
    options = {"H_FLIP": True, "SCALES": (400, 500), "SCALE_H_FLIP": True, "MAX_SIZE": 900}
    options |= {"ENABLED": True, "ASPECT_RATIOS": (0.5,), "ASPECT_RATIO_H_FLIP": False}
    merge_cfg_from_list([x for k, v in options.items() for x in (f"TEST.BBOX_AUG.{k}", v)])
    assert [view for group in augmented_views(cfg.TEST.BBOX_AUG) for view in group] == [
        View(600, 1000, flip=True),
        View(400, 900),
        View(400, 900, flip=True),
        View(500, 900),
        View(500, 900, flip=True),
        View(600, 1000, ratio=0.5),
    ]


@pytest.mark.parametrize("view", [View(8, 9, 0.7, True), View(8, 9, 0.7), View(8, 9, 1.0, True)])
def test_a_view_gives_boxes_back(view):
    boxes = torch.tensor([[3.0, 4, 30, 44], [0, 0, 100, 9]])
    widths = torch.full((2, 1), view.width(101))
    seen = view.from_image(boxes, widths)
    assert bool((seen[:, 0] <= seen[:, 2]).all()) and bool((seen[:, 2] < widths[:, 0]).all())
    torch.testing.assert_close(view.to_image(seen, widths), boxes)


KPS_AUG = ["TEST.KPS_AUG.ENABLED", True, "TEST.KPS_AUG.SCALES", (192, 320)]


def test_small_people_do_without_small_scales_and_large_ones_without_large(shared, cfg):
    """KPS_AUG.SCALE_SIZE_DEP, where the original raised a TypeError."""
    model, image, golden, _ = load("tiny_keypoint_FPN.base", shared)
    boxes = golden["dets"][:4, 1:5]
    areas = np.prod(boxes[:, 2:] - boxes[:, :2] + 1, axis=1)
    threshold = int(np.median(areas))
    assert areas.min() < threshold < areas.max()

    def maps(scales: tuple, dependent: bool) -> np.ndarray:
        merge_cfg_from_list([*KPS_AUG, "TEST.KPS_AUG.SCALES", scales])
        cfg.TEST.KPS_AUG.SCALE_SIZE_DEP, cfg.TEST.KPS_AUG.AREA_TH = dependent, threshold
        _, _, scale, blob_conv = im_detect_bbox(model, image, cfg.TEST.SCALE, cfg.TEST.MAX_SIZE)
        return im_detect_keypoints_aug(model, image, boxes, scale, blob_conv)

    small = areas < threshold
    both = maps((192, 320), dependent=True)
    np.testing.assert_allclose(both[small], maps((320,), dependent=False)[small], atol=1e-4)
    np.testing.assert_allclose(both[~small], maps((192,), dependent=False)[~small], atol=1e-4)


def test_logits_are_averaged_before_the_sigmoid(shared, cfg):
    model, image, golden, _ = load("tiny_mask_FPN.base", shared)
    boxes = golden["dets"][:5, 1:5]
    _, _, scale, blob_conv = im_detect_bbox(model, image, cfg.TEST.SCALE, cfg.TEST.MAX_SIZE)
    views = [
        im_detect_mask(model, scale, boxes, blob_conv),
        im_detect_mask_hflip(model, image, cfg.TEST.SCALE, cfg.TEST.MAX_SIZE, boxes),
        im_detect_mask_aspect_ratio(model, image, 0.8, boxes),
    ]
    mean = sum(np.log(p / (1 - p)) for p in np.stack(views).astype(np.float64)) / 3
    aug = {"ENABLED": True, "HEUR": "LOGIT_AVG", "H_FLIP": True, "ASPECT_RATIOS": (0.8,)}
    merge_cfg_from_list([x for k, v in aug.items() for x in (f"TEST.MASK_AUG.{k}", v)])
    found = im_detect_mask_aug(model, image, boxes, scale, blob_conv)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-mean)), atol=1e-4)


class SeesTwo(torch.nn.Module):
    """A network with two fixed proposals an image, scored by the image's first column: what Fast
    R-CNN's fixed proposals are to augmentation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, data, im_info):
        images = len(data)
        boxes = torch.tensor([[1.0, 1, 10, 10], [12, 4, 21, 17]]).repeat(images, 1)
        index = torch.arange(images).repeat_interleave(2).float()
        left = (data[:, :, :, 0].mean(dim=(1, 2)) + 110) / 400
        score = left.repeat_interleave(2) * torch.tensor([1.0, 0.5]).repeat(images)
        deltas = torch.zeros(2 * images, 8)
        return {
            "rois": torch.cat([index[:, None], boxes], 1),
            "cls_score": torch.stack([1 - score, score], 1),
            "bbox_pred": deltas,
            "blob_conv": data,
        }


@pytest.mark.parametrize("score_heur", ["ID", "AVG"])
@pytest.mark.parametrize("coord_heur", ["ID", "AVG"])
def test_views_of_the_same_proposals_may_be_averaged(score_heur, coord_heur, cfg):
    aug = ["SCORE_HEUR", score_heur, "COORD_HEUR", coord_heur, "ENABLED", True, "H_FLIP", True]
    aug[::2] = [f"TEST.BBOX_AUG.{key}" for key in aug[::2]]
    merge_cfg_from_list(["MODEL.FASTER_RCNN", True, "TEST.SCALE", 20, *aug])
    image = np.full((20, 30, 3), 100, np.uint8)
    image[:, 0], image[:, -1] = 200, 40
    (found,) = detect_batch(SeesTwo(), [image])
    plain, mirrored = (200 - 113 + 110) / 400, (40 - 113 + 110) / 400
    score = plain if score_heur == "ID" else (plain + mirrored) / 2
    np.testing.assert_allclose(found.scores[0], score, atol=0.01)
    left = 1 if coord_heur == "ID" else (1 + (30 - 1 - 10)) / 2
    np.testing.assert_allclose(found.boxes[0], [left, 1, left + 9, 10], atol=1e-4)


def test_union_pools_what_all_views_say(cfg):
    merge_cfg_from_list(["MODEL.FASTER_RCNN", True, "TEST.SCALE", 20])
    merge_cfg_from_list(["TEST.BBOX_AUG.ENABLED", True, "TEST.BBOX_AUG.H_FLIP", True])
    image = np.full((20, 30, 3), 100, np.uint8)
    (found,) = detect_batch(SeesTwo(), [image])
    # The mirror image of (12, 4, 21, 17) is (8, 4, 17, 17): the two overlap by more than TEST.NMS.
    lefts = sorted(found.boxes[:, 0].tolist())
    assert lefts == [1.0, 8.0, 19.0]


@pytest.mark.parametrize("key", ["SOFT_NMS", "BBOX_VOTE"])
def test_augmentation_meets_soft_nms_voting_and_batches(key, shared, cfg):
    """Several images at once give what each gives alone, whatever happens to their boxes."""
    model, image, _, _ = load("tiny_mask_FPN.both", shared)
    cfg.TEST[key].ENABLED = True
    cfg.TEST.SCALE, cfg.TEST.BBOX_AUG.SCALES = 96, (64,)
    cfg.TEST.BBOX_AUG.ASPECT_RATIOS = (0.8,)
    images = [image, np.ascontiguousarray(image[::-1])]
    together = [class_results(d, 81) for d in detect_batch(model, images)]
    for one, other in zip(images, together, strict=True):
        cls_boxes, cls_segms, _ = im_detect_all(model, one)
        for j in range(1, 81):
            np.testing.assert_allclose(cls_boxes[j], other[0][j], atol=2e-2)
            assert len(cls_segms[j]) == len(other[1][j])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["BBOX_AUG.SCORE_HEUR", "AVG"], "both be UNION or neither"),
        (["BBOX_AUG.SCORE_HEUR", "MEAN"], "one of ID, AVG, UNION"),
        (["BBOX_AUG.SCORE_HEUR", "ID", "TEST.BBOX_AUG.COORD_HEUR", "AVG"], "same proposals"),
        (["BBOX_AUG.SCALE_SIZE_DEP", True], "BBOX_AUG.SCALE_SIZE_DEP"),
        (["BBOX_AUG.SCALES", (0,)], "positive"),
        (["MASK_AUG.HEUR", "HM_AVG"], "one of SOFT_AVG"),
        (["KPS_AUG.HEUR", "SOFT_AVG"], "one of HM_AVG, HM_MAX"),
    ],
)
def test_what_augmentation_cannot_do_is_said_at_the_start(options, message, cfg):
    merge_cfg_from_list(["MODEL.FASTER_RCNN", True, f"TEST.{options[0]}", *options[1:]])
    merge_cfg_from_list([f"TEST.{options[0].split('.')[0]}.ENABLED", True])
    with pytest.raises(ConfigError, match=message):
        assert_and_infer_cfg()


def test_suppression_by_keypoints_is_for_persons(shared, cfg):
    golden_cfg("e2e_keypoint_rcnn_R-50-FPN_1x", shared, ["KRCNN.NMS_OKS", True])
    cfg.KRCNN.NUM_KEYPOINTS = 5
    with pytest.raises(ConfigError, match="NMS_OKS .* 17 keypoints of persons .* not 5"):
        assert_and_infer_cfg()


def test_suppression_by_keypoints_follows_augmentation(shared, cfg):
    """KRCNN.NMS_OKS sees the combined points: what is left are people unlike each other."""
    model, image, _, _ = load("tiny_keypoint_FPN.kps_avg", shared)
    cfg.TEST.KPS_AUG.SCALES, cfg.TEST.KPS_AUG.ASPECT_RATIOS = (), ()
    every = im_detect_all(model, image)
    cfg.KRCNN.NMS_OKS = True
    cls_boxes, _, cls_keyps = im_detect_all(model, image)
    keep = nms_oks(np.stack(every[2][1]), every[0][1], 0.3)
    assert 0 < len(keep) < len(every[0][1])
    np.testing.assert_allclose(cls_boxes[1], every[0][1][keep], atol=1e-4)
    assert len(cls_keyps[1]) == len(keep)


@pytest.mark.gpu
def test_the_gpu_augments_as_the_cpu_does(shared, cfg, monkeypatch):
    # TF32 would change scores in the fourth digit, and with them what is proposed.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    model, image, golden, _ = load("tiny_mask_FPN.mask_soft_avg", shared)
    boxes = golden["dets"][:20, 1:5]
    masks = []
    for device in ("cpu", "cuda"):
        on_device = copy.deepcopy(model).to(device)
        _, _, scale, maps = im_detect_bbox(on_device, image, cfg.TEST.SCALE, cfg.TEST.MAX_SIZE)
        masks.append(im_detect_mask_aug(on_device, image, boxes, scale, maps))
    np.testing.assert_allclose(masks[1], masks[0], atol=1e-3)
