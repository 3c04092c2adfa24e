"""A small data set in COCO's format that draws itself: shapes on textured backgrounds.

For `./make.sh demo` and for tests: it needs no download, and a small model learns it in minutes.
Objects overlap; an annotation covers what is visible of its object.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import yaml

logger = logging.getLogger(__name__)

CLASSES = ("circle", "square", "triangle")
IMAGE_SIZES = ((160, 160), (160, 192), (192, 160))  # height, width
OBJECT_SIZES = (26, 80)  # shortest and longest side of a shape, pixels
MAX_OBJECTS = 5
SHARE_WITHOUT_OBJECTS = 0.04

# Outlines are drawn this much finer than the image, for smooth edges and exact polygons.
_FINE = 3
_PIXEL = np.ones((_FINE, _FINE), np.uint8)
_TRIES_PER_OBJECT = 10
_MIN_VISIBLE_SHARE = 0.6
_MIN_PIECE_AREA = 40  # px^2; an object may be cut in two, but not into slivers
_MIN_CONTRAST = 70  # distance in BGR between a shape and the background


@dataclass
class DrawnObject:
    """One annotated shape. polygons: (n, 2) float arrays of x, y in pixels, one for each piece."""

    label: int
    polygons: list[np.ndarray]

    @property
    def bbox(self) -> list[float]:
        """COCO's x, y, width, height."""
        points = np.concatenate(self.polygons)
        low, high = points.min(axis=0), points.max(axis=0)
        return [*low.tolist(), *(high - low).tolist()]

    @property
    def area(self) -> float:
        return float(sum(cv2.contourArea(p.astype(np.float32)) for p in self.polygons))


def make_demo_data(output_dir: Path, num_train: int, num_val: int, seed: int = 0) -> Path:
    """Draw both splits into `output_dir` and return the YAML file to give as --dataset.

    The same arguments draw the same pictures. No image is in both splits.
    """
    splits = {}
    for split, first_id, count in (("train", 1, num_train), ("val", 1_000_001, num_val)):
        images = Path("images") / split
        annotations = Path("annotations") / f"{split}.json"
        _write_split(output_dir, images, annotations, range(first_id, first_id + count), seed)
        splits[split] = {"annotations": str(annotations), "images": str(images)}
        logger.info("Drew %d images into %s", count, output_dir / images)
    path = output_dir / "demo.yaml"
    path.write_text("# for --dataset\n" + yaml.safe_dump(splits, sort_keys=False))
    return path


def draw_image(seed: int, image_id: int) -> tuple[np.ndarray, list[DrawnObject]]:
    """Draw image number `image_id` of the data set that belongs to `seed`.

    Returns:
        The picture (H, W, 3) uint8 BGR, and its objects, the hindmost first.
    """
    rng = np.random.default_rng([seed, image_id])
    height, width = IMAGE_SIZES[rng.integers(len(IMAGE_SIZES))]
    picture = _background(rng, height, width)
    count = 0 if rng.random() < SHARE_WITHOUT_OBJECTS else rng.integers(1, MAX_OBJECTS + 1)
    # Whose each fine pixel is: 0 background, i the i-th object drawn.
    owner = np.zeros((height * _FINE, width * _FINE), np.uint8)
    labels: list[int] = []
    full_areas: list[int] = []
    pieces: list[list[np.ndarray]] = []
    for _ in range(count * _TRIES_PER_OBJECT):
        if len(labels) == count:
            break
        label, outline = _random_shape(rng, height, width)
        trial = cv2.fillPoly(owner.copy(), [outline], len(labels) + 1)
        trial_areas = [
            *full_areas,
            cv2.countNonZero(cv2.compare(trial, len(labels) + 1, cv2.CMP_EQ)),
        ]
        trial_pieces = _visible_pieces(trial, trial_areas)
        if trial_pieces is None:
            continue
        owner, full_areas, pieces = trial, trial_areas, trial_pieces
        labels.append(label)
        _paint(rng, picture, outline)
    objects = [
        DrawnObject(label, [_to_pixels(c) for c in contours])
        for label, contours in zip(labels, pieces, strict=True)
    ]
    return picture.clip(0, 255).round().astype(np.uint8), objects


