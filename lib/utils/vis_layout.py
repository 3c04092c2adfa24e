"""What a picture of detections shows and where: the same for every kind of picture.

Colours depend on the class alone, line widths and text on the size of the picture, and a picture of
a tiny image is enlarged until text can be read in it.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from PIL import ImageFont

from utils.segms import Segmentation, is_rle, polys_to_mask, rle_to_mask
from utils.skeleton import PERSON_SKELETON, Colour, Skeleton

MASK_ALPHA = 0.4
LABEL_ALPHA = 0.85
# A picture is at least this large, unless that makes a narrow one too long.
MIN_LONG_SIDE, MIN_HEIGHT, MIN_WIDTH = 600, 60, 160
MAX_ENLARGED_SIDE = 8000
FONT_FILE = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"


@dataclass(frozen=True)
class Label:
    """Text in a filled rectangle; x, y is its upper left corner in picture pixels."""

    text: str
    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Label) -> float:
        """Area covered by both."""
        w = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        h = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(w, 0.0) * max(h, 0.0)


@dataclass(frozen=True)
class Pose:
    """The keypoints of one detection that are sure enough, in picture pixels."""

    points: list[tuple[np.ndarray, Colour]]  # centres (2,)
    lines: list[tuple[np.ndarray, np.ndarray, Colour]]  # ends (2,)
    radius: int  # of the points
    line_width: int


@dataclass(frozen=True)
class Instance:
    """One detection in picture pixels."""

    colour: Colour  # RGB
    box: tuple[float, float, float, float]  # outer edges: left, top, right, bottom
    contours: list[np.ndarray]  # each (n, 2) float, outlines and holes together
    label: Label | None  # None where no place was left that covers no other label
    pose: Pose | None = None


@dataclass(frozen=True)
class Layout:
    """A picture's size and everything to draw on it, in the order of drawing."""

    width: int
    height: int
    line_width: int
    font_size: int
    instances: list[Instance]


def class_colour(index: int) -> Colour:
    """RGB colour of a class: the same in every picture and every run."""
    hue = (index * 0.618034) % 1.0
    saturation, value = ((0.9, 1.0), (0.65, 1.0), (0.9, 0.8))[index % 3]
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))


def text_colour(background: Colour) -> Colour:
    """Black or white, whichever is easier to read on the background."""
    luminance = 0.299 * background[0] + 0.587 * background[1] + 0.114 * background[2]
    return (0, 0, 0) if luminance > 130 else (255, 255, 255)


def lay_out(
    im_shape: Sequence[int],
    boxes: np.ndarray,
    classes: Sequence[int],
    segms: Sequence[Segmentation] | None,
    class_names: Sequence[str],
    thresh: float,
    *,
    keypoints: Sequence[np.ndarray] | None = None,
    kp_thresh: float = 2.0,
    skeleton: Skeleton = PERSON_SKELETON,
) -> Layout:
    """Decide what a picture shows and where.

    Args:
        im_shape: (height, width, ...) of the image.
        boxes: (n, 5) `[x1, y1, x2, y2, score]` in image pixels, both ends inside.
        classes: n indices into class_names; segms: n RLEs or lists of polygons, or None.
        thresh: detections that score less are left out.
        keypoints: n arrays (4, K) `x, y, logit, probability`, or None.
        kp_thresh: points whose logit is not above it are left out, and the lines that end there.
        skeleton: which points are joined.
    """
    height, width = im_shape[:2]
    longer = max(height, width)
    scale = max(MIN_LONG_SIDE / longer, MIN_HEIGHT / height, MIN_WIDTH / width)
    scale = max(1.0, min(scale, MAX_ENLARGED_SIDE / longer))
    height, width = round(height * scale), round(width * scale)
    size = (height * width) ** 0.5
    font_size = min(max(13, round(0.021 * size)), max(8, height // 4))

    shown = [i for i in range(len(boxes)) if boxes[i, 4] >= thresh]
    outer = (boxes[:, :4] + [0, 0, 1, 1]) * scale
    labels: dict[int, Label | None] = {}
    for i in sorted(shown, key=lambda i: -boxes[i, 4]):
        name, score = class_names[classes[i]], f"{boxes[i, 4]:.2f}"
        taken = [label for label in labels.values() if label]
        texts = (f"{name} {score}", name)
        others = outer[[k for k in shown if k != i]]
        labels[i] = _place(texts, outer[i], others, taken, (width, height), font_size)
    # Large ones first, so that nothing is hidden behind a larger object.
    area = (outer[:, 2] - outer[:, 0]) * (outer[:, 3] - outer[:, 1])
    line_width = max(1, round(0.003 * size))
    instances = [
        Instance(
            class_colour(int(classes[i])),
            tuple(float(v) for v in outer[i]),
            [] if segms is None else contours(segms[i], im_shape, scale),
            labels[i],
            None
            if keypoints is None
            else _pose(keypoints[i], kp_thresh, skeleton, scale, line_width, area[i]),
        )
        for i in sorted(shown, key=lambda i: -area[i])
    ]
    return Layout(width, height, line_width, font_size, instances)


def resized(im: np.ndarray, layout: Layout) -> np.ndarray:
    """A copy of the image at the picture's size."""
    if im.shape[:2] == (layout.height, layout.width):
        return im.copy()
    return cv2.resize(im, (layout.width, layout.height), interpolation=cv2.INTER_CUBIC)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONT_FILE), size)


