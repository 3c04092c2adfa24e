"""RetinaNet's predictions to detections: image pixels, class-wise NMS, the best of each image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core.config import cfg
from core.suppression import class_nms_and_limit
from core.test_forward import ImageBatch, plain_view


def retinanet_detections(
    net: nn.Module, images: ImageBatch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Detections of images of equal `network_size`.

    Unlike the detections of R-CNN models they are exactly TEST.DETECTIONS_PER_IM an image at most
    (0: no limit), and neither TEST.SCORE_THRESH nor TEST.BBOX_VOTE has a say.

    Returns:
        boxes (n, 4) float32 in image pixels, scores (n,), classes (n,) and images (n,) int64; by
        image and class, within a class best first.
    """
    (shown,) = images.show([plain_view()])
    out = net(shown.data, shown.im_info)
    image, slot = (out["scores"] >= 0).nonzero().unbind(1)
    scores, classes = out["scores"][image, slot], out["classes"][image, slot]
    boxes = (out["boxes"][image, slot].double() / shown.scales[image, None]).float()
    limit = (shown.extents - 1).repeat(1, 2).to(boxes.dtype)
    boxes = torch.minimum(boxes.clamp(min=0), limit[image])
    keep, boxes, scores = class_nms_and_limit(
        boxes,
        scores,
        classes,
        image,
        nms_thresh=cfg.TEST.NMS,
        limit=0,
        soft_nms=cfg.TEST.SOFT_NMS,
    )
    classes, image = classes[keep], image[keep]
    order = scores.argsort(descending=True, stable=True)
    order = order[image[order].argsort(stable=True)]
    if cfg.TEST.DETECTIONS_PER_IM > 0:
        found = torch.bincount(image, minlength=len(images.sizes))
        first = (found.cumsum(0) - found)[image[order]]
        rank = torch.arange(len(order), device=order.device) - first
        order = order[rank < cfg.TEST.DETECTIONS_PER_IM]
    # Back to classes, the order by score staying within each.
    problem = image * cfg.MODEL.NUM_CLASSES + classes
    order = order[problem[order].argsort(stable=True)]
    return boxes[order], scores[order], classes[order], image[order]
