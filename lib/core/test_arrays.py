"""The network's stages on one image, as this family's scripts call them: numpy in, numpy out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.config import cfg
from core.errors import UserError
from core.test_augment import (
    box_outputs,
    boxes_in_views,
    combine,
    keypoint_maps,
    mask_maps,
    person_pairs,
)
from core.test_forward import (
    Features,
    ImageBatch,
    View,
    as_rois,
    forward,
    heatmaps,
    mask_probabilities,
)
from utils.heatmaps import flip_heatmaps


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
        boxes: (R, 4) proposals in image pixels; None: the model makes its own.

    Returns:
        scores (R, C) float32, boxes (R, 4C) float32 in image pixels, the image's scale, the
        backbone's feature maps.
    """
    return _bbox_of_view(model, im, View(target_scale, target_max_size), boxes)


@torch.inference_mode()
def im_detect_bbox_aug(
    model: nn.Module, im: np.ndarray, box_proposals: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, float, Any]:
    """Scores and boxes of all views that TEST.BBOX_AUG asks for, before any selection.

    Returns:
        scores (R, C) and boxes (R, 4C) float32 in image pixels, plain view last; the scale and
        the feature maps of the plain view.
    """
    net, images = _one_image(model, im, box_proposals)
    outputs, features = box_outputs(net, images)
    scores = combine([out.scores for out in outputs], cfg.TEST.BBOX_AUG.SCORE_HEUR)
    boxes = combine([out.all_boxes() for out in outputs], cfg.TEST.BBOX_AUG.COORD_HEUR)
    return *_on_host(scores, boxes), float(features.scales[0]), features.blob_conv


