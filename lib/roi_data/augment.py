"""Augmentation of training images beyond flips and TRAIN.SCALES: all of it off by default.

Pixels stay as they are but for their colours: scale and window are draws that the device carries
out when it resizes the image (roi_data.minibatch); ground truth follows them here.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from core.config import cfg
from roi_data.crop import CropWindow, View, X, Y

_LUMA = np.array([0.114, 0.587, 0.299])  # of blue, green, red
# Blue, green, red to luma and two axes of chroma (YIQ): hue turns in their plane.
_TO_YIQ = np.array([_LUMA, [-0.321, -0.274, 0.596], [0.311, -0.523, 0.211]])


@dataclass(frozen=True)
class AugmentOptions:
    """The config's TRAIN.AUGMENT as values that loader processes can be given."""

    scale_jitter: tuple[float, float] = (1.0, 1.0)
    crop_prob: float = 0.0
    crop_min: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    @classmethod
    def from_cfg(cls) -> AugmentOptions:
        values = {key.lower(): value for key, value in cfg.TRAIN.AUGMENT.items()}
        return cls(**{**values, "scale_jitter": tuple(values["scale_jitter"])})

    @property
    def jitters_scale(self) -> bool:
        return self.scale_jitter != (1.0, 1.0)

    @property
    def jitters_colour(self) -> bool:
        return max(self.brightness, self.contrast, self.saturation, self.hue) > 0


def large_scale_jitter(
    scale: float, limits: tuple[float, float], rng: np.random.RandomState
) -> float:
    """The scale of an image times a factor drawn from limits (Ghiasi et al. 2021, "Simple
    Copy-Paste", section 3). What grows beyond its usual size is to be cut to that; what shrinks
    is padded with its batch."""
    return scale * rng.uniform(*limits)


def random_crop(view: View, least: float, rng: np.random.RandomState) -> None:
    """Cut a view to a random window whose sides are `least` to 1 of its own."""
    shares = rng.uniform(least, 1.0, size=2)
    height, width = (max(1, round(n * s)) for n, s in zip(view.out_hw, shares, strict=True))
    cut_around_object(view, (height, width), rng)


def cut_around_object(view: View, size: tuple[int, int], rng: np.random.RandomState) -> None:
    """Cut a view to at most `size` = (height, width) pixels, at a random place that holds the
    centre of an object drawn at random (not a crowd), if there is any."""
    boxes = view.entry["boxes"][~view.entry["is_crowd"]]
    box = boxes[rng.randint(len(boxes))] if len(boxes) else None
    for axis in (X, Y):
        length = view.out_hw[1 - axis]
        extent = min(size[1 - axis], length)
        first, last = 0, length - extent
        if box is not None:
            centre = int((box[axis] + box[axis + 2] + 1) / 2 * view.scale)
            first, last = max(first, centre - extent + 1), min(last, centre)
            first = min(first, last)  # a centre on the last pixel's edge
        start = rng.randint(first, last + 1)
        if extent < length:
            view.cut(CropWindow(axis, start, extent, view.scale), follow_masks=True)


def colour_jitter(image: np.ndarray, options: AugmentOptions, rng: np.random.RandomState) -> None:
    """Change brightness, contrast, saturation and hue of a uint8 BGR image in place.

    Factors are drawn from 1 - v to 1 + v, the hue's turn from -HUE to HUE (1 is a full circle).
    All four are one linear map of the colours, rounded and cut to 0 .. 255 once.
    """
    draws = [
        rng.uniform(max(0.0, 1 - v), 1 + v)
        for v in (options.brightness, options.contrast, options.saturation)
    ]
    turn = rng.uniform(-options.hue, options.hue)
    mean = np.array(cv2.mean(image)[:3])
    image[:] = cv2.transform(image, colour_matrix(*draws, turn, mean))


def colour_matrix(
    brightness: float, contrast: float, saturation: float, turn: float, mean: np.ndarray
) -> np.ndarray:
    """(3, 4) map of BGR colours (and a constant 1): saturation scales the distance from grey, hue
    turns around it, brightness scales, contrast scales the distance from the mean's luma.

    mean: (3,) BGR mean of the image.
    """
    angle = 2 * np.pi * turn
    rotation = np.eye(3)
    rotation[1:, 1:] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    rotation[1:, 1:] *= saturation
    colours = brightness * np.linalg.inv(_TO_YIQ) @ rotation @ _TO_YIQ
    grey = _LUMA @ colours @ mean
    return np.concatenate((contrast * colours, np.full((3, 1), (1 - contrast) * grey)), axis=1)
