"""Fast, Mask and Keypoint R-CNN on proposals from files: no RPN, in training and in testing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_train_step import C4, build, make_batch, to

from modeling import fast_rcnn_heads

__all__ = ["build"]

NO_RPN = {"MODEL.FASTER_RCNN": False}


def batch_with_proposals(objects: int = 4, per_image: int = 60) -> dict:
    """A batch whose proposals are its objects, shaken."""
    batch = make_batch(objects=objects)
    rng = np.random.RandomState(1)
    gt = batch["gt_boxes"][:, : max(objects, 1)].numpy()
    boxes = gt[:, rng.randint(gt.shape[1], size=per_image)]
    boxes = boxes + rng.uniform(-8, 8, boxes.shape)
    boxes = np.sort(boxes.clip(0, 99).reshape(2, -1, 2, 2), axis=2).reshape(2, -1, 4)
    valid = torch.ones(2, per_image, dtype=torch.bool)
    valid[1, per_image // 2 :] = False
    return batch | {
        "proposals": torch.from_numpy(boxes.astype(np.float32)),
        "proposals_valid": valid,
    }


@pytest.mark.parametrize("options", [{}, C4], ids=["FPN", "C4"])
def test_a_step_gives_the_heads_losses_and_every_gradient(options, build):
    model = build(options | NO_RPN)
    assert not any(name.startswith("RPN") for name, _ in model.named_parameters())
    out = model(**batch_with_proposals())
    assert set(out["losses"]) == {"loss_cls", "loss_bbox", "loss_mask"}
    assert all(torch.isfinite(loss) and loss > 0 for loss in out["losses"].values())
    sum(out["losses"].values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_rois_come_from_the_proposals_and_the_ground_truth(build):
    model, batch = build(NO_RPN), batch_with_proposals()
    seen = {}
    model.Box_Head.register_forward_hook(lambda _, inputs, __: seen.update(inputs[1]))
    model(**batch)
    used = seen["rois"][seen["rois"][:, 0] >= 0]
    for image in range(2):
        allowed = torch.cat(
            [batch["gt_boxes"][image], batch["proposals"][image][batch["proposals_valid"][image]]]
        )
        rois = used[used[:, 0] == image, 1:] / 1.25
        assert len(rois)
        distance = (rois[:, None] - allowed).abs().amax(dim=2).amin(dim=1)
        assert distance.max() < 1e-3


def test_images_without_proposals_train_on_their_objects(build):
    model, batch = build(NO_RPN), batch_with_proposals()
    batch["proposals_valid"][:] = False
    assert torch.isfinite(sum(model(**batch)["losses"].values()))
    del batch["proposals"], batch["proposals_valid"]
    assert torch.isfinite(sum(model(**batch)["losses"].values()))


def test_learning_lowers_the_loss(build):
    model, batch = build(NO_RPN), batch_with_proposals(objects=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history = []
    for _ in range(25):
        losses = model(**batch)["losses"]
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        # Not the box: what shakes the proposals cannot be learned.
        history.append((losses["loss_cls"] + losses["loss_mask"]).item())
    assert np.mean(history[-3:]) < 0.7 * np.mean(history[:3])


def test_in_testing_the_rois_are_those_given(build):
    model = build(NO_RPN).eval()
    data, im_info = torch.rand(2, 3, 128, 160) * 255, torch.tensor([[128.0, 160, 1]] * 2)
    rois = torch.tensor([[0.0, 5, 5, 60, 70], [1, 20, 30, 90, 100], [1, 0, 0, 30, 30]])
    with torch.no_grad():
        out = model(data, im_info, rois=rois)
        alone = model(data[1:], im_info[1:], rois=rois[1:] - torch.tensor([1.0, 0, 0, 0, 0]))
    assert torch.equal(out["rois"], rois)
    assert out["cls_score"].shape == (3, 4) and out["bbox_pred"].shape == (3, 16)
    torch.testing.assert_close(out["cls_score"].sum(dim=1), torch.ones(3))
    torch.testing.assert_close(out["cls_score"][1:], alone["cls_score"])


def test_what_is_not_regressed_costs_nothing():
    logits, deltas = torch.zeros(2, 3), torch.ones(2, 12)
    labels, valid = torch.tensor([1, 2]), torch.ones(2, dtype=torch.bool)
    targets = torch.zeros(2, 4)
    _, every, _ = fast_rcnn_heads.fast_rcnn_losses(logits, deltas, labels, valid, targets)
    _, one, _ = fast_rcnn_heads.fast_rcnn_losses(
        logits, deltas, labels, valid, targets, torch.tensor([True, False])
    )
    assert (every.item(), one.item()) == (2.0, 1.0)


@pytest.mark.gpu
def test_the_forward_never_waits_for_the_gpu(build):
    model, batch = build(NO_RPN).cuda(), to(batch_with_proposals(), "cuda")
    model(**batch)  # libraries load
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        total = sum(model(**batch)["losses"].values())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(total)
