"""Box voting (Gidaris and Komodakis): kept boxes move to the mean of the boxes around them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library  # noqa: F401

SCORING_METHODS = ("ID", "TEMP_AVG", "AVG", "IOU_AVG", "GENERALIZED_AVG", "QUASI_SUM")


def box_voting(
    top_dets: Tensor,
    all_dets: Tensor,
    thresh: float,
    scoring_method: str = "ID",
    beta: float = 1.0,
    top_group: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Detections refined by their voters: the boxes whose IoU with them is at least `thresh`.

    The new box is the mean of the voters' boxes weighted by their scores w. The new score, of n
    voters: `ID`: as it was; `AVG`: mean w; `IOU_AVG`: sum(IoU w) / sum(IoU); `GENERALIZED_AVG`:
    mean(w^beta)^(1 / beta); `QUASI_SUM`: sum(w) / n^beta; `TEMP_AVG`: mean of w^(1 / beta) /
    (w^(1 / beta) + (1 - w)^(1 / beta)). Widths are Detectron's, x2 - x1 + 1.

    Args:
        top_dets: (T, 5) floating point `[x1, y1, x2, y2, score]`: those to refine.
        all_dets: (A, 5): those that vote, usually what NMS was given.
        thresh: IoU from which on a box votes; scoring_method: one of SCORING_METHODS; beta: > 0.
        top_group, offsets: for many problems at once: (T,) int64, the group of each detection, and
            (groups + 1,) int64: group g's voters are all_dets[offsets[g] : offsets[g + 1]]. Left
            out, all vote on all.

    Returns:
        (T, 5) float32. A detection without voters stays as it is; one whose voters' scores sum to
        zero keeps its box.

    Raises:
        ValueError, TypeError: an unknown method; shapes, devices or dtypes that do not fit.
    """
    if scoring_method not in SCORING_METHODS:
        raise ValueError(
            f"box_voting: scoring_method must be one of {', '.join(SCORING_METHODS)}, "
            f"not {scoring_method!r}"
        )
    if top_group is None or offsets is None:
        top_group = torch.zeros(len(top_dets), dtype=torch.int64, device=top_dets.device)
        offsets = torch.arange(2, device=top_dets.device) * len(all_dets)
    return torch.ops.detectron.box_voting(
        top_dets,
        all_dets,
        top_group,
        offsets,
        float(thresh),
        SCORING_METHODS.index(scoring_method),
        float(beta),
    )


@torch.library.register_fake("detectron::box_voting")
def _box_voting_fake(top_dets, all_dets, top_group, offsets, thresh, method, beta):
    return torch.empty(top_dets.shape, dtype=torch.float32, device=top_dets.device)
