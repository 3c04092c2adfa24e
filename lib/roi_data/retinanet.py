"""Training targets of RetinaNet for all images of a batch at once: a label for every anchor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import ops
import utils.boxes as box_utils


class RetinaNetTargets(NamedTuple):
    """Targets of N images and A anchors (all levels side by side).

    Attributes:
        labels: (N, A) int64: the class of the anchor's object, 0 background, -1 not used.
        bbox_targets: (N, A, 4) float32 deltas to that object (not times any weights); 0 where
            labels < 1.
        fg_num: () float32, over all images the anchors that matched an object, one more an image.
            Those that became background after all count too.
        bg_num: () float32, likewise the logits that learn to be low.
    """

    labels: Tensor
    bbox_targets: Tensor
    fg_num: Tensor
    bg_num: Tensor


@torch.no_grad()
def retinanet_targets(
    anchors: Tensor,
    gt_boxes: Tensor,
    gt_classes: Tensor,
    gt_valid: Tensor,
    im_info: Tensor,
    *,
    positive_overlap: float,
    negative_overlap: float,
    num_classes: int,
) -> RetinaNetTargets:
    """Label every anchor; none is drawn and none left out for straddling the image's border.

    An anchor gets the class of the object it overlaps most if their IoU is >= positive_overlap or
    if no anchor overlaps some object more. But all with IoU < negative_overlap are background, so
    that a poor best match counts between the two overlaps only.

    Args:
        anchors: (A, 4) float32, network-input pixels, of the mini-batch's own maps.
        gt_boxes: (N, G, 4) float32, network-input pixels; padded.
        gt_classes: (N, G) int64.
        gt_valid: (N, G) bool, False for padding and crowd regions.
        im_info: (N, 3) height, width, scale.
        positive_overlap, negative_overlap: RETINANET.POSITIVE_OVERLAP, NEGATIVE_OVERLAP.
        num_classes: MODEL.NUM_CLASSES, with the background.

    Source: RetinaNet, section 4, as Detectron labels.
    """
    matches = ops.match_anchors(anchors, gt_boxes, gt_valid, im_info, positive_overlap, -1)
    labels = torch.where(matches.foreground, gt_classes.gather(1, matches.gt_index), -1)
    num_fg = (labels > 0).sum() + len(labels)
    labels = torch.where(matches.max_overlap < negative_overlap, 0, labels)
    num_bg = (labels == 0).sum() + len(labels)
    own_boxes = gt_boxes.gather(1, matches.gt_index.unsqueeze(-1).expand(-1, -1, 4))
    bbox_targets = torch.where(
        labels.unsqueeze(-1) > 0, box_utils.bbox_transform_inv(anchors, own_boxes), 0.0
    )
    bg_num = num_bg * (num_classes - 1) + num_fg * (num_classes - 2)
    return RetinaNetTargets(labels, bbox_targets, num_fg.float(), bg_num.float())
