# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Pairwise IoU of boxes for numpy callers (the training path uses utils.boxes on tensors)."""

import numpy as np


def bbox_overlaps(boxes, query_boxes):
    """IoU of each box with each query box.

    boxes (N, 4) and query_boxes (K, 4) are xyxy with Detectron's +1 widths and are read as float32.
    Returns float32 (N, K). Boxes that do not intersect have IoU 0.
    """
    cdef const float[:, :] b = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    cdef const float[:, :] q = np.asarray(query_boxes, dtype=np.float32).reshape(-1, 4)
    overlaps = np.zeros((b.shape[0], q.shape[0]), dtype=np.float32)
    cdef float[:, :] out = overlaps
    cdef Py_ssize_t n, k
    cdef float query_area, width, height, intersection
    with nogil:
        for k in range(q.shape[0]):
            query_area = (q[k, 2] - q[k, 0] + 1) * (q[k, 3] - q[k, 1] + 1)
            for n in range(b.shape[0]):
                width = min(b[n, 2], q[k, 2]) - max(b[n, 0], q[k, 0]) + 1
                if width <= 0:
                    continue
                height = min(b[n, 3], q[k, 3]) - max(b[n, 1], q[k, 1]) + 1
                if height <= 0:
                    continue
                intersection = width * height
                out[n, k] = intersection / (
                    (b[n, 2] - b[n, 0] + 1) * (b[n, 3] - b[n, 1] + 1) + query_area - intersection
                )
    return overlaps
