"""From images to detections: the network, class-wise NMS, the limit per image, masks.

Everything works on batches and on the model's device; `im_detect_all` is a batch of one. Numbers
leave the device at the very end (`class_results`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import utils.blob as blob_utils
import utils.boxes as box_utils
import utils.heatmaps as heatmap_utils
from core.config import cfg
from core.errors import UserError
from core.suppression import class_nms_and_limit
from ops import masks_to_rles

ClassBoxes = list[np.ndarray | list]
ClassSegms = list[list[dict[str, Any]]]
ClassKeyps = list[list[np.ndarray]]

OKS_THRESH = 0.3  # KRCNN.NMS_OKS: people more alike than this are one

PRECOMPUTED = (
    "testing with precomputed proposals is not supported: leave {} at None and set "
    "MODEL.FASTER_RCNN to True."
)


@dataclass
class Detections:
    """What was found in one image; tensors on the model's device, ordered by class."""

    boxes: Tensor  # (n, 4) float32, pixels of the image as given
    scores: Tensor  # (n,) float32
    classes: Tensor  # (n,) int64, 1 .. NUM_CLASSES - 1
    masks: Tensor | None  # (n, M, M) float32 probabilities of the detection's own class
    heatmaps: Tensor | None  # (n, K, S, S) float32 keypoint logits
    height: int
    width: int


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
        box_proposals: must be None: the model makes its own proposals.
        timers: objects with `tic()` and `toc()` by name (`im_detect_bbox`, `misc_bbox`,
            `im_detect_mask`, `misc_mask`, `im_detect_keypoints`).

    Returns:
        `cls_boxes`: per class (n, 5) float32 `[x1, y1, x2, y2, score]`, `[]` for the background;
        `cls_segms`: per class the n COCO RLEs, None for a model without masks; `cls_keyps`:
        per class n arrays (4, K) `x, y, logit, probability`, None for a model without keypoints.
    """
    if box_proposals is not None:
        raise UserError(PRECOMPUTED.format("box_proposals"))
    (detections,) = detect_batch(model, [im], timers)
    with _timed(timers, "misc_mask"):
        return class_results(detections, cfg.MODEL.NUM_CLASSES)


@torch.inference_mode()
def detect_batch(
    model: nn.Module,
    images: Sequence[np.ndarray],
    timers: Mapping[str, Any] | None = None,
) -> list[Detections]:
    """Detections of several images in one forward pass; what an image gives does not depend on the
    others.

    Args:
        model: `Generalized_RCNN` in eval mode, bare or inside a DataParallel.
        images: (H, W, 3) uint8 BGR, of equal `network_size`.
        timers: as in `im_detect_all`.

    Raises:
        ValueError: the images need different amounts of padding.
        UserError: the config asks for something that testing does not do.
    """
    _check_supported()
    net = getattr(model, "module", model)
    sizes = [tuple(im.shape[:2]) for im in images]
    if len({network_size(h, w) for h, w in sizes}) > 1:
        raise ValueError(f"images of one batch must have equal padded sizes, not those of {sizes}")

    with _timed(timers, "im_detect_bbox"):
        out, scales = _forward(net, images, cfg.TEST.SCALE, cfg.TEST.MAX_SIZE)
    rois, scores = out["rois"].float(), out["cls_score"].float()
    with _timed(timers, "misc_bbox"):
        # Decode only what can become a detection: a few hundred of 80 x 1000 boxes an image.
        row, cls = (scores[:, 1:] > cfg.TEST.SCORE_THRESH).nonzero().unbind(1)
        cls = cls + 1
        image = rois[row, 0].long()
        size = torch.tensor(sizes, device=rois.device)
        deltas = _class_deltas(out["bbox_pred"].float(), row, cls)
        boxes = _decode(rois[row], deltas, scales, size)
        best = scores[row, cls]
        keep, boxes, best = _select(boxes, best, cls, image)
        cls, image = cls[keep], image[keep]
        counts = torch.bincount(image, minlength=len(images)).tolist()

    masks = None
    if cfg.MODEL.MASK_ON:
        with _timed(timers, "im_detect_mask"):
            masks = _class_masks(net, boxes, image, cls, scales, out["blob_conv"])
    heatmaps = None
    if cfg.MODEL.KEYPOINTS_ON:
        with _timed(timers, "im_detect_keypoints"):
            heatmaps = _heatmaps(net, boxes, image, scales, out["blob_conv"])
    parts = [
        tensor.split(counts) if tensor is not None else [None] * len(counts)
        for tensor in (boxes, best, cls, masks, heatmaps)
    ]
    return [
        Detections(*part, *hw) for part, hw in zip(zip(*parts, strict=True), sizes, strict=True)
    ]


@torch.inference_mode()
def class_results(
    detections: Detections, num_classes: int
) -> tuple[ClassBoxes, ClassSegms | None, ClassKeyps | None]:
    """`cls_boxes, cls_segms, cls_keyps` of one image, as `im_detect_all` returns them."""
    d = detections
    dets = torch.cat([d.boxes, d.scores[:, None]], dim=1).cpu().numpy()
    classes = d.classes.cpu().numpy()
    keep = np.arange(len(dets))
    points = None
    if d.heatmaps is not None:
        points = heatmap_utils.heatmaps_to_keypoints(
            d.heatmaps, d.boxes, cfg.KRCNN.INFERENCE_MIN_SIZE
        )
        points = points.cpu().numpy()
        if cfg.KRCNN.NMS_OKS and len(dets):
            keep = np.array(heatmap_utils.nms_oks(points, dets, OKS_THRESH))
            keep = keep[np.argsort(classes[keep], kind="stable")]
    dets, counts = dets[keep], np.bincount(classes[keep], minlength=num_classes)
    ends = counts.cumsum()
    spans = [slice(end - n, end) for n, end in zip(counts, ends, strict=True)]
    cls_boxes: ClassBoxes = [dets[span] for span in spans]
    cls_boxes[0] = []
    cls_segms = cls_keyps = None
    if d.masks is not None:
        kept = torch.from_numpy(keep).to(d.masks.device)
        rles = masks_to_rles(
            d.masks[kept], d.boxes[kept], d.height, d.width, cfg.MRCNN.THRESH_BINARIZE
        )
        cls_segms = [rles[span] for span in spans]
    if points is not None:
        cls_keyps = [list(points[keep][span]) for span in spans]
    return cls_boxes, cls_segms, cls_keyps


def network_size(height: int, width: int) -> tuple[int, int]:
    """Padded height and width with which an image of this size enters the network when testing."""
    scale = blob_utils.get_target_scale(height, width, cfg.TEST.SCALE, cfg.TEST.MAX_SIZE)
    size = blob_utils.scaled_size(height, width, scale)
    return blob_utils.padded_size([size], blob_utils.coarsest_stride())


@torch.inference_mode()
def im_detect_bbox(
    model: nn.Module,
    im: np.ndarray,
    target_scale: int,
    target_max_size: int,
    boxes: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, float, Any]:
    """Scores and boxes of every proposal, before any selection.

    Args:
        im: (H, W, 3) uint8 BGR.
        target_scale, target_max_size: short side and longest side in network pixels.
        boxes: must be None: the model makes its own proposals.

    Returns:
        scores (R, C) float32, boxes (R, 4C) float32 in image pixels, the image's scale, the
        backbone's feature maps.
    """
    if boxes is not None:
        raise UserError(PRECOMPUTED.format("boxes"))
    _check_supported()
    net = getattr(model, "module", model)
    out, scales = _forward(net, [im], target_scale, target_max_size)
    rois, scores = out["rois"].float(), out["cls_score"].float()
    size = torch.tensor([im.shape[:2]], device=rois.device)
    deltas = out["bbox_pred"].float()
    if cfg.MODEL.CLS_AGNOSTIC_BBOX_REG or not cfg.TEST.BBOX_REG:
        deltas = deltas[:, -4:].repeat(1, scores.shape[1])
    decoded = _decode(rois, deltas, scales, size)
    return scores.cpu().numpy(), decoded.cpu().numpy(), float(scales[0]), out["blob_conv"]


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
    _check_supported()
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


@torch.inference_mode()
def im_detect_mask(
    model: nn.Module, im_scale: float, boxes: np.ndarray, blob_conv: Any
) -> np.ndarray:
    """Mask probabilities of boxes in one image.

    Args:
        im_scale: network pixels per image pixel.
        boxes: (R, 4) in image pixels.
        blob_conv: feature maps from `im_detect_bbox`.

    Returns:
        (R, K, M, M) float32; K is the number of classes, or 1 with class-agnostic masks.
    """
    net = getattr(model, "module", model)
    given, image, scales = _one_image(boxes, im_scale, blob_conv)
    return _mask_probabilities(net, given, image, scales, blob_conv).cpu().numpy()


@torch.inference_mode()
def im_detect_keypoints(
    model: nn.Module, im_scale: float, boxes: np.ndarray, blob_conv: Any
) -> np.ndarray:
    """Heat-map logits (R, K, S, S) float32 of boxes (R, 4); arguments as for `im_detect_mask`."""
    net = getattr(model, "module", model)
    given, image, scales = _one_image(boxes, im_scale, blob_conv)
    return _heatmaps(net, given, image, scales, blob_conv).cpu().numpy()


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
    rles = masks_to_rles(_own_channel(probs, classes), boxes, im_h, im_w, cfg.MRCNN.THRESH_BINARIZE)
    ends = np.cumsum(counts)
    return [rles[end - n : end] for n, end in zip(counts, ends, strict=True)]


def _check_supported() -> None:
    """Refuse what a config can ask for and this version does not do, rather than ignore it."""
    asked = {
        "TEST.BBOX_AUG.ENABLED": cfg.TEST.BBOX_AUG.ENABLED,
        "TEST.MASK_AUG.ENABLED": cfg.TEST.MASK_AUG.ENABLED,
        "TEST.KPS_AUG.ENABLED": cfg.TEST.KPS_AUG.ENABLED,
    }
    for key, on in asked.items():
        if on:
            raise UserError(f"{key} is not supported by testing yet: set it to False.")
    if not cfg.MODEL.FASTER_RCNN:
        raise UserError(
            "testing needs a model that makes its own proposals: set MODEL.FASTER_RCNN to True."
        )


def _forward(
    net: nn.Module, images: Sequence[np.ndarray], target_size: int, max_size: int
) -> tuple[dict[str, Any], Tensor]:
    """The network's outputs, and the images' scales (N,) float64 on its device."""
    device = next(net.parameters()).device
    data, scales, im_info = blob_utils.prep_images(images, target_size, max_size, device)
    return net(data, im_info), torch.tensor(scales, dtype=torch.float64, device=device)


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


def _class_deltas(bbox_pred: Tensor, row: Tensor, cls: Tensor) -> Tensor:
    """(K, 4) deltas of candidate (row, cls) from (R, 4C), or from the last of two slots."""
    slots = bbox_pred.view(len(bbox_pred), bbox_pred.shape[1] // 4, 4)
    return slots[row, -1] if cfg.MODEL.CLS_AGNOSTIC_BBOX_REG else slots[row, cls]


def _decode(rois: Tensor, deltas: Tensor, scales: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (R, 4T) in image pixels from rois (R, 5) in network pixels and deltas (R, 4T).

    scales (N,) and sizes (N, 2) `[height, width]` are the images'. Without TEST.BBOX_REG the
    proposals themselves are the boxes.
    """
    image = rois[:, 0].long()
    boxes = (rois[:, 1:].double() / scales[image, None]).float()
    if not cfg.TEST.BBOX_REG:
        return boxes.repeat(1, deltas.shape[1] // 4)
    decoded = box_utils.bbox_transform(
        boxes, deltas, cfg.MODEL.BBOX_REG_WEIGHTS, cfg.BBOX_XFORM_CLIP
    )
    limit = (sizes - 1).flip(1).repeat(1, deltas.shape[1] // 2).to(decoded.dtype)
    return torch.minimum(decoded.clamp(min=0), limit[image])


def _one_image(boxes: np.ndarray, im_scale: float, blob_conv: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (R, 4), image indices (R,) and scales (1,) of a batch of one, on the maps' device."""
    device = (blob_conv if isinstance(blob_conv, Tensor) else blob_conv[0]).device
    given = torch.as_tensor(boxes, dtype=torch.float32, device=device)
    image = torch.zeros(len(given), dtype=torch.int64, device=device)
    return given, image, torch.tensor([im_scale], dtype=torch.float64, device=device)


def _as_rois(boxes: Tensor, image: Tensor, scales: Tensor) -> Tensor:
    """RoIs (n, 5) in network pixels of boxes (n, 4) in pixels of images (n,)."""
    scaled = (boxes.double() * scales[image, None]).float()
    return torch.cat([image[:, None].to(scaled), scaled], dim=1)


def _heatmaps(
    net: nn.Module, boxes: Tensor, image: Tensor, scales: Tensor, blob_conv: Any
) -> Tensor:
    """(n, K, S, S) float32 keypoint logits of boxes (n, 4) in pixels of images (n,)."""
    if not len(boxes):
        return boxes.new_zeros(0, cfg.KRCNN.NUM_KEYPOINTS, *[cfg.KRCNN.HEATMAP_SIZE] * 2)
    return net.keypoint_net(blob_conv, {"keypoint_rois": _as_rois(boxes, image, scales)}).float()


def _mask_probabilities(
    net: nn.Module, boxes: Tensor, image: Tensor, scales: Tensor, blob_conv: Any
) -> Tensor:
    """(n, K, M, M) float32 mask probabilities of boxes (n, 4) in pixels of images (n,)."""
    if not len(boxes):
        channels = cfg.MODEL.NUM_CLASSES if cfg.MRCNN.CLS_SPECIFIC_MASK else 1
        return boxes.new_zeros(0, channels, cfg.MRCNN.RESOLUTION, cfg.MRCNN.RESOLUTION)
    return net.mask_net(blob_conv, {"mask_rois": _as_rois(boxes, image, scales)}).float()


def _class_masks(
    net: nn.Module, boxes: Tensor, image: Tensor, cls: Tensor, scales: Tensor, blob_conv: Any
) -> Tensor:
    return _own_channel(_mask_probabilities(net, boxes, image, scales, blob_conv), cls)


def _own_channel(masks: Tensor, classes: Tensor) -> Tensor:
    """(n, M, M): each detection's map of its own class out of (n, K, M, M)."""
    if masks.shape[1] == 1:
        return masks[:, 0]
    return masks[torch.arange(len(masks), device=masks.device), classes]


@contextmanager
def _running(timer: Any):
    timer.tic()
    yield
    timer.toc()


def _timed(timers: Mapping[str, Any] | None, name: str) -> AbstractContextManager:
    return nullcontext() if timers is None else _running(timers[name])
