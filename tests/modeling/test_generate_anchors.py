"""Anchors against the values the original computed."""

from __future__ import annotations

import numpy as np
import torch

from modeling.generate_anchors import anchor_field, generate_anchors


def test_cell_anchors_agree_with_the_original(shared):
    golden = np.load(shared / "golden/units/anchors.npz")
    for level in range(2, 7):
        stride = 2**level
        anchors = generate_anchors(stride, (32 * 2 ** (level - 2),), (0.5, 1, 2))
        np.testing.assert_array_equal(anchors, golden[f"fpn{level}"])
    np.testing.assert_array_equal(
        generate_anchors(16, (32, 64, 128, 256, 512), (0.5, 1, 2)), golden["c4_yaml_sizes"]
    )
    np.testing.assert_array_equal(
        generate_anchors(16, (64, 128, 256, 512), (0.5, 1, 2)), golden["c4_default_sizes"]
    )
    np.testing.assert_array_equal(generate_anchors(), golden["fn_defaults"])


def test_known_anchors_of_faster_rcnn():
    anchors = generate_anchors(16, (128, 256, 512), (0.5, 1, 2))
    np.testing.assert_array_equal(anchors[0], [-84, -40, 99, 55])
    np.testing.assert_array_equal(anchors[-1], [-168, -344, 183, 359])


def test_field_agrees_with_the_original(shared):
    golden = np.load(shared / "golden/units/anchors.npz")
    cells = generate_anchors(32, (256,), (0.5, 1, 2))
    field = anchor_field(torch.tensor(cells).float(), 32, 14, 14)
    np.testing.assert_array_equal(field.numpy(), golden["field_fpn5_max448"])
    cells = generate_anchors(16, (32, 64, 128, 256, 512), (0.5, 1, 2))
    side = golden["field_c4_max448_size"]
    field = anchor_field(torch.tensor(cells).float(), 16, *map(int, side))
    np.testing.assert_array_equal(field[:100].numpy(), golden["field_c4_max448_first100"])


def test_field_runs_along_rows_with_the_anchor_fastest():
    field = anchor_field(torch.tensor([[0.0, 0, 1, 1], [0, 0, 3, 3]]), 8, 2, 3)
    assert field.shape == (12, 4)
    assert field[2].tolist() == [8, 0, 9, 1]
    assert field[7].tolist() == [0, 8, 3, 11]
