"""Pictures of detections: boxes, translucent masks with contours, labels; as PNG, JPG or PDF."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.backends.backend_pdf import PdfPages
from PIL import Image, ImageDraw

from utils.segms import Segmentation
from utils.vis_layout import (
    LABEL_ALPHA,
    MASK_ALPHA,
    Instance,
    Layout,
    font,
    lay_out,
    resized,
    text_colour,
)
from utils.vis_pdf import page
from utils.weights import atomic_write

# cv2's fixed-point coordinates: 4 binary places make edges smooth.
SHIFT = 4


def picture_names(
    images: Sequence[str | Path], suffix: str, taken: Iterable[str] = ()
) -> list[str]:
    """A file name for each image's picture: its stem, numbered where that is taken."""
    used, names = set(taken), []
    for image in images:
        stem, count = Path(image).stem, 0
        name = f"{stem}.{suffix}"
        while name in used:
            count += 1
            name = f"{stem}_{count}.{suffix}"
        used.add(name)
        names.append(name)
    return names


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


def vis_one_image(
    im: np.ndarray,
    path: str | Path,
    cls_boxes: Sequence,
    cls_segms: Sequence | None = None,
    *,
    class_names: Sequence[str],
    thresh: float = 0.7,
    merged_pdf: PdfPages | None = None,
) -> None:
    """Draw one image's detections into a file; its suffix says whether PDF, PNG or JPG.

    Args:
        im: (H, W, 3) uint8 BGR; cls_boxes, cls_segms: as `core.test.im_detect_all` returns them.
        class_names: by class index, the background first.
        thresh: detections that score less are left out.
        merged_pdf: gets a copy of the page, if a PDF is written.
    Raises:
        OSError: the file cannot be written.
    """
    boxes, segms, classes = convert_from_cls_format(cls_boxes, cls_segms)
    layout = lay_out(im.shape, boxes, classes, segms, class_names, thresh)
    path = Path(path)
    if path.suffix.lower() == ".pdf":
        figure = page(im, layout)
        with atomic_write(path) as file, PdfPages(file) as pdf:
            pdf.savefig(figure)
        if merged_pdf is not None:
            merged_pdf.savefig(figure)
        return
    done, encoded = cv2.imencode(path.suffix, draw(im, layout))
    if not done:
        raise OSError(f"{path}: a picture of this size or kind cannot be written")
    with atomic_write(path) as file:
        file.write(encoded.tobytes())


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
            font=font(layout.font_size),
            anchor="lm",
        )
    return np.ascontiguousarray(np.asarray(picture)[..., ::-1])
