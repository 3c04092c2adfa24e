"""From images to detections: the network, class-wise NMS, the limit per image, masks.

Everything works on batches and on the model's device; `im_detect_all` is a batch of one. Numbers
leave the device at the very end (`class_results`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.config import cfg
from core.detections import (
    ClassBoxes,
    ClassKeyps,
    ClassSegms,
    Detections,
    class_results,
    queue_point,
)
from core.errors import UserError
from core.suppression import class_nms_and_limit
from core.test_arrays import (
    im_conv_body_only,
    im_detect_bbox,
    im_detect_bbox_aspect_ratio,
    im_detect_bbox_aug,
    im_detect_bbox_hflip,
    im_detect_bbox_scale,
    im_detect_keypoints,
    im_detect_keypoints_aspect_ratio,
    im_detect_keypoints_aug,
    im_detect_keypoints_hflip,
    im_detect_keypoints_scale,
    im_detect_mask,
    im_detect_mask_aspect_ratio,
    im_detect_mask_aug,
    im_detect_mask_hflip,
    im_detect_mask_scale,
)
from core.test_augment import Pairs, box_outputs, candidates, keypoint_maps, mask_maps
from core.test_forward import ImageBatch, own_channel, plain_view
from core.test_retinanet import retinanet_detections
from core.test_slots import fits_in_slots, queue_in_slots
from ops import masks_to_rles
from utils.blob import Placed

__all__ = [
    "ClassBoxes",
    "ClassKeyps",
    "ClassSegms",
    "Detections",
    "box_results_with_nms_and_limit",
    "class_results",
    "detect_batch",
    "im_conv_body_only",
    "im_detect_all",
    "im_detect_bbox",
    "im_detect_bbox_aspect_ratio",
    "im_detect_bbox_aug",
    "im_detect_bbox_hflip",
    "im_detect_bbox_scale",
    "im_detect_keypoints",
    "im_detect_keypoints_aspect_ratio",
    "im_detect_keypoints_aug",
    "im_detect_keypoints_hflip",
    "im_detect_keypoints_scale",
    "im_detect_mask",
    "im_detect_mask_aspect_ratio",
    "im_detect_mask_aug",
    "im_detect_mask_hflip",
    "im_detect_mask_scale",
    "keypoint_results",
    "network_size",
    "queue_batch",
    "segm_results",
]


def im_detect_all(
    model: nn.Module,
    im: np.ndarray,
    box_proposals: np.ndarray | None = None,
    timers: Mapping[str, Any] | None = None,
) -> tuple[ClassBoxes, ClassSegms | None, ClassKeyps | None]:
    """Detect everything the model detects in one image.

    Args:
        model: `Generalized_RCNN` in eval mode, bare or inside a DataParallel.
        im: (H, W, 3) uint8 BGR.
        box_proposals: (P, 4) boxes in image pixels that the heads look at; None: the model makes
            its own proposals.
        timers: objects with `tic()` and `toc()` by name (`im_detect_bbox`, `misc_bbox`,
            `im_detect_mask`, `misc_mask`, `im_detect_keypoints`).

    Returns:
        `cls_boxes`: per class (n, 5) float32 `[x1, y1, x2, y2, score]`, `[]` for the background;
        `cls_segms`: per class the n COCO RLEs, None for a model without masks; `cls_keyps`:
        per class n arrays (4, K) `x, y, logit, probability`, None for a model without keypoints.
    """
    proposals = None if box_proposals is None else [box_proposals]
    (detections,) = detect_batch(model, [im], timers, proposals=proposals)
    with _timed(timers, "misc_mask"):
        return class_results(detections, cfg.MODEL.NUM_CLASSES)


def detect_batch(
    model: nn.Module,
    images: Sequence[np.ndarray],
    timers: Mapping[str, Any] | None = None,
    *,
    packed: tuple[Tensor, list[Placed]] | None = None,
    left_right: Pairs | None = None,
    proposals: Sequence[np.ndarray] | None = None,
) -> list[Detections]:
    """Detections of several images in one forward pass; what an image gives does not depend on the
    others. Arguments and errors as of `queue_batch`.

    timers: as in `im_detect_all`; with them the work is not queued as a whole, but step by step.
    """
    return queue_batch(
        model, images, timers, packed=packed, left_right=left_right, proposals=proposals
    )()


@torch.inference_mode()
def queue_batch(
    model: nn.Module,
    images: Sequence[np.ndarray],
    timers: Mapping[str, Any] | None = None,
    *,
    packed: tuple[Tensor, list[Placed]] | None = None,
    left_right: Pairs | None = None,
    proposals: Sequence[np.ndarray] | None = None,
) -> Callable[[], list[Detections]]:
    """Let the device begin with a batch; whoever wants the detections calls what is returned.

    On a GPU the host does not wait until then, in the usual case (`test_slots.fits_in_slots`), and
    may queue the next batch meanwhile.

    Args:
        model: `Generalized_RCNN` in eval mode, bare or inside a DataParallel.
        images: (H, W, 3) uint8 BGR, of equal `network_size`.
        timers: as in `detect_batch`.
        packed: the same images as `utils.blob.pack_images` gives them, if that is at hand.
        left_right: indices of the keypoints that change places in a mirrored image (KPS_AUG); by
            default those of COCO's persons.
        proposals: (P, 4) boxes of each image, in its pixels; None: the model makes its own.

    Raises:
        ValueError: the images need different amounts of padding.
        UserError: the config asks for something that testing does not do.
    """
    _check_supported(proposals)
    net = getattr(model, "module", model)
    batch = ImageBatch(images, next(net.parameters()).device, packed, proposals)
    if len({network_size(h, w) for h, w in batch.sizes}) > 1:
        raise ValueError(
            f"images of one batch must have equal padded sizes, not those of {batch.sizes}"
        )

    kind = batch.device.type
    precision = torch.autocast(
        kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
    )

    def step_by_step() -> list[Detections]:
        with precision:  # as now, wherever this is called
            return _detect(net, batch, timers, left_right)

    # Without a GPU empty slots would only cost time: there is nothing to wait for.
    if timers is not None or proposals is not None or kind != "cuda":
        return step_by_step
    return queue_in_slots(net, batch, step_by_step) if fits_in_slots(net) else step_by_step


@torch.inference_mode()
def _detect(
    net: nn.Module,
    batch: ImageBatch,
    timers: Mapping[str, Any] | None,
    left_right: Pairs | None,
) -> list[Detections]:
    """The detections of a batch, whatever the config asks for."""
    with _timed(timers, "im_detect_bbox"):
        if cfg.RETINANET.RETINANET_ON:
            boxes, scores, cls, image = retinanet_detections(net, batch)
        else:
            outputs, features = box_outputs(net, batch)
    with _timed(timers, "misc_bbox"):
        if not cfg.RETINANET.RETINANET_ON:
            boxes, scores, cls, image = candidates(outputs)
            keep, boxes, scores = _select(boxes, scores, cls, image)
            cls, image = cls[keep], image[keep]
        counts = torch.bincount(image, minlength=len(batch.sizes)).tolist()

    masks = heatmaps = None
    if cfg.MODEL.MASK_ON:
        with _timed(timers, "im_detect_mask"):
            masks = mask_maps(net, boxes, image, features, cls)
    if cfg.MODEL.KEYPOINTS_ON:
        with _timed(timers, "im_detect_keypoints"):
            heatmaps = keypoint_maps(net, boxes, image, features, left_right)
    parts = [
        tensor.split(counts) if tensor is not None else [None] * len(counts)
        for tensor in (boxes, scores, cls, masks, heatmaps)
    ]
    ready = queue_point(batch.device)
    return [
        Detections(*part, *size, ready)
        for part, size in zip(zip(*parts, strict=True), batch.sizes, strict=True)
    ]


def network_size(height: int, width: int) -> tuple[int, int]:
    """Padded height and width with which an image of this size enters the network when testing."""
    return plain_view().padded_size(height, width)


def box_results_with_nms_and_limit(
    scores: np.ndarray, boxes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, ClassBoxes]:
    """The detections of one image among scored boxes.

    Args:
        scores: (R, C); boxes: (R, 4C), columns 4j to 4j + 3 for class j.

    Returns:
        scores (n,), boxes (n, 4), and `cls_boxes` as `im_detect_all` returns it; ordered by class,
        then by row of the input (with soft-NMS by score).
    """
    every = torch.from_numpy(np.ascontiguousarray(scores, dtype=np.float32))
    tiles = torch.from_numpy(np.ascontiguousarray(boxes, dtype=np.float32))
    tiles = tiles.view(*every.shape, 4)
    row, cls = (every[:, 1:] > cfg.TEST.SCORE_THRESH).nonzero().unbind(1)
    cls = cls + 1
    kept, best = tiles[row, cls], every[row, cls]
    keep, kept, best = _select(kept, best, cls, torch.zeros_like(cls))
    found = Detections(kept, best, cls[keep], None, None, 0, 0)
    cls_boxes, _, _ = class_results(found, every.shape[1])
    return found.scores.numpy(), found.boxes.numpy(), cls_boxes


def keypoint_results(
    cls_boxes: ClassBoxes, pred_heatmaps: np.ndarray, ref_boxes: np.ndarray
) -> ClassKeyps:
    """`cls_keyps`: heat maps (R, K, S, S) of ref_boxes (R, 4) as points, in the order of cls_boxes.

    With KRCNN.NMS_OKS, cls_boxes loses the boxes of the people that are suppressed.
    """
    counts = [len(boxes) for boxes in cls_boxes]
    # Classes without detections, the background's [] among them, have no scores.
    scores = [np.asarray(b, dtype=np.float32).reshape(-1, 5)[:, 4] for b in cls_boxes]
    found = Detections(
        torch.from_numpy(np.ascontiguousarray(ref_boxes, dtype=np.float32)),
        torch.from_numpy(np.concatenate(scores)),
        torch.repeat_interleave(torch.tensor(counts)),
        None,
        torch.from_numpy(np.ascontiguousarray(pred_heatmaps, dtype=np.float32)),
        0,
        0,
    )
    cls_boxes[:], _, cls_keyps = class_results(found, len(counts))
    return cls_keyps


def segm_results(
    cls_boxes: ClassBoxes, masks: np.ndarray, ref_boxes: np.ndarray, im_h: int, im_w: int
) -> ClassSegms:
    """`cls_segms`: masks (R, K, M, M) pasted at ref_boxes (R, 4) and encoded, R in the order of
    cls_boxes."""
    counts = [len(boxes) for boxes in cls_boxes]
    probs = torch.from_numpy(np.ascontiguousarray(masks, dtype=np.float32))
    boxes = torch.from_numpy(np.ascontiguousarray(ref_boxes, dtype=np.float32))
    classes = torch.repeat_interleave(torch.tensor(counts))
    rles = masks_to_rles(own_channel(probs, classes), boxes, im_h, im_w, cfg.MRCNN.THRESH_BINARIZE)
    ends = np.cumsum(counts)
    return [rles[end - n : end] for n, end in zip(counts, ends, strict=True)]


def _check_supported(proposals: Sequence[np.ndarray] | None) -> None:
    """Refuse models that detect nothing, or nothing without proposals."""
    if cfg.MODEL.RPN_ONLY:
        raise UserError(
            "a model with MODEL.RPN_ONLY detects nothing: tools/test_net.py writes its proposals."
        )
    makes_its_own = cfg.MODEL.FASTER_RCNN or cfg.RETINANET.RETINANET_ON
    if not makes_its_own and proposals is None:
        raise UserError(
            "this model has no RPN (MODEL.FASTER_RCNN False) and detects on proposals only: in "
            "Python im_detect_all(..., box_proposals), for a data set tools/test_net.py with "
            "TEST.PROPOSAL_FILES."
        )


def _select(
    boxes: Tensor, scores: Tensor, classes: Tensor, images: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`class_nms_and_limit` as the config asks for it."""
    return class_nms_and_limit(
        boxes,
        scores,
        classes,
        images,
        nms_thresh=cfg.TEST.NMS,
        limit=cfg.TEST.DETECTIONS_PER_IM,
        soft_nms=cfg.TEST.SOFT_NMS,
        bbox_vote=cfg.TEST.BBOX_VOTE,
    )


@contextmanager
def _running(timer: Any):
    timer.tic()
    yield
    timer.toc()


def _timed(timers: Mapping[str, Any] | None, name: str) -> AbstractContextManager:
    return nullcontext() if timers is None else _running(timers[name])