def im_detect_bbox_hflip(
    model: nn.Module,
    im: np.ndarray,
    target_scale: int,
    target_max_size: int,
    box_proposals: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Scores (R, C), boxes (R, 4C) in pixels of the image as given, and scale of its mirror
    image."""
    view = View(target_scale, target_max_size, flip=True)
    return _bbox_of_view(model, im, view, box_proposals)[:3]


def im_detect_bbox_scale(
    model: nn.Module,
    im: np.ndarray,
    target_scale: int,
    target_max_size: int,
    box_proposals: np.ndarray | None = None,
    hflip: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (R, C) and boxes (R, 4C) at another scale, mirrored if asked for."""
    view = View(target_scale, target_max_size, flip=hflip)
    return _bbox_of_view(model, im, view, box_proposals)[:2]


def im_detect_bbox_aspect_ratio(
    model: nn.Module,
    im: np.ndarray,
    aspect_ratio: float,
    box_proposals: np.ndarray | None = None,
    hflip: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (R, C) and boxes (R, 4C) of the image stretched in width, at TEST.SCALE."""
    view = View(cfg.TEST.SCALE, cfg.TEST.MAX_SIZE, aspect_ratio, hflip)
    return _bbox_of_view(model, im, view, box_proposals)[:2]


@torch.inference_mode()
def im_conv_body_only(
    model: nn.Module, im: np.ndarray, target_scale: int, target_max_size: int
) -> tuple[Any, float]:
    """Feature maps and scale of an image."""
    net, images = _one_image(model, im)
    (shown,) = images.show([View(target_scale, target_max_size)])
    return net.convbody_net(shown.data), float(shown.scales[0])


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
    return mask_probabilities(net, blob_conv, _rois(boxes, im_scale, blob_conv)).cpu().numpy()


@torch.inference_mode()
def im_detect_keypoints(
    model: nn.Module, im_scale: float, boxes: np.ndarray, blob_conv: Any
) -> np.ndarray:
    """Heat-map logits (R, K, S, S) float32 of boxes (R, 4); arguments as for `im_detect_mask`."""
    net = getattr(model, "module", model)
    return heatmaps(net, blob_conv, _rois(boxes, im_scale, blob_conv)).cpu().numpy()


@torch.inference_mode()
def im_detect_mask_aug(
    model: nn.Module, im: np.ndarray, boxes: np.ndarray, im_scale: float, blob_conv: Any
) -> np.ndarray:
    """(R, K, M, M) mask probabilities of boxes (R, 4), combined as TEST.MASK_AUG says.

    im_scale, blob_conv: of the plain view, as im_detect_bbox_aug returns them.
    """
    return mask_maps(*_boxes_and_maps(model, im, boxes, im_scale, blob_conv)).cpu().numpy()


def im_detect_mask_hflip(
    model: nn.Module, im: np.ndarray, target_scale: int, target_max_size: int, boxes: np.ndarray
) -> np.ndarray:
    """(R, K, M, M) mask probabilities of boxes (R, 4) from the mirror image, mirrored back."""
    return _masks_of_view(model, im, View(target_scale, target_max_size, flip=True), boxes)


def im_detect_mask_scale(
    model: nn.Module,
    im: np.ndarray,
    target_scale: int,
    target_max_size: int,
    boxes: np.ndarray,
    hflip: bool = False,
) -> np.ndarray:
    """(R, K, M, M) mask probabilities at another scale, by way of the mirror image if asked."""
    return _masks_of_view(model, im, View(target_scale, target_max_size, flip=hflip), boxes)


def im_detect_mask_aspect_ratio(
    model: nn.Module, im: np.ndarray, aspect_ratio: float, boxes: np.ndarray, hflip: bool = False
) -> np.ndarray:
    """(R, K, M, M) mask probabilities from the image stretched in width, at TEST.SCALE."""
    view = View(cfg.TEST.SCALE, cfg.TEST.MAX_SIZE, aspect_ratio, hflip)
    return _masks_of_view(model, im, view, boxes)


@torch.inference_mode()
def im_detect_keypoints_aug(
    model: nn.Module, im: np.ndarray, boxes: np.ndarray, im_scale: float, blob_conv: Any
) -> np.ndarray:
    """(R, K, S, S) keypoint logits of boxes (R, 4), combined as TEST.KPS_AUG says; arguments as
    for im_detect_mask_aug."""
    return keypoint_maps(*_boxes_and_maps(model, im, boxes, im_scale, blob_conv)).cpu().numpy()


def im_detect_keypoints_hflip(
    model: nn.Module, im: np.ndarray, target_scale: int, target_max_size: int, boxes: np.ndarray
) -> np.ndarray:
    """(R, K, S, S) keypoint logits of boxes (R, 4) from the mirror image, mirrored back."""
    view = View(target_scale, target_max_size, flip=True)
    return _keypoints_of_view(model, im, view, boxes)


def im_detect_keypoints_scale(
    model: nn.Module,
    im: np.ndarray,
    target_scale: int,
    target_max_size: int,
    boxes: np.ndarray,
    hflip: bool = False,
) -> np.ndarray:
    """(R, K, S, S) keypoint logits at another scale, by way of the mirror image if asked."""
    view = View(target_scale, target_max_size, flip=hflip)
    return _keypoints_of_view(model, im, view, boxes)


def im_detect_keypoints_aspect_ratio(
    model: nn.Module, im: np.ndarray, aspect_ratio: float, boxes: np.ndarray, hflip: bool = False
) -> np.ndarray:
    """(R, K, S, S) keypoint logits from the image stretched in width, at TEST.SCALE."""
    view = View(cfg.TEST.SCALE, cfg.TEST.MAX_SIZE, aspect_ratio, hflip)
    return _keypoints_of_view(model, im, view, boxes)


def _one_image(
    model: nn.Module, im: np.ndarray, box_proposals: np.ndarray | None = None
) -> tuple[nn.Module, ImageBatch]:
    net = getattr(model, "module", model)
    proposals = None if box_proposals is None else [box_proposals]
    return net, ImageBatch([im], next(net.parameters()).device, proposals=proposals)


@torch.inference_mode()
def _bbox_of_view(
    model: nn.Module, im: np.ndarray, view: View, box_proposals: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, float, Any]:
    """Scores (R, C), boxes (R, 4C) in image pixels, scale, and feature maps of one view."""
    if cfg.RETINANET.RETINANET_ON:
        raise UserError("RetinaNet has no proposals to score: call im_detect_all instead.")
    net, images = _one_image(model, im, box_proposals)
    out, features = forward(net, images, view)
    scale = float(features.scales[0])
    return *_on_host(out.scores, out.all_boxes()), scale, features.blob_conv


@torch.inference_mode()
def _masks_of_view(model: nn.Module, im: np.ndarray, view: View, boxes: np.ndarray) -> np.ndarray:
    maps = mask_probabilities(*_boxes_in_view(model, im, view, boxes))
    return (maps.flip(-1) if view.flip else maps).cpu().numpy()


@torch.inference_mode()
def _keypoints_of_view(
    model: nn.Module, im: np.ndarray, view: View, boxes: np.ndarray
) -> np.ndarray:
    maps = heatmaps(*_boxes_in_view(model, im, view, boxes))
    return (flip_heatmaps(maps, person_pairs()) if view.flip else maps).cpu().numpy()


def _boxes_in_view(
    model: nn.Module, im: np.ndarray, view: View, boxes: np.ndarray
) -> tuple[nn.Module, Any, Tensor]:
    """The network, feature maps of the view, and the boxes (R, 4) of the image as its RoIs."""
    net, images = _one_image(model, im)
    given, image = _boxes(boxes, images.device)
    _, _, blob_conv, rois = next(boxes_in_views(net, given, image, images, [view]))
    return net, blob_conv, rois


def _boxes_and_maps(
    model: nn.Module, im: np.ndarray, boxes: np.ndarray, im_scale: float, blob_conv: Any
) -> tuple[nn.Module, Tensor, Tensor, Features]:
    """The network, boxes (R, 4), their image indices (R,), and the plain view's feature maps."""
    net, images = _one_image(model, im)
    scales = torch.tensor([im_scale], dtype=torch.float64, device=images.device)
    return net, *_boxes(boxes, images.device), Features(images, blob_conv, scales)


def _rois(boxes: np.ndarray, im_scale: float, blob_conv: Any) -> Tensor:
    """RoIs (R, 5) of boxes (R, 4) of a batch of one, on the maps' device."""
    device = (blob_conv if isinstance(blob_conv, Tensor) else blob_conv[0]).device
    scales = torch.tensor([im_scale], dtype=torch.float64, device=device)
    return as_rois(*_boxes(boxes, device), scales)


def _boxes(boxes: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Boxes (R, 4) of one image and their image indices (R,) on the device."""
    given = torch.as_tensor(boxes, dtype=torch.float32, device=device)
    return given, torch.zeros(len(given), dtype=torch.int64, device=device)


def _on_host(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.cpu().numpy() for tensor in tensors]