def _place(
    texts: Sequence[str],
    box: np.ndarray,
    others: np.ndarray,
    taken: Sequence[Label],
    picture: tuple[int, int],
    font_size: int,
) -> Label | None:
    """A place at the box for the first of the texts that fits without covering another label.

    Of several places the one that hides the least of the other boxes (n, 4) is taken, and the
    usual one, above the upper left corner, if they are nearly equal.
    """
    width, height = picture
    left, top, right, bottom = box
    h = round(font_size * 1.3)
    rows = np.arange(top, max(bottom - h, top) + 1, h)[:8]
    for text in texts:
        w = round(font(font_size).getlength(text) + 0.5 * font_size)
        if w > width or h > height:
            continue
        x = np.r_[left, np.full(len(rows), left), right - w, left, right - w]
        y = np.r_[top - h, rows, top - h, bottom, bottom]
        x, y = np.clip(x, 0, width - w), np.clip(y, 0, height - h)
        hidden = [_hidden_share(place, w, h, others) for place in zip(x, y, strict=True)]
        for i in np.argsort(np.array(hidden) + 0.05 * np.arange(len(x)), kind="stable"):
            label = Label(text, float(x[i]), float(y[i]), float(w), float(h))
            if not any(label.overlap(other) for other in taken):
                return label
    return None


def _hidden_share(corner: tuple[float, float], w: float, h: float, boxes: np.ndarray) -> float:
    """How many boxes' worth of boxes (n, 4) a label of size (w, h) at this corner hides."""
    start = np.maximum(boxes[:, :2], corner)
    end = np.minimum(boxes[:, 2:], np.add(corner, (w, h)))
    covered = np.prod(np.maximum(end - start, 0), axis=1)
    return float((covered / np.prod(boxes[:, 2:] - boxes[:, :2], axis=1).clip(1)).sum())


def contours(segm: Segmentation, im_shape: Sequence[int], scale: float) -> list[np.ndarray]:
    """Outlines of a mask in picture pixels, (n, 2) each; [] for an empty mask."""
    mask = rle_to_mask(segm) if is_rle(segm) else polys_to_mask(segm, *im_shape[:2])
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    if not len(rows):
        return []
    # A margin of zeros keeps the outline closed when the enlarged mask is smoothed.
    crop = np.pad(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    offset = np.array([columns[0] - 1, rows[0] - 1])
    if scale > 1:
        size = tuple(round(side * scale) for side in crop.shape[::-1])
        crop = (cv2.resize(crop.astype(np.float32), size) > 0.5).astype(np.uint8)
    found, _ = cv2.findContours(crop, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_TC89_L1)
    return [contour.reshape(-1, 2) + offset * scale for contour in found]


def _pose(
    points: np.ndarray,
    kp_thresh: float,
    skeleton: Skeleton,
    scale: float,
    line_width: int,
    area: float,
) -> Pose:
    """The sure ones of the points (4, K) of a detection whose box covers `area`."""
    places = (points[:2].T + 0.5) * scale
    sure = points[2] > kp_thresh
    shown = [i for i in range(len(places)) if sure[i]]
    lines = [
        (places[list(a)].mean(axis=0), places[list(b)].mean(axis=0), colour)
        for (a, b), colour in zip(skeleton.lines, skeleton.colours, strict=True)
        if sure[[*a, *b]].all()
    ]
    # A small figure gets thin lines, or it would be all lines.
    width = min(1.2 * line_width, 0.02 * area**0.5)
    default = (255, 255, 255)
    return Pose(
        [(places[i], skeleton.point_colours.get(i, default)) for i in shown],
        lines,
        max(1, round(1.3 * width)),
        max(1, round(width)),
    )
