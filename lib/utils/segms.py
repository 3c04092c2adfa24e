"""Object masks as annotations hold them: lists of polygons, or run-length codes (RLE).

A polygon is a flat sequence x1, y1, x2, y2, ...; a segmentation is a list of polygons (their
union) or an RLE dict {"size": [height, width], "counts": list | str | bytes}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

Segmentation = list | dict[str, Any]


def is_rle(segm: Segmentation) -> bool:
    """Whether a segmentation is an RLE (compressed or not) and not polygons."""
    return isinstance(segm, dict)


def usable_polygons(polygons: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """Those of 3 points and more. pycocotools takes one of 2 for a box."""
    return [p for p in polygons if len(p) >= 6]


def compress_rle(segm: dict[str, Any]) -> dict[str, Any]:
    """An RLE with `counts` as bytes, from uncompressed counts, text or bytes."""
    counts = segm["counts"]
    if isinstance(counts, str):
        return {"size": list(segm["size"]), "counts": counts.encode("ascii")}
    if isinstance(counts, bytes):
        return segm
    height, width = segm["size"]
    return mask_util.frPyObjects({"size": [height, width], "counts": list(counts)}, height, width)


def rle_to_mask(segm: dict[str, Any]) -> np.ndarray:
    """Decode an RLE (compressed or not) to uint8 (height, width), 0 or 1."""
    return mask_util.decode(compress_rle(segm))


def mask_to_rle(mask: np.ndarray) -> dict[str, Any]:
    """Encode a binary (height, width) array as a compressed RLE with `counts` as bytes."""
    return mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))


def flip_segms(segms: Sequence[Segmentation], height: int, width: int) -> list[Segmentation]:
    """Segmentations of the mirrored image (height x width): x' = width - x - 1 for polygons;
    RLE masks are decoded, mirrored and encoded. Polygons come back as float64 arrays."""
    flipped: list[Segmentation] = []
    for segm in segms:
        if is_rle(segm):
            mask = rle_to_mask(segm)
            if mask.shape != (height, width):
                raise ValueError(f"RLE of size {mask.shape} in an image of {height} x {width}")
            flipped.append(mask_to_rle(mask[:, ::-1]))
        else:
            flipped.append(_flip_polygons(segm, width))
    return flipped


def _flip_polygons(polygons: Sequence[Sequence[float]], width: int) -> list[np.ndarray]:
    if not polygons:
        return []
    # All at once: images have many small polygons, data sets have a million.
    coords = np.concatenate(polygons, dtype=np.float64)
    coords[0::2] = width - coords[0::2] - 1
    mirrored, begin = [], 0
    for polygon in polygons:
        mirrored.append(coords[begin : begin + len(polygon)])
        begin += len(polygon)
    return mirrored


def polys_to_boxes(polys: Sequence[list]) -> np.ndarray:
    """Bounding boxes of segmentations given as polygons: float32 (N, 4) xyxy, N = len(polys)."""
    boxes = np.zeros((len(polys), 4), dtype=np.float32)
    for box, polygons in zip(boxes, polys, strict=True):
        points = np.concatenate([np.asarray(p, dtype=np.float64) for p in polygons]).reshape(-1, 2)
        box[:2] = points.min(axis=0)
        box[2:] = points.max(axis=0)
    return boxes


def polys_to_mask(polygons: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """Rasterise the union of polygons with pycocotools' rules: uint8 (height, width), 0 or 1.
    Those of fewer than 3 points are left out."""
    polygons = usable_polygons(polygons)
    if not polygons:
        return np.zeros((height, width), dtype=np.uint8)
    rles = mask_util.frPyObjects([np.asarray(p).tolist() for p in polygons], height, width)
    return mask_util.decode(mask_util.merge(rles))


def polys_to_mask_wrt_box(
    polygons: Sequence[Sequence[float]], box: Sequence[float], M: int
) -> np.ndarray:
    """Rasterise polygons on the M x M grid of a box (xyxy, same frame): float32 (M, M), 0 or 1.

    Coordinates are (p - x1) * M / max(x2 - x1, 1), computed in float32 (Detectron).
    """
    x1, y1, x2, y2 = np.asarray(box, dtype=np.float32)
    w = max(x2 - x1, np.float32(1))
    h = max(y2 - y1, np.float32(1))
    scaled = []
    for polygon in polygons:
        p = np.array(polygon, dtype=np.float32)
        p[0::2] = (p[0::2] - x1) * np.float32(M) / w
        p[1::2] = (p[1::2] - y1) * np.float32(M) / h
        scaled.append(p)
    return polys_to_mask(scaled, M, M).astype(np.float32)


def mask_to_bbox(mask: np.ndarray) -> np.ndarray | None:
    """Extent of a binary mask: float32 [x1, y1, x2, y2] of its outermost pixels, None if empty."""
    xs = np.flatnonzero(mask.any(axis=0))
    ys = np.flatnonzero(mask.any(axis=1))
    if len(xs) == 0:
        return None
    return np.array((xs[0], ys[0], xs[-1], ys[-1]), dtype=np.float32)


def clip_polygon(polygon: Sequence[float], axis: int, extent: float) -> np.ndarray | None:
    """The part of a polygon in the strip 0 <= x <= extent (axis 0) or 0 <= y <= extent (axis 1).

    Sutherland-Hodgman: a concave polygon that falls apart stays one polygon whose parts are joined
    along the border, where they enclose nothing. Returns float64 (2n,), None if nothing is left.
    """
    points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    for bound, sign in ((0.0, 1), (extent, -1)):
        points = _clip_half_plane(points, axis, bound, sign)
        if len(points) < 3:
            return None
    return points.reshape(-1)


def _clip_half_plane(points: np.ndarray, axis: int, bound: float, sign: int) -> np.ndarray:
    """Keep the side of an axis-parallel line where sign * (coordinate - bound) >= 0."""
    distance = sign * (points[:, axis] - bound)
    inside = distance >= 0
    if inside.all():
        return points
    following = np.roll(points, -1, axis=0)
    following_distance = np.roll(distance, -1)
    crosses = inside != np.roll(inside, -1)
    t = distance[crosses] / (distance[crosses] - following_distance[crosses])
    cuts = points[crosses] + t[:, None] * (following[crosses] - points[crosses])
    cuts[:, axis] = bound
    # Each vertex is followed by the cut on its outgoing edge, if there is one.
    order = np.concatenate((np.flatnonzero(inside) * 2, np.flatnonzero(crosses) * 2 + 1))
    return np.concatenate((points[inside], cuts))[np.argsort(order)]
