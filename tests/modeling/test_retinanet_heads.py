"""RetinaNet's anchors, parameters, initial values and losses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from test_train_step import make_batch, to

from core.config import ConfigError
from golden_weights import golden_cfg
from modeling.retinanet_heads import retinanet_anchors
from retinanet_models import OPTION_SETS, by_anchor, narrow_retinanet
from utils.detectron_weight_helper import load_blobs


def batch():
    return make_batch(objects=4, blob_size=(128, 256))


@pytest.mark.parametrize(
    ("stride", "tall", "wide"),
    [
        (8, (6, 12), (11, 6)),
        (16, (11, 22), (23, 12)),
        (32, (23, 46), (45, 22)),
        (64, (45, 90), (91, 46)),
        (128, (91, 182), (181, 90)),
    ],
)
def test_anchors_have_the_sizes_of_the_specification(stride, tall, wide, cfg):
    """Sides are rounded at the stride's size, then scaled by 4 * 2^(octave / 3)."""
    cfg.RETINANET.ASPECT_RATIOS = (1.0, 2.0, 0.5)
    anchors = retinanet_anchors(stride).numpy()
    assert anchors.shape == (9, 4)
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    np.testing.assert_allclose(centres, (stride - 1) / 2, atol=1e-4)
    for octave in range(3):
        for ratio, (w, h) in enumerate([(stride, stride), tall, wide]):
            x1, y1, x2, y2 = anchors[3 * octave + ratio]
            scale = 4 * 2 ** (octave / 3)
            np.testing.assert_allclose(
                (x2 - x1 + 1, y2 - y1 + 1), (w * scale, h * scale), rtol=1e-5
            )


def test_anchors_of_the_finest_level(cfg):
    cfg.RETINANET.ASPECT_RATIOS = (1.0, 2.0, 0.5)
    anchors = retinanet_anchors(8)
    expected = [[-12, -12, 19, 19], [-8, -20, 15, 27], [-18, -8, 25, 15]]
    torch.testing.assert_close(anchors[:3], torch.tensor(expected).float())
    assert anchors[3, 0].item() == pytest.approx(-16.1587, abs=1e-4)
    assert anchors[3, 2].item() == pytest.approx(23.1587, abs=1e-4)


@pytest.mark.parametrize("stem", ["retinanet_R-50-FPN_1x", "retinanet_X-101-64x4d-FPN_2x"])
def test_parameters_are_detectron_s_blobs(stem, shared, cfg):
    from modeling.model_builder import Generalized_RCNN

    golden_cfg(stem, shared)
    with torch.device("meta"):
        model = Generalized_RCNN()
    mapping, _ = model.detectron_weight_mapping
    shapes = {mapping[name]: list(p.shape) for name, p in model.state_dict().items()}
    assert shapes == json.loads((shared / f"spec/detectron_blobs/{stem}.json").read_text())


def test_other_classes_keep_all_but_the_class_predictor(cfg):
    """Fine-tuning a Detectron model: towers, boxes and pyramid come from the file."""
    from core.config import reset_cfg

    source = narrow_retinanet(num_classes=6)
    mapping, _ = source.detectron_weight_mapping
    blobs = {mapping[name]: p.numpy() for name, p in source.state_dict().items()}
    reset_cfg()
    model = narrow_retinanet(num_classes=4)
    report = load_blobs(model, blobs, new_classes=True)
    assert len(report.skipped) == 2
    assert all("cls_pred" in name for name in report.skipped)
    assert not (report.missing or report.mismatched)


def test_a_shared_tower_has_no_box_tower(cfg):
    model = narrow_retinanet(OPTION_SETS["shared tower"])
    blobs = {b for b in model.detectron_weight_mapping[0].values() if b.startswith("retnet")}
    names = ["cls_conv_n0", "cls_conv_n1", "cls_pred", "bbox_pred"]
    assert blobs == {f"retnet_{name}_fpn3_{kind}" for name in names for kind in "wb"}


def test_an_untrained_model_believes_in_little(cfg):
    head = narrow_retinanet().RetinaNet_Outs
    np.testing.assert_allclose(head.cls_pred.bias.detach(), -4.59512, atol=1e-5)
    for conv in [*head.cls_tower, *head.bbox_tower, head.cls_pred, head.bbox_pred]:
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert conv is head.cls_pred or not conv.bias.any()


def test_a_softmax_starts_with_the_background(cfg):
    bias = narrow_retinanet(OPTION_SETS["softmax"]).RetinaNet_Outs.cls_pred.bias.detach()
    per_anchor = bias.view(9, 4)
    np.testing.assert_allclose(per_anchor[:, 0], math.log(3 * 0.99 / 0.01), rtol=1e-6)
    assert not per_anchor[:, 1:].any()


