"""The Cython NMS for numpy callers agrees with the operators."""

import numpy as np
import pytest
import torch

import ops
from ops.soft_nms import METHODS

cython_nms = pytest.importorskip("ops.cython_nms", reason="built only with Python's headers")


def crowded(count=400, seed=0):
    g = np.random.default_rng(seed)
    centre, size = g.uniform(0, 200, (count, 2)), g.uniform(5, 80, (count, 2))
    scores = g.integers(0, 50, count) / 50  # many ties
    dets = np.concatenate([centre - size / 2, centre + size / 2, scores[:, None]], 1)
    return dets.astype(np.float32)


@pytest.mark.parametrize("thresh", [0.0, 0.3, 0.5, 1.0])
def test_nms_keeps_what_the_operator_keeps(thresh):
    dets = crowded()
    boxes = torch.from_numpy(dets)
    expected = ops.nms(boxes[:, :4], boxes[:, 4], thresh).numpy()
    kept = cython_nms.nms(dets, thresh)
    assert kept.dtype == np.int64
    np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("method", range(3))
def test_soft_nms_agrees_with_the_operator(method):
    dets = crowded()
    given = dets.copy()
    boxes = torch.from_numpy(dets)
    keep, scores = ops.soft_nms(boxes[:, :4], boxes[:, 4], 0.5, 0.3, 0.05, METHODS[method])
    rows, index = cython_nms.soft_nms(dets, 0.5, 0.3, 0.05, method)
    np.testing.assert_array_equal(index, keep.numpy())
    np.testing.assert_array_equal(rows[:, :4], dets[index, :4])
    np.testing.assert_allclose(rows[:, 4], scores.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(dets, given)  # the input stays as it was


def test_nothing_gives_nothing():
    none = np.zeros((0, 5), dtype=np.float32)
    assert cython_nms.nms(none, 0.5).shape == (0,)
    rows, index = cython_nms.soft_nms(none)
    assert rows.shape == (0, 5) and index.shape == (0,)
