"""The sigmoid's focal loss against sums over one anchor after another, and its gradient."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch

from ops import sigmoid_focal_loss

FLT_MIN = 2.0**-126
ALPHA, GAMMA = 0.25, 2.0
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# Logits by the 16 bytes and one by one; labels that change within 16 bytes; rounds of a grid.
SHAPES = [(2, 3, 7, 4, 5), (1, 9, 20, 6, 6), (2, 1, 80, 1, 1), (1, 1, 1, 3, 5), (2, 9, 80, 31, 33)]


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


def case(classes: int, seed: int = 0, spread: float = 3.0):
    """Logits of 2 images, 3 anchors, maps of 4 x 5, and labels from -1 on."""
    rng = np.random.RandomState(seed)
    logits = (spread * rng.randn(2, 3 * classes, 4, 5)).astype(np.float32)
    return logits, rng.randint(-1, classes + 1, (2, 3, 4, 5))


@pytest.mark.parametrize("gamma", [2.0, 0.0, 1.5])
def test_sigmoid_loss_and_gradient_agree_with_a_slow_reference(gamma):
    logits, labels = case(classes=7)
    value, grad = slow_sigmoid_loss(logits, labels, gamma=gamma)
    x = torch.from_numpy(logits).requires_grad_()
    loss = sigmoid_focal_loss(x, torch.from_numpy(labels), ALPHA, gamma)
    assert loss.item() == pytest.approx(value, rel=1e-5)
    (3 * loss).backward()
    np.testing.assert_allclose(x.grad, 3 * grad, rtol=1e-4, atol=1e-6)


def test_sigmoid_gradient_is_that_of_the_value():
    logits, labels = case(classes=3, spread=1.0)
    x = torch.from_numpy(logits).double().requires_grad_()
    labels = torch.from_numpy(labels)
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, labels, 0.3, 2.0), x)


@pytest.mark.parametrize("device", DEVICES)
def test_hopeless_anchors_have_a_finite_loss_and_their_full_gradient(device):
    """p below FLT_MIN counts as FLT_MIN; its logit is still pushed up at full strength."""
    logits = torch.zeros(1, 3, 1, 1, device=device)
    logits[0, 1] = -300.0
    logits.requires_grad_()
    label = torch.full((1, 1, 1, 1), 2, device=device)
    value = sigmoid_focal_loss(logits, label, 1.0, GAMMA)
    assert value.item() == pytest.approx(-math.log(FLT_MIN), rel=1e-5)
    value.backward()
    assert logits.grad[0, 1].item() == pytest.approx(-1.0)


@pytest.mark.parametrize("device", DEVICES)
def test_anchors_that_do_not_count_have_neither_loss_nor_gradient(device):
    logits = torch.randn(2, 12, 3, 3, device=device, requires_grad=True)
    value = sigmoid_focal_loss(logits, torch.full((2, 3, 3, 3), -1, device=device), ALPHA, GAMMA)
    value.backward()
    assert value.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_costs_nothing(device):
    for shape in [(0, 12, 3, 3), (2, 12, 0, 3)]:
        logits = torch.zeros(shape, device=device, requires_grad=True)
        labels = torch.zeros((shape[0], 3, *shape[2:]), dtype=torch.int64, device=device)
        value = sigmoid_focal_loss(logits, labels, ALPHA, GAMMA)
        value.backward()
        assert value.item() == 0 and logits.grad.shape == shape


def test_neither_chunks_nor_the_memory_format_change_anything(monkeypatch):
    module = importlib.import_module("ops.sigmoid_focal_loss")
    logits, labels = case(classes=7)
    results = []
    for chunk, memory_format in [
        (1 << 25, torch.contiguous_format),
        (1, torch.contiguous_format),
        (1 << 25, torch.channels_last),
    ]:
        monkeypatch.setattr(module, "_CHUNK", chunk)
        x = torch.from_numpy(logits).contiguous(memory_format=memory_format).requires_grad_()
        loss = sigmoid_focal_loss(x, torch.from_numpy(labels), ALPHA, GAMMA)
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
    loss = sigmoid_focal_loss(x, torch.from_numpy(labels), ALPHA, GAMMA)
    value, grad = slow_sigmoid_loss(x.detach().float().numpy(), labels)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(value, rel=1e-5)
    loss.backward()
    assert x.grad.dtype == dtype
    np.testing.assert_allclose(x.grad.float(), grad, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_dtype_and_layout_agrees_with_float64(shape, layout, dtype, device):
    images, anchors, classes, height, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    logits = 4 * torch.randn(images, anchors * classes, height, width, generator=generator)
    labels = torch.randint(-1, classes + 1, (images, anchors, height, width), generator=generator)
    labels = torch.where(labels > 0, labels, labels.clamp(max=0))
    for gamma in (2.0, 1.5):
        x = logits.to(device, dtype, memory_format=layout, copy=True).requires_grad_()
        value = sigmoid_focal_loss(x, labels.to(device), ALPHA, gamma)
        value.backward()
        wide = x.detach().cpu().double().contiguous().requires_grad_()
        expected = sigmoid_focal_loss(wide, labels, ALPHA, gamma)
        expected.backward()
        assert x.grad.dtype == dtype and x.grad.stride() == x.stride()
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        error = max(4 * torch.finfo(dtype).eps, 1e-4)
        torch.testing.assert_close(x.grad.cpu().double(), wide.grad, rtol=error, atol=1e-7)


@pytest.mark.gpu
def test_it_repeats_bit_for_bit():
    logits = torch.randn(4, 720, 50, 76, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(-1, 81, (4, 9, 50, 76), device="cuda")
    values = {sigmoid_focal_loss(logits, labels, ALPHA, GAMMA).item() for _ in range(3)}
    assert len(values) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_and_sentences(device):
    logits, labels = (torch.from_numpy(array).to(device) for array in case(classes=7))
    operator = torch.ops.detectron.sigmoid_focal_loss
    for with_grad in (True, False):
        for x in (logits, logits.contiguous(memory_format=torch.channels_last), logits.bfloat16()):
            torch.library.opcheck(operator.default, (x, labels, ALPHA, GAMMA, with_grad))
    with pytest.raises(ValueError, match=r"logits must be \(N, A \* C, H, W\)"):
        sigmoid_focal_loss(logits, labels[:, :, :2], ALPHA, GAMMA)
    with pytest.raises(TypeError, match="labels must be"):
        sigmoid_focal_loss(logits, labels.int(), ALPHA, GAMMA)