@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS)
def test_a_step_gives_every_loss_and_every_gradient(options, cfg):
    model = narrow_retinanet(options)
    out = model(**batch())
    names = {f"{kind}_fpn{k}" for kind in ("retnet_loss_bbox", "fl") for k in range(3, 8)}
    assert set(out["losses"]) == names
    assert set(out["metrics"]) == {"retnet_fg_num", "retnet_bg_num"}
    total = sum(out["losses"].values())
    assert torch.isfinite(total) and total > 0
    total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def slow_losses(head, logits, deltas, targets, softmax, alpha=0.25, gamma=2.0, beta=0.11):
    """Both losses of each level, an anchor at a time."""
    losses, start, normalizer = {}, 0, max(targets.fg_num.item(), 1)
    for level, x, d in zip(head.levels, logits, deltas, strict=True):
        scores, boxes = by_anchor(x, 9), by_anchor(d, 9)
        focal = box = 0.0
        for n, i in np.ndindex(*scores.shape[:2]):
            label = targets.labels[n, start + i].item()
            if label < 0:
                continue
            if softmax:
                p = np.exp(scores[n, i]) / np.exp(scores[n, i]).sum()
                z = alpha if label else 1 - alpha
                focal -= z * (1 - p[label]) ** gamma * math.log(p[label])
            else:
                p = 1 / (1 + np.exp(-scores[n, i]))
                terms = -(1 - alpha) * p**gamma * np.log(1 - p)
                if label:
                    c = label - 1
                    terms[c] = -alpha * (1 - p[c]) ** gamma * math.log(p[c])
                focal += terms.sum()
            if label:
                slot = label - 1 if boxes.shape[2] > 4 else 0
                wanted = targets.bbox_targets[n, start + i].double().numpy()
                x = np.abs(boxes[n, i, 4 * slot : 4 * slot + 4] - wanted)
                box += np.where(x < beta, x**2 / (2 * beta), x - beta / 2).sum()
        start += scores.shape[1]
        losses[f"fl_fpn{level}"] = focal / normalizer
        losses[f"retnet_loss_bbox_fpn{level}"] = 2.0 * box / normalizer
    return losses


@pytest.mark.parametrize("name", ["sigmoid", "softmax", "boxes by class"])
def test_losses_agree_with_a_slow_reference(name, cfg):
    model = narrow_retinanet({**OPTION_SETS[name], "RETINANET.BBOX_REG_WEIGHT": 2.0})
    head, data = model.RetinaNet_Outs, batch()
    seen = {}
    losses_of = head.losses

    def spy(logits, deltas, targets):
        # Untrained predictions are all alike: make them differ.
        logits = [x + 2 * torch.randn_like(x) for x in logits]
        deltas = [x + 0.2 * torch.randn_like(x) for x in deltas]
        seen.update(logits=logits, deltas=deltas, targets=targets)
        return losses_of(logits, deltas, targets)

    head.losses = spy
    losses = model(**data)["losses"]
    assert (seen["targets"].labels > 0).sum() > 20 and (seen["targets"].labels < 0).any()
    expected = slow_losses(head, **seen, softmax=name == "softmax")
    assert expected["retnet_loss_bbox_fpn3"] > 0
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value, rel=1e-4, abs=1e-9), key


def test_a_batch_without_objects_trains_on_background(cfg):
    model = narrow_retinanet()
    out = model(**make_batch(objects=0, blob_size=(128, 256)))
    assert out["metrics"]["retnet_fg_num"] == 2  # one an image, lest it be divided by 0
    assert all(v == 0 for k, v in out["losses"].items() if "bbox" in k)
    total = sum(out["losses"].values())
    assert torch.isfinite(total) and total > 0
    total.backward()


def test_learning_lowers_the_loss(cfg):
    model, data = narrow_retinanet(), batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    history = []
    for _ in range(20):
        loss = sum(model(**data)["losses"].values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert np.mean(history[-3:]) < 0.7 * np.mean(history[:3])


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"MODEL.MASK_ON": True}, "MODEL.MASK_ON"),
        ({"MODEL.FASTER_RCNN": True}, "MODEL.FASTER_RCNN"),
        ({"FPN.MULTILEVEL_RPN": False}, "FPN.MULTILEVEL_RPN"),
        ({"RETINANET.NEGATIVE_OVERLAP": 0.6}, "RETINANET.NEGATIVE_OVERLAP"),
    ],
)
def test_what_retinanet_cannot_do_is_named(options, key, cfg):
    with pytest.raises(ConfigError, match=key):
        narrow_retinanet(options)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS)
def test_the_forward_never_waits_for_the_gpu(options, cfg):
    model = narrow_retinanet(options).cuda()
    data = to(batch(), "cuda")
    model(**data)  # libraries load
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = sum(model(**data)["losses"].values())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    total.backward()
    assert torch.isfinite(total)
