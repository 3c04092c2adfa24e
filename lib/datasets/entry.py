"""The roidb's entries: what is known of one image, as a plain dict.

Keys of a roidb entry (n objects, C classes with background):

    id, image (path), height, width, flipped, has_visible_keypoints
    boxes           float32 (n, 4)   xyxy in image pixels, both ends inside
    gt_classes      int32 (n,)       contiguous labels, 1 to C - 1; 0 for a proposal
    is_crowd        bool (n,)
    seg_areas       float32 (n,)     the annotations' `area`
    segms           list (n)         polygons (list of float64 arrays) or RLE dicts
    gt_overlaps     float32 (n, C)   scipy CSR; 1 at an object's class, -1 all over a crowd row
    max_overlaps, max_classes        row maxima of gt_overlaps and where they are
    box_to_gt_ind_map int32 (n,)     the object that a box belongs to
    gt_keypoints    int32 (n, 3, K)  x, y, visibility; only where the data set has keypoints
"""

from __future__ import annotations

import functools

import numpy as np
import scipy.sparse

from utils.packed_roidb import RoidbEntry

__all__ = ["RoidbEntry", "make_entry", "set_overlaps"]


def make_entry(
    *,
    image_id: int | str,
    image: str,
    height: int,
    width: int,
    num_classes: int,
    boxes: np.ndarray,
    gt_classes: np.ndarray,
    is_crowd: np.ndarray,
    seg_areas: np.ndarray,
    segms: list,
    gt_keypoints: np.ndarray | None,
) -> RoidbEntry:
    """A roidb entry of ground truth; computes what follows from it."""
    n = len(boxes)
    entry = {
        "id": image_id,
        "image": image,
        "height": height,
        "width": width,
        "flipped": False,
        "has_visible_keypoints": gt_keypoints is not None and bool((gt_keypoints[:, 2] > 0).any()),
        "boxes": boxes,
        "gt_classes": gt_classes,
        "is_crowd": is_crowd,
        "seg_areas": seg_areas,
        "segms": segms,
        "box_to_gt_ind_map": np.arange(n, dtype=np.int32),
    }
    if gt_keypoints is not None:
        entry["gt_keypoints"] = gt_keypoints
    if is_crowd.any():
        overlaps = np.zeros((n, num_classes), dtype=np.float32)
        overlaps[np.arange(n), gt_classes] = 1.0
        overlaps[is_crowd] = -1.0
        set_overlaps(entry, overlaps)
    elif not n:
        entry["gt_overlaps"] = _no_overlaps(num_classes)
        entry["max_overlaps"] = np.zeros(0, dtype=np.float32)
        entry["max_classes"] = np.zeros(0, dtype=np.int64)
    else:  # almost always: written down directly, as data sets have 100,000 images
        entry["gt_overlaps"] = scipy.sparse.csr_matrix(
            (np.ones(n, dtype=np.float32), gt_classes, np.arange(n + 1, dtype=np.int32)),
            shape=(n, num_classes),
        )
        entry["max_overlaps"] = np.ones(n, dtype=np.float32)
        entry["max_classes"] = gt_classes.astype(np.int64)
    return entry


@functools.lru_cache(maxsize=4)
def _no_overlaps(num_classes: int) -> scipy.sparse.csr_matrix:
    """gt_overlaps of all images without objects: a test has no others, and nobody writes to it."""
    return scipy.sparse.csr_matrix((0, num_classes), dtype=np.float32)


def set_overlaps(entry: RoidbEntry, overlaps: np.ndarray) -> None:
    """Set gt_overlaps (dense (n, C) in) and its row maxima in an entry."""
    entry["gt_overlaps"] = scipy.sparse.csr_matrix(overlaps)
    entry["max_overlaps"] = overlaps.max(axis=1)
    entry["max_classes"] = overlaps.argmax(axis=1)
