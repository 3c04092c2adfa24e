"""Pictures of detections: boxes, translucent masks with contours, labels.

What is drawn and where is decided once (`lay_out`), in pixels of the picture; `draw` makes an
image of it and `utils.vis_pdf` a PDF page. Colours depend on the class alone, line widths and text
on the size of the picture, and a picture of a tiny image is enlarged until text can be read in it.
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
from PIL import Image, ImageDraw, ImageFont

from utils.segms import Segmentation, is_rle, polys_to_mask, rle_to_mask

MASK_ALPHA = 0.4
LABEL_ALPHA = 0.85
# The longer and the shorter side of a picture are at least this long.
MIN_LONG_SIDE, MIN_SHORT_SIDE = 600, 60
FONT_FILE = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
# cv2's fixed-point coordinates: 4 binary places make edges smooth.
SHIFT = 4

Colour = tuple[int, int, int]


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
class Instance:
    """One detection in picture pixels."""

    colour: Colour  # RGB
    box: tuple[float, float, float, float]  # outer edges: left, top, right, bottom
    contours: list[np.ndarray]  # each (n, 2) float, outlines and holes together
    label: Label | None  # None where no place was left that covers no other label


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


def convert_from_cls_format(
    cls_boxes: Sequence, cls_segms: Sequence | None
) -> tuple[np.ndarray, list[Segmentation] | None, np.ndarray]:
    """Detections by class, as `im_detect_all` returns them, as one list.

    Returns:
        boxes (n, 5) float32 with the score last, n segmentations or None, classes (n,) int64.
    """
    boxes = [np.reshape(np.asarray(b, np.float32), (-1, 5)) for b in cls_boxes]
    classes = np.repeat(np.arange(len(boxes)), [len(b) for b in boxes])
    segms = None if cls_segms is None else [s for of_class in cls_segms for s in of_class]
    return np.concatenate(boxes), segms, classes


def lay_out(
    im_shape: Sequence[int],
    boxes: np.ndarray,
    classes: Sequence[int],
    segms: Sequence[Segmentation] | None,
    class_names: Sequence[str],
    thresh: float,
) -> Layout:
    """Decide what a picture shows and where.

    Args:
        im_shape: (height, width, ...) of the image.
        boxes: (n, 5) `[x1, y1, x2, y2, score]` in image pixels, both ends inside.
        classes: n indices into class_names; segms: n RLEs or lists of polygons, or None.
        thresh: detections that score less are left out.
    """
    height, width = im_shape[:2]
    scale = max(1.0, MIN_LONG_SIDE / max(height, width), MIN_SHORT_SIDE / min(height, width))
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
    instances = [
        Instance(
            class_colour(int(classes[i])),
            tuple(float(v) for v in outer[i]),
            [] if segms is None else _contours(segms[i], im_shape, scale),
            labels[i],
        )
        for i in sorted(shown, key=lambda i: -area[i])
    ]
    return Layout(width, height, max(1, round(0.003 * size)), font_size, instances)


def draw(im: np.ndarray, layout: Layout) -> np.ndarray:
    """The picture: (layout.height, layout.width, 3) uint8 BGR from the image (H, W, 3) uint8
    BGR."""
    canvas = resized(im, layout)
    for instance in layout.instances:
        _draw_mask(canvas, instance, layout.line_width)
        corners = np.array(instance.box).reshape(2, 2)
        # The line runs inside the box, and never outside the picture.
        half = layout.line_width / 2
        start, end = corners[0] + half - 0.5, corners[1] - half - 0.5
        fixed = [tuple(np.rint(p * 2**SHIFT).astype(int).tolist()) for p in (start, end)]
        cv2.rectangle(
            canvas, *fixed, instance.colour[::-1], layout.line_width, cv2.LINE_AA, shift=SHIFT
        )
    return _draw_labels(canvas, layout)


def resized(im: np.ndarray, layout: Layout) -> np.ndarray:
    """A copy of the image at the picture's size."""
    if im.shape[:2] == (layout.height, layout.width):
        return im.copy()
    return cv2.resize(im, (layout.width, layout.height), interpolation=cv2.INTER_CUBIC)


