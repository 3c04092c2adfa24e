"""Focal losses (Lin et al. 2017) of dense class predictions, as RetinaNet sums them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_LOG_FLT_MIN = math.log(torch.finfo(torch.float32).tiny)  # probabilities count as at least FLT_MIN
# Logits worked on at once. A batch of 16 large images has 2 ** 28: too many for copies of them all.
_CHUNK = 1 << 25


def sigmoid_focal_loss(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sum of the focal loss of a sigmoid for every class of every anchor.

    A class that is the anchor's own costs -alpha (1 - p)^gamma ln p, any other
    -(1 - alpha) p^gamma ln(1 - p). Only the gradient is kept for the backward pass, in the dtype of
    the logits (float32 for float16, where it could underflow).

    Args:
        logits: (N, A * C, H, W) floating point; channel a * C + c is class c + 1 of anchor a.
        labels: (N, A, H, W) int64; 0 is the background, -1 an anchor that does not count.

    Returns:
        scalar, float32 (float64 for float64), differentiable once.
    """
    return _SigmoidFocalSum.apply(logits, labels, alpha, gamma)


def softmax_focal_loss(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sum over the anchors of -z (1 - p)^gamma ln p, p being the softmax's value for the anchor's
    own class and z = 1 - alpha for the background, alpha for the others.

    Args:
        logits: (N, A * K, H, W) floating point; channel a * K + k is class k of anchor a.
        labels: (N, A, H, W) int64 in 0 .. K - 1, or -1 for an anchor that does not count.

    Returns:
        scalar, float32 (float64 for float64).
    """
    labels = labels.unsqueeze(2)
    per_anchor = logits.unflatten(1, (labels.shape[1], -1))
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p = F.log_softmax(per_anchor, dim=2, dtype=dtype).gather(2, labels.clamp(min=0))
    # The floor is for the value alone: a hopeless anchor still has its gradient.
    floored = log_p + (log_p.clamp(min=_LOG_FLT_MIN) - log_p).detach()
    weight = torch.where(labels > 0, alpha, 1.0 - alpha) * (labels >= 0)
    return -(weight * (1 - log_p.exp()) ** gamma * floored).sum()


class _SigmoidFocalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
        anchors, dtype = labels.shape[1], torch.promote_types(logits.dtype, torch.float32)
        grad = None
        if ctx.needs_input_grad[0]:
            kept = torch.bfloat16 if logits.dtype == torch.bfloat16 else dtype
            grad = torch.empty_like(logits, dtype=kept)
        total = logits.new_zeros((), dtype=dtype)
        images = max(1, _CHUNK // max(1, logits[:1].numel()))
        for start in range(0, len(logits), images):
            part = slice(start, start + images)
            total += _sigmoid_focal_sum(
                logits[part].unflatten(1, (anchors, -1)).to(dtype),
                labels[part].unsqueeze(2),
                alpha,
                gamma,
                None if grad is None else grad[part].unflatten(1, (anchors, -1)),
            )
        ctx.dtype = logits.dtype
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return (grad * grad_output).to(ctx.dtype), None, None, None


def _sigmoid_focal_sum(
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
    own_loss = alpha * own_miss**gamma * own_log.clamp(max=-_LOG_FLT_MIN)
    mistaken = (1 - alpha) * loss.gather(2, own)
    total = (1 - alpha) * (loss.sum(2, keepdim=True) * used).sum()
    total = total + torch.where(foreground, own_loss - mistaken, 0.0).sum()
    if grad_out is not None:
        grad = (1 - p).mul_(softplus).mul_(gamma).add_(p).mul_(power).mul_(used * (1.0 - alpha))
        own_grad = -alpha * own_miss**gamma * (gamma * (1 - own_miss) * own_log + own_miss)
        grad.scatter_(2, own, torch.where(foreground, own_grad, grad.gather(2, own)))
        grad_out.copy_(grad)
    return total
