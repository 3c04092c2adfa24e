"""Whether an exported model finds what the model finds that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import utils.boxes as box_utils
from core.config import cfg
from core.predictor import Predictor, Result

# How far a score and a box may be off for a detection to count as the same.
SCORE_TOLERANCE, SAME_IOU = 0.01, 0.95


@dataclass
class Parity:
    """Comparison over some images. Detections within SCORE_TOLERANCE of TEST.SCORE_THRESH may be
    there or not, and do not count."""

    images: int = 0
    detections: int = 0
    unmatched: int = 0  # by either side
    score: float = 0.0  # largest differences of those that match
    box: float = 0.0  # pixels
    mask: float = 0.0  # share of a mask's pixels
    keypoint: float = 0.0  # pixels

    @property
    def good(self) -> bool:
        """At most one detection in a hundred differs: a tie that rounding decided otherwise."""
        return self.unmatched <= 0.01 * self.detections

    def __str__(self) -> str:
        return (
            f"{self.images} images, {self.detections} detections, {self.unmatched} unmatched; "
            f"largest differences: score {self.score:.2g}, box {self.box:.2g} px, mask "
            f"{self.mask:.2g} of its pixels, keypoint {self.keypoint:.2g} px"
        )


def compare(one: Predictor, other: Predictor, images: Sequence[np.ndarray]) -> Parity:
    """Compare what two Predictors find in images (H, W, 3) uint8 BGR."""
    parity = Parity(images=len(images))
    for a, b in zip(one(images), other(images), strict=True):
        matches = _match(a, b)
        clear = cfg.TEST.SCORE_THRESH + SCORE_TOLERANCE
        sure_a, sure_b = a.scores >= clear, b.scores >= clear
        parity.detections += int(sure_a.sum())
        parity.unmatched += int(sure_a.sum()) - sum(bool(sure_a[i]) for i, _ in matches)
        parity.unmatched += int(sure_b.sum()) - sum(bool(sure_b[j]) for _, j in matches)
        for i, j in matches:
            _widen(parity, a, i, b, j)
    return parity


def _match(a: Result, b: Result) -> list[tuple[int, int]]:
    """Pairs of detections of one class at one place with one score, each used once."""
    overlaps = box_utils.bbox_overlaps(a.boxes, b.boxes)
    overlaps = np.where(a.classes[:, None] == b.classes, overlaps, 0)
    near = np.abs(a.scores[:, None] - b.scores) <= SCORE_TOLERANCE
    overlaps = np.where(near, overlaps, 0)
    pairs = []
    while overlaps.size and overlaps.max() >= SAME_IOU:
        i, j = np.unravel_index(overlaps.argmax(), overlaps.shape)
        pairs.append((int(i), int(j)))
        overlaps[i], overlaps[:, j] = 0, 0
    return pairs


def _widen(parity: Parity, a: Result, i: int, b: Result, j: int) -> None:
    parity.score = max(parity.score, float(abs(a.scores[i] - b.scores[j])))
    parity.box = max(parity.box, float(np.abs(a.boxes[i] - b.boxes[j]).max()))
    if a.rles is not None:
        differ = (a.masks[i] != b.masks[j]).sum() / max(1, a.masks[i].sum())
        parity.mask = max(parity.mask, float(differ))
    if a.keypoints is not None:
        distance = np.abs(a.keypoints[i, :2] - b.keypoints[j, :2]).max()
        parity.keypoint = max(parity.keypoint, float(distance))
