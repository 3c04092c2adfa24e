"""Keypoint heat maps to points, and suppression of people by their keypoints."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# COCO's per-keypoint spread, in units of the square root of a person's area.
PERSON_SIGMAS = (
    np.array([26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]) / 1000
)


def heatmaps_to_keypoints(maps: Tensor, boxes: Tensor, min_size: int = 0) -> Tensor:
    """The most likely point of each heat map, at the resolution of the image.

    Args:
        maps: (R, K, S, S) float32 logits.
        boxes: (R, 4) float32, image pixels, on the same device.
        min_size: KRCNN.INFERENCE_MIN_SIZE: maps are resized to at least this many pixels.

    Returns:
        (R, 4, K) float32: x, y in image pixels, logit, probability (softmax over the resized map).
    """
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    shape = size.ceil().clamp(min=max(min_size, 1))
    points = []
    for heat, (width, height) in zip(maps.float(), shape.int().tolist(), strict=True):
        # Bicubic with a = -0.75 and half-pixel centres, as cv2.resize's INTER_CUBIC.
        resized = F.interpolate(heat[None], (height, width), mode="bicubic")[0].flatten(1)
        logit, index = resized.max(dim=1)
        prob = 1.0 / torch.exp(resized - logit[:, None]).sum(dim=1)
        x, y = index % width, index.div(width, rounding_mode="floor")
        points.append(torch.stack([x.float(), y.float(), logit, prob]))
    if not points:
        return maps.new_zeros(0, 4, maps.shape[1])
    out = torch.stack(points)
    out[:, :2] = (out[:, :2] + 0.5) * (size / shape).unsqueeze(2) + boxes[:, :2].unsqueeze(2)
    return out


def flip_heatmaps(maps: Tensor, left_right: list[tuple[int, int]]) -> Tensor:
    """Heat maps (..., K, H, W) of the mirrored image: columns reversed, pairs of points swapped."""
    order = list(range(maps.shape[-3]))
    for left, right in left_right:
        order[left], order[right] = right, left
    return maps[..., order, :, :].flip(-1)


def compute_oks(
    keypoints: np.ndarray, box: np.ndarray, others: np.ndarray, sigmas: np.ndarray = PERSON_SIGMAS
) -> np.ndarray:
    """Object keypoint similarity of one person with others.

    Args:
        keypoints: (>= 2, K), x and y in the first rows; box: (4,) of that person.
        others: (R, >= 2, K); sigmas: (K,) COCO's spread of each point.

    Returns:
        (R,) in [0, 1]; every point counts, whatever its score.
    """
    width, height = np.maximum(box[2:] - box[:2] + 1, 0)
    squared = ((others[:, :2] - keypoints[:2]) ** 2).sum(axis=1)
    spread = (2 * sigmas) ** 2 * (width * height + np.spacing(1)) * 2
    return np.exp(-squared / spread).mean(axis=1)


def nms_oks(
    keypoints: np.ndarray, boxes: np.ndarray, thresh: float, sigmas: np.ndarray = PERSON_SIGMAS
) -> list[int]:
    """Greedy suppression of people (R, 4, K) by mean keypoint logit; indices, best first.

    A person whose similarity with a better one exceeds `thresh` goes. boxes: (R, >= 4).
    """
    order = np.argsort(-keypoints[:, 2].mean(axis=1), kind="stable")
    keep = []
    while len(order):
        best, rest = order[0], order[1:]
        keep.append(int(best))
        similarity = compute_oks(keypoints[best], boxes[best, :4], keypoints[rest], sigmas)
        order = rest[similarity <= thresh]
    return keep
