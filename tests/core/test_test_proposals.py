"""Detecting on given proposals: near-duplicates once, the same whatever the batch, or nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_test_engine import DEMO_CONFIG

from core.config import assert_and_infer_cfg, merge_cfg_from_file, merge_cfg_from_list
from core.errors import UserError
from core.test import class_results, detect_batch, im_detect_all, im_detect_bbox
from core.test_proposals import run_on_proposals, unique_rois


def unique_slowly(rois: np.ndarray, scale: float) -> tuple[list[int], list[int]]:
    """Detectron's hash, one RoI at a time."""
    first: dict[float, int] = {}
    hashes = []
    for i, roi in enumerate(rois):
        cells = np.round(roi[1:] * scale)
        value = float(np.dot([roi[0], *cells], [1, 1e3, 1e6, 1e9, 1e12]))
        hashes.append(value)
        first.setdefault(value, i)
    return sorted(first.values()), [first[value] for value in hashes]


@pytest.mark.parametrize("scale", [1 / 16, 1 / 8])
def test_agrees_with_the_hash(scale):
    rng = np.random.RandomState(0)
    rois = np.c_[rng.randint(3, size=400), rng.randint(0, 8, (400, 4)) * 9 + rng.rand(400, 4)]
    rois = rois.astype(np.float32)
    index, group = unique_rois(torch.from_numpy(rois), scale)
    expected, representative = unique_slowly(rois, scale)
    assert sorted(index.tolist()) == expected
    assert index[group].tolist() == representative
    assert len(index) < 400


class Echo(torch.nn.Module):
    """Scores and deltas of an RoI are made of its coordinates; counts the RoIs it is given."""

    seen = 0

    def forward(self, data, im_info, rois):
        self.seen += len(rois)
        return {"rois": rois, "cls_score": rois[:, 1:3], "bbox_pred": rois[:, :4], "blob_conv": 1}


def test_duplicates_get_scores_and_box_of_the_first():
    rois = torch.tensor([[0.0, 32, 32, 64, 64], [0, 33, 31, 65, 63], [1, 32, 32, 64, 64]])
    rois = torch.cat([rois, rois[:1] + 1])[[0, 1, 2]]
    net = Echo()
    out = run_on_proposals(net, None, None, rois, 1 / 16)
    assert net.seen == 2
    assert torch.equal(out["rois"], rois[[0, 0, 2]])
    assert torch.equal(out["cls_score"], rois[[0, 0, 2], 1:3])
    assert torch.equal(out["bbox_pred"], rois[[0, 0, 2], :4])
    net = Echo()
    assert torch.equal(run_on_proposals(net, None, None, rois, 0)["rois"], rois)
    assert net.seen == 3


@pytest.fixture
def build(cfg):
    """The demo's detector without its RPN, untrained, which finds something everywhere."""

    def build(*options):
        from modeling.model_builder import Generalized_RCNN

        merge_cfg_from_file(DEMO_CONFIG)
        merge_cfg_from_list(["MODEL.FASTER_RCNN", False, "MODEL.NUM_CLASSES", 4, *options])
        merge_cfg_from_list(["TEST.SCORE_THRESH", 0.2])
        assert_and_infer_cfg()
        torch.manual_seed(3)
        return Generalized_RCNN().eval()

    return build


def scene(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A noise image 120 x 160 and proposals in it."""
    rng = np.random.RandomState(seed)
    corner = rng.uniform(0, 100, (count, 2))
    boxes = np.c_[corner, corner + rng.uniform(8, 50, (count, 2))]
    boxes[:, [0, 2]] = boxes[:, [0, 2]].clip(0, 159)
    boxes[:, [1, 3]] = boxes[:, [1, 3]].clip(0, 119)
    return rng.randint(0, 256, (120, 160, 3)).astype(np.uint8), boxes.astype(np.float32)


def test_a_batch_gives_what_its_images_give(build):
    model = build()
    scenes = [scene(40, 1), scene(0, 2), scene(25, 3)]
    together = detect_batch(model, *([s[i] for s in scenes] for i in (0,)),
                            proposals=[s[1] for s in scenes])  # fmt: skip
    found = 0
    for (image, boxes), batched in zip(scenes, together, strict=True):
        cls_boxes, cls_segms, _ = im_detect_all(model, image, boxes)
        ours, segms, _ = class_results(batched, 4)
        for j in range(1, 4):
            np.testing.assert_allclose(cls_boxes[j], ours[j], atol=1e-3)
            assert len(cls_segms[j]) == len(segms[j])
            found += len(ours[j])
    assert found > 20


def test_without_proposals_nothing_is_found(build):
    model = build()
    image, none = scene(0)
    model.Conv_Body.forward = None  # nor looked for
    cls_boxes, cls_segms, _ = im_detect_all(model, image, none)
    assert [len(boxes) for boxes in cls_boxes] == [0] * 4
    assert cls_segms == [[], [], [], []]


def test_boxes_are_in_the_order_of_the_proposals(build):
    model = build("TEST.BBOX_REG", False)
    image, boxes = scene(30)
    twice = np.concatenate([boxes, boxes + 0.01])
    scores, decoded, scale, _ = im_detect_bbox(model, image, 160, 320, twice)
    assert scores.shape == (60, 4) and decoded.shape == (60, 16) and scale == 160 / 120
    np.testing.assert_allclose(scores[:30], scores[30:], atol=1e-6)
    np.testing.assert_allclose(decoded[:30, 4:8], boxes, atol=16 / scale)


@pytest.mark.parametrize(("dedup", "computed"), [(1 / 16, [29, 29]), (0.0, [30, 60])])
def test_repeated_proposals_are_computed_once_and_change_nothing(build, dedup, computed):
    model = build("DEDUP_BOXES", dedup)
    image, boxes = scene(30)
    seen = []
    model.Box_Head.register_forward_hook(lambda _, args, out: seen.append(len(out)))
    once = im_detect_all(model, image, boxes)[0]
    twice = im_detect_all(model, image, np.concatenate([boxes, boxes]))[0]
    assert seen == computed
    for j in range(1, 4):
        np.testing.assert_allclose(once[j], twice[j], atol=1e-4)


def test_mirrored_views_look_at_mirrored_proposals(build):
    aug = ["TEST.BBOX_AUG.ENABLED", True, "TEST.BBOX_AUG.H_FLIP", True]
    heuristics = ["TEST.BBOX_AUG.SCORE_HEUR", "AVG", "TEST.BBOX_AUG.COORD_HEUR", "AVG"]
    model = build(*aug, *heuristics)
    image, boxes = scene(30)
    mirrored = boxes.copy()
    mirrored[:, [0, 2]] = 159 - boxes[:, [2, 0]]
    ours = im_detect_all(model, image, boxes)[0]
    other = im_detect_all(model, np.ascontiguousarray(image[:, ::-1]), mirrored)[0]
    found = 0
    for j in range(1, 4):
        back = np.array(other[j])
        back[:, [0, 2]] = 159 - back[:, [2, 0]]
        order, wanted = np.argsort(back[:, 4]), np.argsort(ours[j][:, 4])
        np.testing.assert_allclose(back[order], ours[j][wanted], atol=0.05)
        found += len(back)
    assert found > 10


def test_a_model_without_rpn_asks_for_proposals(build):
    with pytest.raises(UserError, match="TEST.PROPOSAL_FILES"):
        im_detect_all(build(), scene(0)[0])