def vis_one_image(
    im: np.ndarray,
    path: str | Path,
    cls_boxes: Sequence,
    cls_segms: Sequence | None = None,
    *,
    class_names: Sequence[str],
    thresh: float = 0.7,
) -> None:
    """Draw one image's detections into a file; its suffix says whether PDF, PNG or JPG.

    Args:
        im: (H, W, 3) uint8 BGR; cls_boxes, cls_segms: as `core.test.im_detect_all` returns them.
    """
    boxes, segms, classes = convert_from_cls_format(cls_boxes, cls_segms)
    layout = lay_out(im.shape, boxes, classes, segms, class_names, thresh)
    save(im, layout, path)


def save(im: np.ndarray, layout: Layout, path: str | Path) -> None:
    """Write the picture as PDF, PNG or JPG according to the suffix of `path`.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() == ".pdf":
        from utils.vis_pdf import save_pdf

        save_pdf(path, [(im, layout)])
        return
    done, encoded = cv2.imencode(path.suffix, draw(im, layout))
    if not done:
        raise OSError(f"{path}: pictures of this kind cannot be written")
    path.write_bytes(encoded.tobytes())


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
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
        w = round(_font(font_size).getlength(text) + 0.5 * font_size)
        x = np.r_[left, np.full(len(rows), left), right - w, left, right - w]
        y = np.r_[top - h, rows, top - h, bottom, bottom]
        x, y = np.clip(x, 0, max(width - w, 0)), np.clip(y, 0, max(height - h, 0))
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


def _contours(segm: Segmentation, im_shape: Sequence[int], scale: float) -> list[np.ndarray]:
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
    found, _ = cv2.findContours(crop, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return [contour.reshape(-1, 2) + offset * scale for contour in found]


def _draw_mask(canvas: np.ndarray, instance: Instance, line_width: int) -> None:
    if not instance.contours:
        return
    fixed = [np.rint(c * 2**SHIFT).astype(np.int32) for c in instance.contours]
    points = np.concatenate(instance.contours)
    x1, y1 = np.maximum(np.floor(points.min(axis=0)).astype(int) - line_width, 0)
    x2, y2 = np.ceil(points.max(axis=0)).astype(int) + line_width + 1
    region = canvas[y1:y2, x1:x2]
    shift = np.array([x1, y1]) * 2**SHIFT
    fixed = [(c - shift).astype(np.int32) for c in fixed]
    cover = np.zeros(region.shape[:2], np.uint8)
    cv2.fillPoly(cover, fixed, 255, cv2.LINE_AA, SHIFT)
    alpha = cover[..., None] * np.float32(MASK_ALPHA / 255)
    colour = np.array(instance.colour[::-1], np.float32)
    region[:] = np.rint(region * (1 - alpha) + colour * alpha)
    # drawn in place through the view into the canvas
    outline = np.ascontiguousarray(region)
    cv2.polylines(
        outline, fixed, True, instance.colour[::-1], max(1, line_width // 2), cv2.LINE_AA, SHIFT
    )
    region[:] = outline


def _draw_labels(canvas: np.ndarray, layout: Layout) -> np.ndarray:
    picture = Image.fromarray(canvas[..., ::-1].copy())
    pen = ImageDraw.Draw(picture, "RGBA")
    for instance in layout.instances:
        if (label := instance.label) is None:
            continue
        corner = (label.x + label.width - 1, label.y + label.height - 1)
        fill = (*instance.colour, round(255 * LABEL_ALPHA))
        pen.rectangle(((label.x, label.y), corner), fill=fill)
        middle = (label.x + 0.25 * layout.font_size, label.y + label.height / 2)
        pen.text(
            middle,
            label.text,
            fill=text_colour(instance.colour),
            font=_font(layout.font_size),
            anchor="lm",
        )
    return np.ascontiguousarray(np.asarray(picture)[..., ::-1])
