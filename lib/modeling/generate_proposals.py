"""From the RPN's outputs to proposals: top-k, decode, clip, filter, NMS, all images at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import ops
import utils.boxes as box_utils


class Proposals(NamedTuple):
    """Padded proposals of N images.

    Attributes:
        boxes: (N, K, 4) float32, network-input pixels.
        scores: (N, K) float32 objectness probabilities; -1 in empty slots.
    """

    boxes: Tensor
    scores: Tensor

    @property
    def valid(self) -> Tensor:
        """(N, K) bool: slots that hold a proposal."""
        return self.scores >= 0


def generate_proposals(
    logits: list[Tensor],
    deltas: list[Tensor],
    anchors: list[Tensor],
    im_info: Tensor,
    *,
    pre_nms_top_n: int,
    post_nms_top_n: int,
    nms_thresh: float,
    min_size: float,
    xform_clip: float = box_utils.BBOX_XFORM_CLIP,
) -> Proposals:
    """Proposals of every level of every image.

    Args:
        logits: per level (N, A, H, W).
        deltas: per level (N, 4A, H, W), four a cell anchor.
        anchors: per level (H * W * A, 4), the anchor varying fastest.
        im_info: (N, 3) height, width, scale; boxes are clipped to it.
        pre_nms_top_n: candidates of a level before NMS; <= 0 keeps all.
        post_nms_top_n: survivors of a level; <= 0 keeps all.
        nms_thresh: IoU from which on NMS suppresses; <= 0 keeps every candidate.
        min_size: shortest side, in original-image pixels.
        xform_clip: BBOX_XFORM_CLIP, upper bound of the deltas dw and dh.

    Returns:
        Proposals with the levels side by side (fine to coarse as given), within a level by
        descending score.
    """
    per_level = [
        _top_candidates(*level, pre_nms_top_n, xform_clip)
        for level in zip(logits, deltas, anchors, strict=True)
    ]
    # shape[0], not len(): torch.export must not take the number of images for a constant.
    num_images, longest = im_info.shape[0], max(scores.shape[1] for _, scores in per_level)
    # One NMS problem a level and image, padded to the same length.
    boxes = torch.stack([_pad(boxes, longest, 0.0) for boxes, _ in per_level], dim=1)
    scores = torch.stack([_pad(scores, longest, -1.0) for _, scores in per_level], dim=1)
    boxes, keep = _clip_and_filter(boxes, im_info, min_size)
    scores = torch.where(keep, scores, -1.0)
    if nms_thresh > 0:
        post = post_nms_top_n if post_nms_top_n > 0 else longest
        post = min(post, longest)
        index, _ = ops.batched_nms(
            boxes.flatten(0, 1), (scores >= 0).flatten(0, 1), nms_thresh, post
        )
        index = index.view(num_images, -1, post)
        scores = torch.where(index >= 0, scores.gather(2, index.clamp(min=0)), -1.0)
        boxes = boxes.gather(2, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, 4))
    return Proposals(boxes.flatten(1, 2), scores.flatten(1, 2))


def collect_over_batch(proposals: Proposals, top_n: int) -> Proposals:
    """The `top_n` best proposals of the whole mini-batch; the others' slots become empty.

    Detectron's collect step cuts over all images of a GPU together.
    """
    scores = proposals.scores.flatten()
    if top_n >= scores.numel():
        return proposals
    best = scores.topk(top_n, sorted=False).indices
    kept = torch.full_like(scores, -1.0).scatter(0, best, scores[best])
    return Proposals(proposals.boxes, kept.view_as(proposals.scores))


def collect_per_image(proposals: Proposals, top_n: int) -> Proposals:
    """The `top_n` best proposals of each image, by descending score."""
    top_n = min(top_n, proposals.scores.shape[1])
    scores, index = torch.sort(proposals.scores, dim=1, descending=True, stable=True)
    index = index[:, :top_n, None].expand(-1, -1, 4)
    return Proposals(proposals.boxes.gather(1, index), scores[:, :top_n])


def _top_candidates(
    logits: Tensor, deltas: Tensor, anchors: Tensor, top_n: int, xform_clip: float
) -> tuple[Tensor, Tensor]:
    """Decoded boxes (N, k, 4) and probabilities (N, k) of a level's best anchors, sorted."""
    num_images = logits.shape[0]
    scores = logits.float().permute(0, 2, 3, 1).flatten(1).sigmoid()
    count = scores.shape[1]
    if top_n > 0 and torch.compiler.is_compiling():
        # As many candidates from every level, however small its map: the rest are empty slots.
        scores = torch.cat([scores, scores.new_full((num_images, top_n), -1.0)], dim=1)
    scores, index = scores.topk(min(top_n, scores.shape[1]) if top_n > 0 else count, dim=1)
    index = index.clamp(max=count - 1)
    per_anchor = deltas.permute(0, 2, 3, 1).reshape(num_images, count, 4)
    chosen = per_anchor.gather(1, index.unsqueeze(-1).expand(-1, -1, 4)).float()
    return box_utils.bbox_transform(anchors[index], chosen, clip=xform_clip), scores


def _pad(x: Tensor, length: int, value: float) -> Tensor:
    """x (N, k, ...) padded along k."""
    missing = length - x.shape[1]
    if missing == 0:
        return x
    return torch.cat([x, x.new_full((x.shape[0], missing, *x.shape[2:]), value)], dim=1)


def _clip_and_filter(boxes: Tensor, im_info: Tensor, min_size: float) -> tuple[Tensor, Tensor]:
    """Boxes (N, L, k, 4) clipped to their images, and which are large enough (N, L, k)."""
    height, width, scale = im_info.view(-1, 1, 1, 3).unbind(-1)
    x1, y1, x2, y2 = boxes.unbind(-1)
    zero = boxes.new_zeros(())
    x1, x2 = (torch.minimum(torch.maximum(x, zero), width - 1) for x in (x1, x2))
    y1, y2 = (torch.minimum(torch.maximum(y, zero), height - 1) for y in (y1, y2))
    box_w, box_h = x2 - x1 + 1, y2 - y1 + 1
    large = (box_w >= min_size * scale) & (box_h >= min_size * scale)
    inside = (x1 + box_w / 2 < width) & (y1 + box_h / 2 < height)
    return torch.stack([x1, y1, x2, y2], dim=-1), large & inside
