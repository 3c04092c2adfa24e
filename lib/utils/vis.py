"""Pictures of detections: boxes, translucent masks, keypoints, labels; as PNG, JPG or PDF."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

from utils.segms import Segmentation
from utils.skeleton import PERSON_SKELETON, Skeleton
from utils.vis_layout import (
    LABEL_ALPHA,
    MASK_ALPHA,
    Instance,
    Layout,
    Pose,
    font,
    lay_out,
    resized,
    text_colour,
)
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
    cls_boxes: Sequence, cls_segms: Sequence | None, cls_keyps: Sequence | None = None
) -> tuple[np.ndarray, list[Segmentation] | None, list[np.ndarray] | None, np.ndarray]:
    """Detections by class, as `im_detect_all` returns them, as one list.

    Returns:
        boxes (n, 5) float32 with the score last, n segmentations or None, n keypoint arrays or
        None, classes (n,) int64.
    """
    boxes = [np.reshape(np.asarray(b, np.float32), (-1, 5)) for b in cls_boxes]
    classes = np.repeat(np.arange(len(boxes)), [len(b) for b in boxes])
    segms, keyps = (
        None if nested is None else [entry for of_class in nested for entry in of_class]
        for nested in (cls_segms, cls_keyps)
    )
    return np.concatenate(boxes), segms, keyps, classes


def draw(im: np.ndarray, layout: Layout) -> np.ndarray:
    """The picture: (layout.height, layout.width, 3) uint8 BGR from the image (H, W, 3) uint8
    BGR."""
    canvas = resized(im, layout)
    for instance in layout.instances:
        _draw_mask(canvas, instance, layout.line_width)
        corners = np.array(instance.box).reshape(2, 2)
        # The line runs inside the box, and never outside the picture.
        half = layout.line_width / 2
        fixed = (_fixed(corners[0] + half), _fixed(corners[1] - half))
        cv2.rectangle(
            canvas, *fixed, instance.colour[::-1], layout.line_width, cv2.LINE_AA, shift=SHIFT
        )
    # Above every box: a figure says more than the edge that crosses it.
    for instance in layout.instances:
        if instance.pose is not None:
            _draw_pose(canvas, instance.pose)
    return _draw_labels(canvas, layout)


def vis_one_image(
    im: np.ndarray,
    path: str | Path,
    cls_boxes: Sequence,
    cls_segms: Sequence | None = None,
    cls_keyps: Sequence | None = None,
    *,
    class_names: Sequence[str],
    thresh: float = 0.7,
    kp_thresh: float = 2.0,
    skeleton: Skeleton = PERSON_SKELETON,
) -> None:
    """Draw one image's detections into a file; its suffix says whether PDF, PNG or JPG.

    Args:
        im: (H, W, 3) uint8 BGR.
        cls_boxes, cls_segms, cls_keyps: as `core.test.im_detect_all` returns them.
        class_names: by class index, the background first.
        thresh: detections that score less are left out.
        kp_thresh: keypoints whose logit is not above it are left out.
        skeleton: which keypoints are joined.
    Raises:
        OSError: the file cannot be written.
    """
    boxes, segms, keyps, classes = convert_from_cls_format(cls_boxes, cls_segms, cls_keyps)
    layout = lay_out(
        im.shape,
        boxes,
        classes,
        segms,
        class_names,
        thresh,
        keypoints=keyps,
        kp_thresh=kp_thresh,
        skeleton=skeleton,
    )
    write_picture(im, layout, path)


def write_picture(im: np.ndarray, layout: Layout, path: str | Path) -> None:
    """Write the picture of an image (H, W, 3) uint8 BGR: PDF, PNG or JPG, as the suffix says.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() == ".pdf":
        from utils.vis_pdf import write_page  # a second to import, which training need not wait

        with atomic_write(path) as file:
            write_page(im, layout, file)
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


def _draw_pose(canvas: np.ndarray, pose: Pose) -> None:
    for start, end, colour in pose.lines:
        ends = (_fixed(start), _fixed(end))
        cv2.line(canvas, *ends, colour[::-1], pose.line_width, cv2.LINE_AA, SHIFT)
    for centre, colour in pose.points:
        radius = pose.radius * 2**SHIFT
        cv2.circle(canvas, _fixed(centre), radius, colour[::-1], -1, cv2.LINE_AA, SHIFT)


def _fixed(point: np.ndarray) -> tuple[int, int]:
    """A point of continuous coordinates as OpenCV counts: pixel centres are whole numbers."""
    x, y = np.rint((point - 0.5) * 2**SHIFT).astype(int).tolist()
    return x, y


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
