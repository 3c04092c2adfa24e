"""The Cython IoU for numpy callers."""

import numpy as np
import pytest

cython_bbox = pytest.importorskip("ops.cython_bbox", reason="built only with Python's headers")


def test_overlaps_have_plus_one_widths():
    boxes = np.array([[0, 0, 9, 9], [5, 0, 14, 9], [20, 20, 29, 29]], dtype=np.float32)
    expected = np.array([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]], dtype=np.float32)
    np.testing.assert_allclose(cython_bbox.bbox_overlaps(boxes, boxes), expected, rtol=1e-6)


def test_accepts_other_dtypes_and_empty_sets():
    boxes = [[0, 0, 9, 9]]
    assert cython_bbox.bbox_overlaps(boxes, np.zeros((0, 4))).shape == (1, 0)
    assert cython_bbox.bbox_overlaps(np.float64(boxes), np.int64(boxes)).dtype == np.float32
