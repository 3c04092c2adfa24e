"""The demo's data set: reproducible, in COCO's format, and annotated as drawn."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import yaml
from pycocotools import mask as mask_util

from datasets.demo_shapes import CLASSES, OBJECT_SIZES, draw_image, make_demo_data


def decode(obj, picture):
    height, width = picture.shape[:2]
    rles = mask_util.frPyObjects([p.ravel().tolist() for p in obj.polygons], height, width)
    return mask_util.decode(mask_util.merge(rles)).astype(bool)


@pytest.fixture(scope="module")
def drawn():
    return [draw_image(0, image_id) for image_id in range(1, 61)]


def test_same_seed_same_picture_other_seed_another():
    first, objects = draw_image(0, 5)
    again, objects_again = draw_image(0, 5)
    assert np.array_equal(first, again)
    assert [o.bbox for o in objects] == [o.bbox for o in objects_again]
    other, _ = draw_image(1, 5)
    assert first.shape != other.shape or not np.array_equal(first, other)


def test_objects_do_not_share_pixels(drawn):
    for picture, objects in drawn:
        covered = sum((decode(o, picture).astype(int) for o in objects), start=0)
        # Neighbours may both touch the pixels on their common edge.
        assert np.count_nonzero(covered > 1) <= 0.01 * picture.shape[0] * picture.shape[1]


def test_areas_and_boxes_are_those_of_the_masks(drawn):
    for picture, objects in drawn:
        for obj in objects:
            mask = decode(obj, picture)
            assert obj.area == pytest.approx(mask.sum(), rel=0.08)
            rows, columns = np.nonzero(mask)
            x, y, w, h = obj.bbox
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(np.subtract(found, [x, y, x + w, y + h])).max() <= 1


def test_masks_lie_where_the_shapes_are_painted():
    # A lone shape: its pixels differ from the background's mean more than the rest do.
    for image_id in range(1, 200):
        picture, objects = draw_image(0, image_id)
        if len(objects) == 1:
            mask = decode(objects[0], picture)
            inner = cv2.erode(mask.astype(np.uint8), np.ones((5, 5))).astype(bool)
            outer = ~cv2.dilate(mask.astype(np.uint8), np.ones((5, 5))).astype(bool)
            gap = picture[inner].mean(axis=0) - picture[outer].mean(axis=0)
            assert np.linalg.norm(gap) > 40


def test_variety(drawn):
    labels = {o.label for _, objects in drawn for o in objects}
    counts = [len(objects) for _, objects in drawn]
    sides = [max(o.bbox[2:]) for _, objects in drawn for o in objects]
    assert labels == set(range(1, len(CLASSES) + 1))
    assert min(counts) == 0 and max(counts) >= 4
    assert max(sides) <= OBJECT_SIZES[1] + 1
    assert len({picture.shape for picture, _ in drawn}) == 3


def test_files(tmp_path):
    path = make_demo_data(tmp_path, num_train=3, num_val=2, seed=7)
    splits = yaml.safe_load(path.read_text())
    ids = {}
    for split, count in (("train", 3), ("val", 2)):
        content = json.loads((tmp_path / splits[split]["annotations"]).read_text())
        assert [c["name"] for c in content["categories"]] == list(CLASSES)
        assert len(content["images"]) == count
        for image in content["images"]:
            picture = cv2.imread(str(tmp_path / splits[split]["images"] / image["file_name"]))
            assert picture.shape == (image["height"], image["width"], 3)
        ids[split] = {image["id"] for image in content["images"]}
        assert {a["image_id"] for a in content["annotations"]} <= ids[split]
    assert not ids["train"] & ids["val"]
