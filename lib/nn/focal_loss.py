"""The focal loss (Lin et al. 2017) of a softmax over dense class predictions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.sigmoid_focal_loss import LOG_FLT_MIN


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
    floored = log_p + (log_p.clamp(min=LOG_FLT_MIN) - log_p).detach()
    weight = torch.where(labels > 0, alpha, 1.0 - alpha) * (labels >= 0)
    return -(weight * (1 - log_p.exp()) ** gamma * floored).sum()
