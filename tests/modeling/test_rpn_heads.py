"""The softmax RPN: two scores an anchor, and the mean over each level."""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune
from torch.nn import functional as F

from roi_data.rpn import RPNTargets

LEVELS, ANCHORS = (2, 3), 3


@pytest.fixture
def rpn(cfg):
    from modeling.rpn_heads import fpn_rpn_outputs

    cfg.FPN.FPN_ON = cfg.FPN.MULTILEVEL_RPN = True
    cfg.FPN.RPN_MIN_LEVEL, cfg.FPN.RPN_MAX_LEVEL = LEVELS
    cfg.RPN.CLS_ACTIVATION = "softmax"
    torch.manual_seed(0)
    rpn = fpn_rpn_outputs(4)
    for parameter in rpn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return rpn


def two_scores(rpn, x):
    """(N, H * W * A, 2) background and foreground: A channels of one, then A of the other."""
    score = rpn.FPN_RPN_cls_score(F.relu(rpn.FPN_RPN_conv(x)))
    assert score.shape[1] == 2 * ANCHORS
    both = score.view(len(x), 2, ANCHORS, *x.shape[2:])
    return both.permute(0, 3, 4, 2, 1).flatten(1, 3)


def test_loss_is_cross_entropy_of_two_classes_averaged_over_a_level(rpn):
    maps = [torch.randn(2, 4, 6, 8), torch.randn(2, 4, 3, 4)]
    counts = [6 * 8 * ANCHORS, 3 * 4 * ANCHORS]
    labels = torch.randint(-1, 2, (2, sum(counts))).to(torch.int8)
    zeros = torch.zeros(2, sum(counts))
    index = torch.arange(sum(counts)).expand(2, -1)
    targets = RPNTargets(index, labels, torch.zeros(2, sum(counts), 4), zeros)
    losses = rpn.losses(maps, targets)
    for level, x, part in zip(LEVELS, maps, labels.split(counts, dim=1), strict=True):
        scores = two_scores(rpn, x).flatten(0, 1)
        expected = F.cross_entropy(scores, part.flatten().long(), ignore_index=-1)
        torch.testing.assert_close(losses[f"loss_rpn_cls_fpn{level}"], expected)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_losses_of_slots_are_those_of_the_whole_maps(rpn, activation, device, cfg):
    """Values and gradients, with slots that do not count and a level that nothing was drawn in."""
    if activation == "sigmoid":
        cfg.RPN.CLS_ACTIVATION = activation
        rpn = type(rpn)(4)
        for parameter in rpn.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    rpn.double().to(device)
    sizes, counts = [(6, 8), (3, 4)], [6 * 8 * ANCHORS, 3 * 4 * ANCHORS]
    total = sum(counts)
    g = torch.Generator().manual_seed(3)
    maps = [
        torch.randn(2, 4, *size, generator=g, dtype=torch.double)
        .to(device, memory_format=torch.channels_last)
        .requires_grad_()
        for size in sizes
    ]
    index = torch.stack([torch.randperm(total, generator=g)[:40] for _ in range(2)])
    index[1] %= counts[0]
    labels = torch.randint(-1, 2, (2, 40), generator=g)
    labels[1] = labels[1].where(index[1].bincount(minlength=total)[index[1]] == 1, -1)
    index[labels < 0] = 0
    goals = torch.randn(2, 40, 4, generator=g) * (labels == 1).unsqueeze(-1)
    weights = torch.rand(2, 40, generator=g) * (labels == 1)
    index, labels, goals, weights = (x.to(device) for x in (index, labels, goals, weights))
    losses = rpn.losses(maps, RPNTargets(index, labels.to(torch.int8), goals, weights))
    logits, deltas = rpn.predict(maps)
    expected = {}
    for level, size in enumerate(sizes):
        start = sum(counts[:level])
        cls, box, used = 0.0, 0.0, 0
        for image, slot in (labels >= 0).nonzero().tolist():
            place = index[image, slot].item() - start
            if not 0 <= place < counts[level]:
                continue
            cell, a = divmod(place, ANCHORS)
            y, x = divmod(cell, size[1])
            score = logits[level][image, a, y, x]
            cls, used = cls - F.logsigmoid(score if labels[image, slot] else -score), used + 1
            delta = deltas[level][image, 4 * a : 4 * a + 4, y, x]
            goal = goals[image, slot].double()
            smooth = F.smooth_l1_loss(delta, goal, beta=1 / 9, reduction="sum")
            box = box + smooth * weights[image, slot]
        norm = used if rpn.softmax else cfg.TRAIN.RPN_BATCH_SIZE_PER_IM * 2
        expected[f"loss_rpn_cls_fpn{LEVELS[level]}"] = cls / norm
        expected[f"loss_rpn_bbox_fpn{LEVELS[level]}"] = box / 2
    assert list(losses) == list(expected)
    for name in losses:
        torch.testing.assert_close(losses[name], expected[name])
    weight = dict(zip(losses, torch.rand(len(losses), generator=g), strict=True))
    found, slow = (
        torch.autograd.grad(
            sum(x[name] * weight[name].item() for name in x), [*maps, *rpn.parameters()]
        )
        for x in (losses, expected)
    )
    for a, b in zip(found, slow, strict=True):
        torch.testing.assert_close(a, b)
    empty = RPNTargets(index, torch.full_like(labels, -1).to(torch.int8), goals * 0, weights * 0)
    assert all(value == 0 for value in rpn.losses(maps, empty).values())


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_predictions_at_anchors_are_those_of_the_maps(rpn, activation, cfg):
    cfg.RPN.CLS_ACTIVATION = activation
    rpn = type(rpn)(4)
    maps = [torch.randn(2, 4, 6, 8), torch.randn(2, 4, 3, 4)]
    logits, deltas = rpn.predict(maps)
    all_of_them = torch.arange(60 * ANCHORS).expand(2, -1)
    score, delta = rpn.predict_at(maps, all_of_them)
    scores = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
    torch.testing.assert_close(score, torch.cat(scores, dim=1))
    rows = [x.permute(0, 2, 3, 1).reshape(2, -1, 4) for x in deltas]
    torch.testing.assert_close(delta, torch.cat(rows, dim=1))


def test_weights_that_a_hook_makes_are_trained_too(rpn):
    x = torch.randn(1, 4, 6, 8)
    maps, index = [x, x[:, :, :3, :4]], torch.arange(20).unsqueeze(0)
    expected = rpn.predict_at(maps, index)
    torch.nn.utils.prune.random_unstructured(rpn.FPN_RPN_conv, "weight", amount=0.0)
    for _ in range(2):
        found = rpn.predict_at(maps, index)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        with torch.no_grad():
            rpn.predict(maps)
        rpn.zero_grad()
        sum(values.sum() for values in found).backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in rpn.parameters())


def test_proposals_score_the_foregrounds_probability(rpn):
    x = torch.randn(1, 4, 6, 8)
    logits, deltas = rpn.predict([x, x[:, :, :3, :4]])
    expected = two_scores(rpn, x).softmax(dim=-1)[..., 1]
    own = logits[0].permute(0, 2, 3, 1).flatten(1).sigmoid()
    torch.testing.assert_close(own, expected)
    proposals = rpn.eval().propose(logits, deltas, torch.tensor([[24.0, 32.0, 1.0]]))
    best = proposals.scores[proposals.valid].max()
    torch.testing.assert_close(best, torch.cat([s.flatten() for s in logits]).sigmoid().max())
