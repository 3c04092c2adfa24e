"""Masks: RLE forms, flips, rasterising, clipping."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pycocotools import mask as mask_util

import utils.segms as segm_utils
from datasets.roidb import combined_roidb_for_training
from tiny_data import golden_data_dir, rectangle, uncompressed_rle  # noqa: F401


def blob_mask() -> np.ndarray:
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[5:20, 8:30] = 1
    mask[10:14, 0:9] = 1
    mask[12:15, 12:20] = 0
    return mask


def test_all_forms_of_rle_decode_alike():
    mask = blob_mask()
    compressed = segm_utils.mask_to_rle(mask)
    text = {"size": [30, 40], "counts": compressed["counts"].decode()}
    for rle in (compressed, text, uncompressed_rle(mask)):
        assert segm_utils.is_rle(rle)
        np.testing.assert_array_equal(segm_utils.rle_to_mask(rle), mask)


def test_golden_flips(golden_data_dir, shared):  # noqa: F811
    golden = json.loads((shared / "golden/data/segms_coco_2017_train.json").read_text())
    roidb, _, _ = combined_roidb_for_training("coco_2017_train")
    for case in golden["polygons"]:
        segms = roidb[case["entry"]]["segms"]
        expected = case["segms"]
        assert len(segms) == len(expected)
        for ours, theirs in zip(segms, expected, strict=True):
            if isinstance(theirs, list):
                assert [p.tolist() for p in ours] == theirs
    flipped = [c for c in golden["crowds"] if "counts" in c]
    assert flipped
    for case in flipped:
        rle = roidb[case["entry"]]["segms"][case["obj"]]
        assert rle["counts"].decode() == case["counts"] and list(rle["size"]) == case["size"]


def test_a_flipped_rle_must_fit_its_image():
    with pytest.raises(ValueError, match="30"):
        segm_utils.flip_segms([uncompressed_rle(blob_mask())], 40, 30)


def test_golden_rasterising(shared):
    golden = np.load(shared / "golden/units/segms.npz")
    recorded = json.loads((shared / "golden/units/segms.json").read_text())
    polygons = recorded["polys"]
    np.testing.assert_array_equal(segm_utils.polys_to_boxes(polygons), golden["polys_to_boxes"])
    flipped = segm_utils.flip_segms(polygons, 100, 120)
    assert [[p.tolist() for p in polys] for polys in flipped] == recorded["flip_segms"]
    masks = np.unpackbits(golden["polys_to_mask"], axis=2)[:, :, :120]
    for polys, mask in zip(polygons, masks, strict=True):
        np.testing.assert_array_equal(segm_utils.polys_to_mask(polys, 100, 120), mask)
    for size in (14, 28):
        for i, polys in enumerate(polygons):
            for j, roi in enumerate(golden["poly_rois"]):
                mask = segm_utils.polys_to_mask_wrt_box(polys, roi, size)
                np.testing.assert_array_equal(mask, golden[f"wrt_box_{size}"][i, j])


def test_extent_of_a_mask():
    assert segm_utils.mask_to_bbox(blob_mask()).tolist() == [0, 5, 29, 19]
    assert segm_utils.mask_to_bbox(np.zeros((3, 4))) is None


def test_no_polygon_is_an_empty_mask():
    assert segm_utils.polys_to_mask([], 5, 6).sum() == 0
    assert segm_utils.polys_to_mask([[1, 1, 4, 1]], 5, 6).sum() == 0  # not a box, as pycocotools


@pytest.mark.parametrize("axis", [0, 1])
def test_clipping_a_rectangle(axis):
    polygon = np.array(rectangle(-5, -3, 20, 30))
    clipped = segm_utils.clip_polygon(polygon, axis, 10).reshape(-1, 2)
    lows, highs = clipped.min(axis=0), clipped.max(axis=0)
    assert lows[axis] == 0 and highs[axis] == 10
    assert (lows[1 - axis], highs[1 - axis]) == ((-3, 27) if axis == 0 else (-5, 15))


def test_clipping_away():
    assert segm_utils.clip_polygon(rectangle(11, 0, 5, 5), 0, 10) is None
    inside = np.array(rectangle(2, 2, 5, 5))
    np.testing.assert_array_equal(segm_utils.clip_polygon(inside, 0, 10), inside)


def test_a_clipped_polygon_covers_what_it_did_inside():
    # A star, concave: the clip cuts it into several parts.
    angles = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    radius = np.where(np.arange(14) % 2, 20.0, 80.0)
    points = np.stack((100 + radius * np.cos(angles), 100 + radius * np.sin(angles)), axis=1)
    polygon = points.reshape(-1)
    whole = segm_utils.polys_to_mask([polygon], 200, 200)
    for axis in (0, 1):
        shifted = polygon.copy()
        shifted[axis::2] -= 70
        clipped = segm_utils.clip_polygon(shifted, axis, 64)
        height, width = (200, 64) if axis == 0 else (64, 200)
        mask = segm_utils.polys_to_mask([clipped], height, width)
        expected = whole[:, 70:134] if axis == 0 else whole[70:134]
        # pycocotools rounds vertices, so that new vertices on the border may move a pixel there.
        assert (mask != expected).sum() <= 0.01 * expected.sum()


def test_compressing_keeps_what_is_compressed():
    rle = mask_util.encode(np.asfortranarray(blob_mask()))
    assert segm_utils.compress_rle(rle) == rle
