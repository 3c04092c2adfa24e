"""Both focal losses against sums over one anchor after another, and their gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import nn as mynn
from nn import focal_loss

FLT_MIN = 2.0**-126
ALPHA, GAMMA = 0.25, 2.0


def slow_sigmoid_loss(logits, labels, alpha=ALPHA, gamma=GAMMA):
    """Value and gradient in float64; logits (N, A * C, H, W), labels (N, A, H, W)."""
    total, grad = 0.0, np.zeros(logits.shape)
    classes = logits.shape[1] // labels.shape[1]
    for n, channel, y, x in np.ndindex(*logits.shape):
        a, c = divmod(channel, classes)
        label, z = labels[n, a, y, x], float(logits[n, channel, y, x])
        p = 1 / (1 + math.exp(-z))
        log_not_p = -z * (z >= 0) - math.log(1 + math.exp(-abs(z)))
        if label == c + 1:
            log_p = math.log(max(p, FLT_MIN))
            total -= alpha * (1 - p) ** gamma * log_p
            grad[n, channel, y, x] = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * log_p)
        elif label >= 0:
            total -= (1 - alpha) * p**gamma * log_not_p
            grad[n, channel, y, x] = (1 - alpha) * p**gamma * (p - gamma * (1 - p) * log_not_p)
    return total, grad


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


@pytest.mark.parametrize("gamma", [2.0, 0.0, 1.5])
def test_sigmoid_loss_and_gradient_agree_with_a_slow_reference(gamma):
    logits, labels = case(classes=7)
    value, grad = slow_sigmoid_loss(logits, labels, gamma=gamma)
    x = torch.from_numpy(logits).requires_grad_()
    loss = mynn.sigmoid_focal_loss(x, torch.from_numpy(labels), ALPHA, gamma)
    assert loss.item() == pytest.approx(value, rel=1e-5)
    (3 * loss).backward()
    np.testing.assert_allclose(x.grad, 3 * grad, rtol=1e-4, atol=1e-6)


def test_sigmoid_gradient_is_that_of_the_value():
    logits, labels = case(classes=3, spread=1.0)
    x = torch.from_numpy(logits).double().requires_grad_()
    labels = torch.from_numpy(labels)
    assert torch.autograd.gradcheck(lambda x: mynn.sigmoid_focal_loss(x, labels, 0.3, 2.0), x)


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


@pytest.mark.parametrize("loss", [mynn.sigmoid_focal_loss, mynn.softmax_focal_loss])
def test_hopeless_anchors_have_a_finite_loss_and_their_full_gradient(loss):
    """p below FLT_MIN counts as FLT_MIN; its logit is still pushed up at full strength."""
    logits = torch.zeros(1, 3, 1, 1)
    logits[0, 1] = -300.0
    logits.requires_grad_()
    label = torch.full((1, 1, 1, 1), 2 if loss is mynn.sigmoid_focal_loss else 1)
    value = loss(logits, label, 1.0, GAMMA)
    assert value.item() == pytest.approx(-math.log(FLT_MIN), rel=1e-5)
    value.backward()
    assert logits.grad[0, 1].item() == pytest.approx(-1.0)


@pytest.mark.parametrize("loss", [mynn.sigmoid_focal_loss, mynn.softmax_focal_loss])
def test_anchors_that_do_not_count_have_neither_loss_nor_gradient(loss):
    logits = torch.randn(2, 12, 3, 3, requires_grad=True)
    value = loss(logits, torch.full((2, 3, 3, 3), -1), ALPHA, GAMMA)
    value.backward()
    assert value.item() == 0 and not logits.grad.any()


def test_neither_chunks_nor_the_memory_format_change_anything(monkeypatch):
    logits, labels = case(classes=7)
    results = []
    for chunk, memory_format in [
        (1 << 25, torch.contiguous_format),
        (1, torch.contiguous_format),
        (1 << 25, torch.channels_last),
    ]:
        monkeypatch.setattr(focal_loss, "_CHUNK", chunk)
        x = torch.from_numpy(logits).contiguous(memory_format=memory_format).requires_grad_()
        loss = mynn.sigmoid_focal_loss(x, torch.from_numpy(labels), ALPHA, GAMMA)
        loss.backward()
        results.append((loss.detach(), x.grad.contiguous()))
        assert x.grad.is_contiguous(memory_format=memory_format)
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(grad, results[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_summed_in_float32(dtype):
    logits, labels = case(classes=7)
    x = torch.from_numpy(logits).to(dtype).requires_grad_()
    loss = mynn.sigmoid_focal_loss(x, torch.from_numpy(labels), ALPHA, GAMMA)
    value, grad = slow_sigmoid_loss(x.detach().float().numpy(), labels)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(value, rel=1e-5)
    loss.backward()
    assert x.grad.dtype == dtype
    np.testing.assert_allclose(x.grad.float(), grad, rtol=2e-2, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_gpu_agrees_with_the_slow_reference(memory_format):
    logits, labels = case(classes=7)
    x = torch.from_numpy(logits).cuda().contiguous(memory_format=memory_format).requires_grad_()
    loss = mynn.sigmoid_focal_loss(x, torch.from_numpy(labels).cuda(), ALPHA, GAMMA)
    loss.backward()
    value, grad = slow_sigmoid_loss(logits, labels)
    assert loss.item() == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(x.grad.cpu(), grad, rtol=1e-4, atol=1e-6)
