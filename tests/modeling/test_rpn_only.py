"""Models that are an RPN and nothing else: what they have, learn from, and propose."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_train_step import C4, LEVELS, build, make_batch  # noqa: F401  (build is a fixture)

from core.config import assert_and_infer_cfg, merge_cfg_from_list

RPN_ONLY = {"MODEL.RPN_ONLY": True, "MODEL.FASTER_RCNN": False, "MODEL.MASK_ON": False}
FPN_RPN = RPN_ONLY | {"FPN.MULTILEVEL_ROIS": False}
C4_RPN = C4 | RPN_ONLY


def blobs_of(model) -> dict[str, list[int]]:
    """Shape by the name of the Detectron blob."""
    mapping, _ = model.detectron_weight_mapping
    return {mapping[name]: list(p.shape) for name, p in model.state_dict().items()}


@pytest.mark.parametrize(
    ("stem", "options"),
    [
        ("rpn_R-50-FPN_1x", {}),
        (
            "rpn_X-101-64x4d-FPN_1x",
            {
                "RESNETS.STRIDE_1X1": False,
                "RESNETS.NUM_GROUPS": 64,
                "RESNETS.WIDTH_PER_GROUP": 4,
                "MODEL.CONV_BODY": "FPN.fpn_ResNet101_conv5_body",
            },
        ),
        ("rpn_R-50-C4_1x", {"RPN.SIZES": (32, 64, 128, 256, 512)}),
    ],
)
def test_blobs_are_detectron_s(stem, options, shared, cfg):
    from modeling.model_builder import Generalized_RCNN

    cfg.MODEL.RPN_ONLY, cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS = True, False
    cfg.MODEL.CONV_BODY = "ResNet.ResNet50_conv4_body"
    if "FPN" in stem:
        cfg.MODEL.CONV_BODY = "FPN.fpn_ResNet50_conv5_body"
        cfg.FPN.FPN_ON = cfg.FPN.MULTILEVEL_RPN = True
    merge_cfg_from_list([x for pair in options.items() for x in pair])
    assert_and_infer_cfg()
    with torch.device("meta"):
        model = Generalized_RCNN()
    assert blobs_of(model) == json.loads((shared / f"spec/detectron_blobs/{stem}.json").read_text())


@pytest.mark.parametrize(
    ("options", "levels"), [(FPN_RPN, LEVELS), (C4_RPN, [""])], ids=["FPN", "C4"]
)
def test_training_has_the_losses_of_the_rpn_alone(options, levels, build):  # noqa: F811
    model = build(options)
    out = model(**make_batch(objects=4))
    assert set(out["losses"]) == {f"loss_rpn_{k}{lvl}" for k in ("cls", "bbox") for lvl in levels}
    assert out["metrics"] == {}
    total = sum(out["losses"].values())
    assert torch.isfinite(total) and total > 0
    total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def images(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    data = torch.from_numpy(np.random.RandomState(0).randn(count, 3, 128, 160) * 30).float()
    return data, torch.tensor([[128.0, 160.0, 1.25], [128.0, 160.0, 0.8]][:count])


@pytest.mark.parametrize("options", [FPN_RPN, C4_RPN], ids=["FPN", "C4"])
def test_proposals_are_ranked_and_limited_by_image(options, build):  # noqa: F811
    limits = {"TEST.RPN_PRE_NMS_TOP_N": 150, "TEST.RPN_POST_NMS_TOP_N": 60}
    model = build(options | limits).eval()
    data, im_info = images()
    found = model.propose(data, im_info)
    assert found.boxes.shape == (2, 60, 4) and found.scores.shape == (2, 60)
    assert (found.scores.diff(dim=1) <= 0).all()
    boxes, scores = found.boxes[found.valid], found.scores[found.valid]
    assert (boxes >= 0).all() and (boxes[:, 2] <= 159).all() and (boxes[:, 3] <= 127).all()
    # What an image gives does not depend on the others of its batch.
    for n in (0, 1):
        alone = model.propose(data[n : n + 1], im_info[n : n + 1])
        torch.testing.assert_close(alone.scores[0], found.scores[n])
        torch.testing.assert_close(alone.boxes[0], found.boxes[n], atol=1e-3, rtol=0)
    out = model(data, im_info)
    assert torch.equal(out["rois"][:, 1:], boxes) and torch.equal(out["rpn_roi_probs"], scores)
    assert out["rois"][:, 0].tolist() == [0.0] * found.valid[0].sum() + [1.0] * found.valid[1].sum()


def test_levels_are_joined_by_score_without_a_second_nms(build):  # noqa: F811
    """Each level's own best proposals, then the best of all: overlaps across levels stay."""
    model = build(FPN_RPN | {"TEST.RPN_POST_NMS_TOP_N": 40, "TEST.RPN_NMS_THRESH": 0.3}).eval()
    data, im_info = images(1)
    with torch.no_grad():
        logits, deltas = model.RPN.predict(model._features(data))
    levels = []
    for level in range(len(logits)):
        only = [t if i == level else t.new_full(t.shape, -1e4) for i, t in enumerate(logits)]
        found = model.RPN.propose(only, deltas, im_info)
        real = found.scores[0] > 0
        levels.append((found.scores[0, real], found.boxes[0, real]))
    assert all(len(scores) for scores, _ in levels)
    scores = torch.cat([s for s, _ in levels])
    boxes = torch.cat([b for _, b in levels])
    best = scores.argsort(descending=True, stable=True)[:40]
    found = model.propose(data, im_info)
    assert torch.equal(found.scores[0], scores[best]) and torch.equal(found.boxes[0], boxes[best])
