"""Mask targets: the polygons of objects, seen through RoIs, as COCO's mask API rasterises them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library  # noqa: F401


def polygons_to_masks(
    coords: Tensor,
    poly_offsets: Tensor,
    object_offsets: Tensor,
    rois: Tensor,
    object_index: Tensor,
    resolution: int,
) -> Tensor:
    """Binary masks of one object per RoI, bit for bit those of pycocotools.

    Each polygon is normalised in float32, (p - x1) * resolution / max(x2 - x1, 1), y likewise;
    the mask is frPyObjects + merge (union) + decode of the object's polygons at that resolution.

    Args:
        coords: (T, 2) float32 (x, y) of all polygons, in the frame of `rois`.
        poly_offsets: (polygons + 1,) int64; polygon k has the points poly_offsets[k] up to
            poly_offsets[k + 1].
        object_offsets: (objects + 1,) int64; object o has the polygons object_offsets[o] up to
            object_offsets[o + 1].
        rois: (R, 4) float32, xyxy.
        object_index: (R,) int64, the object of each RoI; out of range (-1): a mask of zeros.
        resolution: side of the masks, 1 to 256.

    Returns:
        (R, resolution, resolution) uint8, 0 and 1. An object without polygons, and a polygon of
        fewer than 3 points, draw nothing. Normalised coordinates beyond 1e8 (or NaN) are clamped.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit; on the CPU also offsets
            that do not ascend within their range (CUDA ignores such polygons: looking would stop
            the stream).
    """
    return torch.ops.detectron.polygons_to_masks(
        coords, poly_offsets, object_offsets, rois, object_index, resolution
    )


@torch.library.register_fake("detectron::polygons_to_masks")
def _polygons_to_masks_fake(
    coords: Tensor,
    poly_offsets: Tensor,
    object_offsets: Tensor,
    rois: Tensor,
    object_index: Tensor,
    resolution: int,
) -> Tensor:
    return rois.new_empty(rois.shape[0], resolution, resolution, dtype=torch.uint8)