def _write_split(
    output_dir: Path, images: Path, annotations: Path, image_ids: range, seed: int
) -> None:
    (output_dir / images).mkdir(parents=True, exist_ok=True)
    (output_dir / annotations).parent.mkdir(parents=True, exist_ok=True)
    for old in (output_dir / images).glob("*.jpg"):
        old.unlink()
    content: dict[str, list[dict]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }
    for image_id in image_ids:
        picture, objects = draw_image(seed, image_id)
        name = f"{image_id:07d}.jpg"
        cv2.imwrite(str(output_dir / images / name), picture, [cv2.IMWRITE_JPEG_QUALITY, 95])
        height, width = picture.shape[:2]
        content["images"].append(
            {"id": image_id, "file_name": name, "height": height, "width": width}
        )
        for obj in objects:
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": obj.label,
                    "segmentation": [p.ravel().tolist() for p in obj.polygons],
                    "bbox": obj.bbox,
                    "area": obj.area,
                    "iscrowd": 0,
                }
            )
    (output_dir / annotations).write_text(json.dumps(content))


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A flat colour with clouds, stripes and grain; (H, W, 3) float32."""
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = rng.uniform(50, 205, 3)
    picture += _clouds(rng, height, width, cell=40, strength=rng.uniform(5, 30))
    picture += _stripes(rng, height, width, strength=rng.uniform(0, 18))
    picture += rng.normal(0, rng.uniform(1, 7), (height, width, 1)).astype(np.float32)
    return picture


def _clouds(
    rng: np.random.Generator, height: int, width: int, cell: int, strength: float
) -> np.ndarray:
    coarse = rng.normal(0, strength, (height // cell + 2, width // cell + 2, 3))
    return cv2.resize(coarse.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)


def _stripes(rng: np.random.Generator, height: int, width: int, strength: float) -> np.ndarray:
    angle, period, phase = rng.uniform(0, np.pi), rng.uniform(5, 30), rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:height, :width]
    along = (x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period)
    return (strength * np.sin(along + phase)).astype(np.float32)[..., None]


def _random_shape(rng: np.random.Generator, height: int, width: int) -> tuple[int, np.ndarray]:
    """Label (1, 2, ...) and outline (n, 2) int32, in fine pixels, of a shape inside the image."""
    label = int(rng.integers(1, len(CLASSES) + 1))
    low, high = OBJECT_SIZES
    w = rng.uniform(low, high)
    # Nearly as high as wide; a circle exactly so.
    h = w if CLASSES[label - 1] == "circle" else np.clip(w * rng.uniform(0.8, 1.25), low, high)
    x, y = rng.uniform(1, width - w - 1), rng.uniform(1, height - h - 1)
    outline = _OUTLINES[CLASSES[label - 1]]() * (w, h) + (x, y)
    # Pixel i covers [i, i + 1), but OpenCV draws between pixel centres.
    return label, np.round(outline * _FINE - 0.5).astype(np.int32)


def _circle() -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return 0.5 + 0.5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _square() -> np.ndarray:
    return np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)


def _triangle() -> np.ndarray:
    return np.array([[0.5, 0], [1, 1], [0, 1]], float)


# Outlines (n, 2) in the unit square.
_OUTLINES: dict[str, Callable[[], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
}


def _visible_pieces(owner: np.ndarray, full_areas: list[int]) -> list[list[np.ndarray]] | None:
    """Fine contours of each object's visible pieces; None if an object is hidden too far.

    COCO's polygons have no holes, so an object that would get one is refused too.
    """
    pieces = []
    for number, full_area in enumerate(full_areas, start=1):
        mask = cv2.compare(owner, number, cv2.CMP_EQ)
        # Spikes thinner than a pixel are no part of what is seen.
        mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, _PIXEL)
        if cv2.countNonZero(mask) < _MIN_VISIBLE_SHARE * full_area:
            return None
        contours, hierarchy = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        has_hole = (hierarchy[0, :, 3] >= 0).any()
        smallest = min(cv2.contourArea(contour) for contour in contours)
        if has_hole or smallest < _MIN_PIECE_AREA * _FINE**2:
            return None
        pieces.append(list(contours))
    return pieces


def _to_pixels(contour: np.ndarray) -> np.ndarray:
    """A fine contour (pixel centres) as a polygon (n, 2) in image pixels."""
    corners = cv2.approxPolyDP(contour, epsilon=1.0, closed=True)[:, 0]
    return np.round((corners + 0.5) / _FINE, 3)


def _paint(rng: np.random.Generator, picture: np.ndarray, outline: np.ndarray) -> None:
    """Put a shape of a random colour that stands out on the picture, in place."""
    behind = picture.mean(axis=(0, 1))
    colour = rng.uniform(0, 255, 3)
    while np.linalg.norm(colour - behind) < _MIN_CONTRAST:
        colour = rng.uniform(0, 255, 3)
    left, top = outline.min(axis=0) // _FINE
    right, bottom = outline.max(axis=0) // _FINE + 1
    height, width = bottom - top, right - left
    mask = np.zeros((height * _FINE, width * _FINE), np.float32)
    cv2.fillPoly(mask, [outline - np.int32([left, top]) * _FINE], 1.0)
    cover = cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA)[..., None]
    surface = colour + _clouds(rng, height, width, cell=40, strength=rng.uniform(0, 12))
    surface += _stripes(rng, height, width, strength=rng.uniform(0, 10))
    part = picture[top:bottom, left:right]
    part += cover * (surface - part)
