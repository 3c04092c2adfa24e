"""The softmax's focal loss against a sum over one anchor after another, and its gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import nn as mynn

FLT_MIN = 2.0**-126
ALPHA, GAMMA = 0.25, 2.0


def slow_softmax_loss(logits, labels, alpha=ALPHA, gamma=GAMMA):
    """Value alone; logits (N, A * K, H, W)."""
    total, classes = 0.0, logits.shape[1] // labels.shape[1]
    for n, a, y, x in np.ndindex(*labels.shape):
        label = labels[n, a, y, x]
        if label < 0:
            continue
        scores = logits[n, a * classes : (a + 1) * classes, y, x].astype(np.float64)
        p = np.exp(scores - scores.max())
        p = p[label] / p.sum()
        z = alpha if label else 1 - alpha
        total -= z * (1 - p) ** gamma * math.log(max(p, FLT_MIN))
    return total


def case(classes: int, seed: int = 0, spread: float = 3.0, labels_of: int | None = None):
    """Logits of 2 images, 3 anchors, maps of 4 x 5, and labels from -1 on."""
    rng = np.random.RandomState(seed)
    logits = (spread * rng.randn(2, 3 * classes, 4, 5)).astype(np.float32)
    labels = rng.randint(-1, labels_of or classes + 1, (2, 3, 4, 5))
    return logits, labels


def test_softmax_loss_and_gradient_agree_with_a_slow_reference():
    logits, labels = case(classes=6, labels_of=6)
    x = torch.from_numpy(logits).double().requires_grad_()
    loss = mynn.softmax_focal_loss(x, torch.from_numpy(labels), ALPHA, GAMMA)
    assert loss.item() == pytest.approx(slow_softmax_loss(logits, labels), rel=1e-6)
    loss.backward()
    for place in [(0, 0, 0, 0), (1, 17, 3, 4), (0, 8, 2, 1), (1, 3, 1, 2)]:
        moved, step = logits.astype(np.float64), 1e-4
        moved[place] += step
        higher = slow_softmax_loss(moved, labels)
        moved[place] -= 2 * step
        slope = (higher - slow_softmax_loss(moved, labels)) / (2 * step)
        assert x.grad[place].item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_hopeless_anchors_have_a_finite_loss_and_their_full_gradient():
    """p below FLT_MIN counts as FLT_MIN; its logit is still pushed up at full strength."""
    logits = torch.zeros(1, 3, 1, 1)
    logits[0, 1] = -300.0
    logits.requires_grad_()
    label = torch.full((1, 1, 1, 1), 1)
    value = mynn.softmax_focal_loss(logits, label, 1.0, GAMMA)
    assert value.item() == pytest.approx(-math.log(FLT_MIN), rel=1e-5)
    value.backward()
    assert logits.grad[0, 1].item() == pytest.approx(-1.0)


def test_anchors_that_do_not_count_have_neither_loss_nor_gradient():
    logits = torch.randn(2, 12, 3, 3, requires_grad=True)
    value = mynn.softmax_focal_loss(logits, torch.full((2, 3, 3, 3), -1), ALPHA, GAMMA)
    value.backward()
    assert value.item() == 0 and not logits.grad.any()
