"""Pictures of a training for TensorBoard: what the network is shown, what it detects."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as mask_util
from torch import Tensor

import utils.blob as blob_utils
from utils.image import read_image
from utils.segms import Segmentation
from utils.vis import convert_from_cls_format, draw
from utils.vis_layout import lay_out

PICTURES = 4


def draw_batch(
    batch: Mapping[str, Any], pixel_means: np.ndarray, class_names: Sequence[str]
) -> dict[str, np.ndarray]:
    """The first images of a batch of the training loader, as the network gets them.

    Flipped, resized and cropped, with their ground-truth boxes and masks.

    Returns:
        `train/0`, ...: (H, W, 3) uint8 BGR.
    """
    first = {key: parts[0] for key, parts in batch.items()}
    means = torch.as_tensor(pixel_means, dtype=torch.float64).reshape(3)
    blob = blob_utils.images_to_blob(first["data"], first["im_meta"], first["blob_size"], means)
    pictures = {}
    for n, info in enumerate(first["im_info"][:PICTURES]):
        height, width, scale = int(info[0]), int(info[1]), float(info[2])
        pixels = blob[n, :, :height, :width].permute(1, 2, 0) + means
        image = pixels.round().clamp(0, 255).byte().contiguous().numpy()
        shown = torch.nonzero((first["gt_classes"][n] > 0) & ~first["gt_crowd"][n]).flatten()
        boxes = np.ones((len(shown), 5), np.float32)
        boxes[:, :4] = first["gt_boxes"][n, shown].numpy() * scale
        segms = None
        if "gt_poly_coords" in first:
            segms = [_mask(first, n, int(g), scale, (height, width)) for g in shown]
        classes = first["gt_classes"][n, shown].tolist()
        layout = lay_out(image.shape, boxes, classes, segms, class_names, 0.0)
        pictures[f"train/{n}"] = draw(image, layout)
    return pictures


def _mask(
    batch: Mapping[str, Tensor], n: int, g: int, scale: float, size: tuple[int, int]
) -> Segmentation:
    """The mask of object g of image n at the network's scale."""
    index = int(batch["gt_bitmask_index"][n, g])
    if index >= 0:
        mask = batch["gt_bitmasks"][index].numpy()
        out = np.zeros(size, np.uint8, order="F")
        scaled = cv2.resize(mask, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
        h, w = min(size[0], scaled.shape[0]), min(size[1], scaled.shape[1])
        out[:h, :w] = scaled[:h, :w]
        return mask_util.encode(out)
    place = n * batch["gt_classes"].shape[1] + g
    begin, end = batch["gt_object_offsets"][place : place + 2].tolist()
    points = batch["gt_poly_offsets"][begin : end + 1].tolist()
    coords = batch["gt_poly_coords"].numpy() * scale
    return [coords[a:b].flatten() for a, b in zip(points[:-1], points[1:], strict=True)]


def draw_detections(
    detections: Path, images: Sequence[str], class_names: Sequence[str], thresh: float = 0.5
) -> dict[str, np.ndarray]:
    """The first images of a detections file (core.test_engine) with what scores `thresh`.

    Args:
        images: the files of the data set, in its order.
    Returns:
        `detections/0`, ...: (H, W, 3) uint8 BGR.
    """
    with detections.open("rb") as file:
        found = pickle.load(file)
    pictures = {}
    for n, path in enumerate(images[:PICTURES]):
        boxes, segms, keypoints = (
            [of_class[n] for of_class in found[key]]
            for key in ("all_boxes", "all_segms", "all_keyps")
        )
        boxes, segms, keypoints, classes = convert_from_cls_format(
            boxes,
            segms if any(len(s) for s in segms) else None,
            keypoints if any(len(k) for k in keypoints) else None,
        )
        image = read_image(path)
        layout = lay_out(
            image.shape, boxes, classes, segms, class_names, thresh, keypoints=keypoints
        )
        pictures[f"detections/{n}"] = draw(image, layout)
    return pictures
