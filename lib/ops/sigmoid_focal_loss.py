"""The focal loss of RetinaNet's sigmoids, with its gradient in the same pass."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _library, _roi  # noqa: F401

LOG_FLT_MIN = math.log(torch.finfo(torch.float32).tiny)  # probabilities count as at least FLT_MIN
# Logits that the CPU works on at once: copies of all of them would be too many.
_CHUNK = 1 << 25


def sigmoid_focal_loss(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sum of the focal loss of a sigmoid for every class of every anchor.

    A class that is the anchor's own costs -alpha (1 - p)^gamma ln p, any other
    -(1 - alpha) p^gamma ln(1 - p). Only the gradient is kept for the backward pass, in the dtype of
    the logits (float32 for float16, where it could underflow). It repeats bit for bit.

    Args:
        logits: (N, A * C, H, W) floating point, NCHW or channels_last; channel a * C + c is class
            c + 1 of anchor a.
        labels: (N, A, H, W) int64; 0 is the background, -1 an anchor that does not count.

    Returns:
        scalar, float32 (float64 for float64), differentiable once.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.

    Source: Lin et al. 2017, as Detectron sums it.
    """
    return _SigmoidFocalLoss.apply(logits, labels, alpha, gamma)


class _SigmoidFocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
        total, grad = torch.ops.detectron.sigmoid_focal_loss(
            logits, labels, alpha, gamma, ctx.needs_input_grad[0]
        )
        ctx.dtype = logits.dtype
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return (grad * grad_output).to(ctx.dtype), None, None, None


def _grad_dtype(logits: Tensor) -> torch.dtype:
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype


@torch.library.register_fake("detectron::sigmoid_focal_loss")
def _fake(
    logits: Tensor, labels: Tensor, alpha: float, gamma: float, with_grad: bool
) -> tuple[Tensor, Tensor]:
    total = logits.new_empty((), dtype=torch.promote_types(logits.dtype, torch.float32))
    if not with_grad:
        return total, logits.new_empty(0)
    last = _roi.is_channels_last([logits])
    layout = torch.channels_last if last else torch.contiguous_format
    return total, torch.empty_like(logits, dtype=_grad_dtype(logits), memory_format=layout)


@torch.library.impl("detectron::sigmoid_focal_loss", "CPU")
def _on_cpu(
    logits: Tensor, labels: Tensor, alpha: float, gamma: float, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """Torch's own passes, whose exponentials are vectorised."""
    anchors, classes = labels.shape[1], logits.shape[1] // max(1, labels.shape[1])
    if (len(logits), anchors * classes, *logits.shape[2:]) != logits.shape or (
        labels.shape != (len(logits), anchors, *logits.shape[2:]) or anchors == 0
    ):
        raise ValueError(
            "sigmoid_focal_loss: logits must be (N, A * C, H, W) and labels (N, A, H, W), not "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"sigmoid_focal_loss: labels must be int64, not {labels.dtype}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    grad = torch.empty_like(logits, dtype=_grad_dtype(logits)) if with_grad else logits.new_empty(0)
    total = logits.new_zeros((), dtype=dtype)
    images = max(1, _CHUNK // max(1, logits[:1].numel()))
    for start in range(0, len(logits), images):
        part = slice(start, start + images)
        total += _sum_of_part(
            logits[part].unflatten(1, (anchors, -1)).to(dtype),
            labels[part].unsqueeze(2),
            alpha,
            gamma,
            grad[part].unflatten(1, (anchors, -1)) if with_grad else None,
        )
    return total, grad


def _sum_of_part(
    x: Tensor, labels: Tensor, alpha: float, gamma: float, grad_out: Tensor | None
) -> Tensor:
    """The loss of logits x (n, A, C, H, W) with labels (n, A, 1, H, W); fills in its gradient.

    Every class is first taken for one that is not there, then each anchor's own is put right: one
    in C, so that the large passes are few.
    """
    used, foreground = labels >= 0, labels > 0
    own = (labels - 1).clamp(min=0)
    p, softplus = x.sigmoid(), F.softplus(x)  # softplus = -ln(1 - p)
    power = p**gamma
    loss = power * softplus
    own_x = x.gather(2, own)
    own_miss, own_log = torch.sigmoid(-own_x), F.softplus(-own_x)  # 1 - p and -ln p
    own_loss = alpha * own_miss**gamma * own_log.clamp(max=-LOG_FLT_MIN)
    mistaken = (1 - alpha) * loss.gather(2, own)
    total = (1 - alpha) * (loss.sum(2, keepdim=True) * used).sum()
    total = total + torch.where(foreground, own_loss - mistaken, 0.0).sum()
    if grad_out is not None:
        grad = (1 - p).mul_(softplus).mul_(gamma).add_(p).mul_(power).mul_(used * (1.0 - alpha))
        own_grad = -alpha * own_miss**gamma * (gamma * (1 - own_miss) * own_log + own_miss)
        grad.scatter_(2, own, torch.where(foreground, own_grad, grad.gather(2, own)))
        grad_out.copy_(grad)
    return total
