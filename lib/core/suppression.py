"""From scored class boxes to detections: NMS or soft-NMS, voting, the limit per image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import ops
from core.errors import UserError

SOFT_NMS_FLOOR = 1e-4  # what soft-NMS lowers below this is dropped


def class_nms_and_limit(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    images: Tensor,
    *,
    nms_thresh: float,
    limit: int,
    soft_nms: Mapping[str, Any] | None = None,
    bbox_vote: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Suppress within each class of each image, let the boxes vote, then cut each image at its
    `limit`-th best score.

    Args:
        boxes: (K, 4) float32; scores: (K,) float32; classes, images: (K,) int64.
        nms_thresh: a box is dropped if its IoU with a better one of its class is at least this.
        limit: detections scoring as well as the `limit`-th best of their image stay, so that ties
            may exceed it; 0 or less for no limit.
        soft_nms, bbox_vote: the config's TEST.SOFT_NMS and TEST.BBOX_VOTE; None counts as not
            ENABLED. All boxes given vote, with the scores given, also after soft-NMS.

    Returns:
        keep: (n,) int64 indices of the survivors, ordered by image, class, input position; with
            soft-NMS the last by lowered score, best first.
        boxes: (n, 4) float32, scores: (n,) float32: theirs, as voting and soft-NMS left them.

    Raises:
        UserError: a METHOD or SCORING_METHOD that there is not.
    """
    soft = soft_nms is not None and soft_nms["ENABLED"]
    vote = bbox_vote is not None and bbox_vote["ENABLED"]
    if soft:
        _check("TEST.SOFT_NMS.METHOD", soft_nms["METHOD"], ops.SOFT_NMS_METHODS)
    if vote:
        _check("TEST.BBOX_VOTE.SCORING_METHOD", bbox_vote["SCORING_METHOD"], ops.VOTING_METHODS)
    if not len(boxes):
        return torch.zeros(0, dtype=torch.int64, device=boxes.device), boxes, scores

    problem = images * (classes.max() + 1) + classes
    # Best first in every problem, equal scores in input order.
    order = scores.argsort(descending=True, stable=True)
    order = order[problem[order].argsort(stable=True)]
    counts = torch.unique_consecutive(problem[order], return_counts=True)[1]
    first = counts.cumsum(0) - counts
    owner = torch.repeat_interleave(counts)
    rank = torch.arange(len(order), device=boxes.device) - first[owner]
    longest = int(counts.max())
    padded = boxes.new_zeros(len(counts), longest, 4)
    padded[owner, rank] = boxes[order]
    valid = torch.arange(longest, device=boxes.device) < counts[:, None]
    if soft:
        padded_scores = scores.new_zeros(len(counts), longest)
        padded_scores[owner, rank] = scores[order]
        kept, lowered, _ = ops.batched_soft_nms(
            padded,
            padded_scores,
            valid,
            soft_nms["SIGMA"],
            nms_thresh,
            SOFT_NMS_FLOOR,
            soft_nms["METHOD"],
        )
    else:
        kept, _ = ops.batched_nms(padded, valid, nms_thresh, longest)
    taken = kept >= 0
    survivors = order[(first[:, None] + kept)[taken]]
    boxes_left, scores_left = boxes[survivors], lowered[taken] if soft else scores[survivors]

    if vote:
        voted = ops.box_voting(
            torch.cat([boxes_left, scores_left[:, None]], dim=1),
            torch.cat([boxes, scores[:, None]], dim=1)[order],
            bbox_vote["VOTE_TH"],
            bbox_vote["SCORING_METHOD"],
            bbox_vote["SCORING_METHOD_BETA"],
            top_group=taken.nonzero()[:, 0],
            offsets=torch.cat([first, first[-1:] + counts[-1:]]),
        )
        boxes_left, scores_left = voted[:, :4], voted[:, 4]

    stay = _within_limit(scores_left, images[survivors], limit)
    if not soft:
        stay = stay[survivors[stay].argsort()]
        stay = stay[problem[survivors[stay]].argsort(stable=True)]
    return survivors[stay], boxes_left[stay], scores_left[stay]


def class_nms_in_slots(
    boxes: Tensor, scores: Tensor, classes: Tensor, used: Tensor, *, nms_thresh: float, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`class_nms_and_limit` of a fixed number of slots an image, without waiting for the device.

    Args:
        boxes: (N, S, 4) float32; scores: (N, S) float32, not negative; classes: (N, S) int64.
        used: (N, S) bool, slots that hold a box.
        nms_thresh: as in `class_nms_and_limit`; limit: at least 1.

    Returns:
        slot: (N, L) int64, L = min(S, limit): the slots of the survivors, ordered by class, then
            slot; any slot where there are fewer.
        kept: (N, L) bool, where `slot` is a survivor's.
        tied: (N,) bool, images of which one more should stay, as it ties with the last.
    """
    num_slots = boxes.shape[1]
    best = min(num_slots, limit)
    ranked, order = torch.where(used, scores, -1.0).sort(dim=1, descending=True, stable=True)
    index, found = ops.batched_nms(
        boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4)),
        ranked >= 0,
        nms_thresh,
        min(num_slots, limit + 1),
        groups=classes.gather(1, order),
    )
    left = ranked.gather(1, index.clamp(min=0))  # any score where there are fewer
    tied = (found > best) & (left[:, -1] >= left[:, best - 1])
    slot, kept = order.gather(1, index[:, :best].clamp(min=0)), index[:, :best] >= 0
    place = classes.gather(1, slot) * num_slots + slot
    place = torch.where(kept, place, torch.iinfo(torch.int64).max).argsort(dim=1)
    return slot.gather(1, place), kept.gather(1, place), tied


def _within_limit(scores: Tensor, images: Tensor, limit: int) -> Tensor:
    """Indices of the detections that score at least as well as the `limit`-th best of their
    image."""
    if limit <= 0:
        return torch.arange(len(scores), device=scores.device)
    ranked = scores.argsort(descending=True, stable=True)
    ranked = ranked[images[ranked].argsort(stable=True)]
    found = torch.bincount(images)
    nth = (found.cumsum(0) - found + limit - 1).clamp(max=len(scores) - 1)
    cut = torch.where(found > limit, scores[ranked[nth]], -torch.inf)
    return (scores >= cut[images]).nonzero()[:, 0]


def _check(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{key} must be one of {', '.join(known)}, not {value!r}.")
