"""The draw of the anchors that a region proposal network learns from."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library  # noqa: F401


def sample_anchors(
    foreground: Tensor, background: Tensor, random: Tensor, max_foreground: int
) -> tuple[Tensor, Tensor]:
    """Draw S anchors of each image: foreground, and background for the rest.

    At most `max_foreground` of the foreground, a uniform subset. Background fills up to S, drawn
    with replacement; all of it is taken where there is no more. An anchor drawn twice counts once,
    and one drawn as both is background.

    Args:
        foreground: (N, A) bool, A > 0; background: likewise, the candidates.
        random: (N, max_foreground + S) float32, uniform in [0, 1): all that chance decides.
        max_foreground: at most S.

    Returns:
        index: (N, S) int64 anchors; 0 in empty slots.
        labels: (N, S) int8: 1 foreground, 0 background, -1 for a slot that does not count.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
    """
    return torch.ops.detectron.sample_anchors(foreground, background, random, max_foreground)


@torch.library.register_fake("detectron::sample_anchors")
def _sample_anchors_fake(
    foreground: Tensor, background: Tensor, random: Tensor, max_foreground: int
) -> tuple[Tensor, Tensor]:
    shape = (foreground.shape[0], random.shape[1] - max_foreground)
    return (
        foreground.new_empty(shape, dtype=torch.int64),
        foreground.new_empty(shape, dtype=torch.int8),
    )
