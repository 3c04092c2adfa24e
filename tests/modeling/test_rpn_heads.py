"""The softmax RPN: two scores an anchor, and the mean over each level."""

from __future__ import annotations

import pytest
import torch
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
    targets = RPNTargets(labels, torch.zeros(2, sum(counts), 4), zeros)
    losses = rpn.losses(*rpn.predict(maps), targets)
    for level, x, part in zip(LEVELS, maps, labels.split(counts, dim=1), strict=True):
        scores = two_scores(rpn, x).flatten(0, 1)
        expected = F.cross_entropy(scores, part.flatten().long(), ignore_index=-1)
        torch.testing.assert_close(losses[f"loss_rpn_cls_fpn{level}"], expected)


def test_proposals_score_the_foregrounds_probability(rpn):
    x = torch.randn(1, 4, 6, 8)
    logits, deltas = rpn.predict([x, x[:, :, :3, :4]])
    expected = two_scores(rpn, x).softmax(dim=-1)[..., 1]
    own = logits[0].permute(0, 2, 3, 1).flatten(1).sigmoid()
    torch.testing.assert_close(own, expected)
    proposals = rpn.eval().propose(logits, deltas, torch.tensor([[24.0, 32.0, 1.0]]))
    best = proposals.scores[proposals.valid].max()
    torch.testing.assert_close(best, torch.cat([s.flatten() for s in logits]).sigmoid().max())
