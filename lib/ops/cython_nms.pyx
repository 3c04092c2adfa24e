# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Greedy and soft NMS of numpy arrays, under the family's names; `ops.nms` takes tensors and is faster."""

import numpy as np

from libc.math cimport exp


cdef inline float overlap(const float[:, :] dets, Py_ssize_t i, Py_ssize_t j) noexcept nogil:
    """IoU of two boxes whose widths count both ends."""
    cdef float width = min(dets[i, 2], dets[j, 2]) - max(dets[i, 0], dets[j, 0]) + 1
    cdef float height = min(dets[i, 3], dets[j, 3]) - max(dets[i, 1], dets[j, 1]) + 1
    if width <= 0 or height <= 0:
        return 0
    cdef float both = width * height
    cdef float first = (dets[i, 2] - dets[i, 0] + 1) * (dets[i, 3] - dets[i, 1] + 1)
    cdef float second = (dets[j, 2] - dets[j, 0] + 1) * (dets[j, 3] - dets[j, 1] + 1)
    return both / (first + second - both)


def nms(dets, float thresh):
    """Indices that greedy NMS keeps, ascending; of equal scores the earlier row wins.

    Args:
        dets: (K, 5) float32 [x1, y1, x2, y2, score]; boxes with an IoU >= thresh are suppressed.

    Returns:
        int64 (kept,).
    """
    cdef const float[:, :] d = np.ascontiguousarray(dets, dtype=np.float32).reshape(-1, 5)
    order_array = np.argsort(-np.asarray(d[:, 4]), kind="stable")
    cdef const long long[:] order = order_array.astype(np.int64)
    cdef Py_ssize_t count = d.shape[0], n, k
    removed_array = np.zeros(count, dtype=np.uint8)
    cdef unsigned char[:] removed = removed_array
    with nogil:
        for n in range(count):
            if removed[order[n]]:
                continue
            for k in range(n + 1, count):
                if not removed[order[k]] and overlap(d, order[n], order[k]) >= thresh:
                    removed[order[k]] = 1
    return np.flatnonzero(removed_array == 0)


def soft_nms(dets, float sigma=0.5, float overlap_thresh=0.3, float score_thresh=0.001,
             int method=0):
    """Soft-NMS: the best box first, the scores of the others lowered by their IoU with it.

    Args:
        dets: (K, 5) float32 [x1, y1, x2, y2, score].
        method: 0 hard, 1 linear (1 - IoU), both above overlap_thresh; 2 gaussian exp(-IoU^2 / sigma).
        score_thresh: boxes whose score falls below it are dropped.

    Returns:
        (kept, 5) float32 by descending new score, and int64 (kept,) rows of `dets`.
    """
    rows_array = np.array(dets, dtype=np.float32).reshape(-1, 5)
    cdef float[:, :] d = rows_array
    cdef Py_ssize_t count = d.shape[0], n, k, best
    left_array = np.ones(count, dtype=np.uint8)
    cdef unsigned char[:] left = left_array
    cdef float iou, weight
    kept = []
    for n in range(count):
        best = -1
        for k in range(count):
            if left[k] and (best < 0 or d[k, 4] > d[best, 4]):
                best = k
        if best < 0 or d[best, 4] < score_thresh:
            break
        kept.append(best)
        left[best] = 0
        for k in range(count):
            if not left[k]:
                continue
            iou = overlap(d, best, k)
            if iou <= 0:
                continue
            if method == 2:
                weight = exp(-iou * iou / sigma)
            elif iou > overlap_thresh:
                weight = 1 - iou if method == 1 else 0
            else:
                weight = 1
            d[k, 4] *= weight
    index = np.array(kept, dtype=np.int64)
    return rows_array[index], index
