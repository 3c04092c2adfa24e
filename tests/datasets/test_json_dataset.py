"""Annotations to roidb entries: cleaning, classes, keypoints, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

import utils.segms as segm_utils
from core.errors import UserError
from datasets.dataset_catalog import resolve_dataset
from datasets.json_dataset import JsonDataset


def load(tiny_files) -> JsonDataset:
    return JsonDataset(resolve_dataset(tiny_files.spec).train_names[0])


def test_classes_follow_the_order_of_the_file(cfg, tiny_files):
    dataset = load(tiny_files)
    assert dataset.classes == ["__background__", "cat", "dog"]
    assert dataset.num_classes == 3
    assert dataset.json_category_id_to_contiguous_id == {7: 1, 3: 2}
    assert dataset.contiguous_category_id_to_json_id == {1: 7, 2: 3}
    assert dataset.category_to_id_map == {"cat": 7, "dog": 3}
    assert dataset.keypoints is None and dataset.keypoint_flip_map is None


def test_coco_classes_and_keypoints(cfg, shared):
    golden = json.loads((shared / "golden/data/datasets.json").read_text())
    for name, kind in (
        ("coco_2017_train", "instances"),
        ("keypoints_coco_2017_train", "person_keypoints"),
    ):
        file = shared / f"golden/annotations/{kind}_train2017.json"
        images = shared / "data/coco/images/train2017"
        dataset = JsonDataset(resolve_dataset(f"{file}:{images}").train_names[0])
        assert dataset.classes == golden[name]["classes"]
        assert dataset.keypoints == golden[name]["keypoints"]
        assert dataset.keypoint_flip_map == golden[name]["keypoint_flip_map"]
        mapping = {str(k): v for k, v in dataset.json_category_id_to_contiguous_id.items()}
        assert mapping == golden[name]["json_category_id_to_contiguous_id"]


def test_entry_of_an_image(cfg, tiny_files):
    entry = load(tiny_files).get_roidb(gt=True)[0]
    assert entry["id"] == 1 and (entry["height"], entry["width"]) == (80, 100)
    assert entry["image"] == str(tiny_files.images / "1.png")
    assert not entry["flipped"] and not entry["has_visible_keypoints"]
    expected = [[10, 20, 39, 59], [60, 30, 79, 49], [5, 60, 94, 74]]  # xywh with -1
    assert entry["boxes"].dtype == np.float32 and entry["boxes"].tolist() == expected
    assert entry["gt_classes"].tolist() == [1, 2, 1]
    assert entry["is_crowd"].tolist() == [False, False, True]
    assert entry["seg_areas"].tolist() == [1200, 300, 1350]
    overlaps = [[0, 1, 0], [0, 0, 1], [-1, -1, -1]]
    assert entry["gt_overlaps"].toarray().tolist() == overlaps
    assert entry["max_overlaps"].tolist() == [1, 1, -1]
    assert entry["max_classes"].tolist() == [1, 2, 0]
    assert entry["box_to_gt_ind_map"].tolist() == [0, 1, 2]


def test_an_rle_object_keeps_its_mask(cfg, tiny_files):
    segm = load(tiny_files).get_roidb(gt=True)[0]["segms"][1]
    mask = segm_utils.rle_to_mask(segm)
    assert mask.shape == (80, 100) and mask.sum() == 300
    assert segm_utils.mask_to_bbox(mask).tolist() == [60, 30, 79, 49]


def test_an_image_without_objects(cfg, tiny_files):
    entry = load(tiny_files).get_roidb(gt=True)[2]
    assert entry["boxes"].shape == (0, 4)
    assert entry["gt_overlaps"].shape == (0, 3)
    assert entry["segms"] == []


def test_without_gt_there_are_images_only(cfg, tiny_files):
    roidb = load(tiny_files).get_roidb()
    assert [entry["id"] for entry in roidb] == [1, 2, 3, 4]
    assert all(len(entry["boxes"]) == 0 for entry in roidb)


def test_debug_loads_the_first_hundred_images(cfg, tiny_files):
    def many(data):
        data["images"] = [dict(data["images"][0], id=i) for i in range(300, 100, -1)]
        data["annotations"] = []

    tiny_files.edit(many)
    cfg.DEBUG = True
    assert [e["id"] for e in load(tiny_files).get_roidb(gt=True)] == list(range(101, 201))


def edit_first(tiny_files, **changes):
    tiny_files.edit(lambda data: data["annotations"][0].update(changes))


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ([-5, -5, 20, 20], [0, 0, 14, 14]),
        ([90.5, 70.25, 30, 30], [90.5, 70.25, 99, 79]),
        ([0, 0, 100, 80], [0, 0, 99, 79]),
    ],
)
def test_boxes_are_clipped_to_their_image(cfg, tiny_files, bbox, expected):
    edit_first(tiny_files, bbox=bbox)
    assert load(tiny_files).get_roidb(gt=True)[0]["boxes"][0].tolist() == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ignore": 1}, "1 objects dropped as marked 'ignore'"),
        ({"area": 0}, "1 objects dropped as without area"),
        ({"bbox": [10, 20, 0, 40]}, "1 objects dropped as without area"),
        ({"bbox": [10, 20, 1, 40]}, "1 objects dropped as one pixel wide or high"),
        ({"bbox": [99.5, 20, 9, 40]}, "1 objects dropped as one pixel wide or high"),
    ],
)
def test_dropped_objects_are_counted_by_reason(cfg, tiny_files, caplog, changes, reason):
    edit_first(tiny_files, **changes)
    with caplog.at_level("INFO"):
        roidb = load(tiny_files).get_roidb(gt=True)
    assert len(roidb[0]["boxes"]) == 2
    assert reason in caplog.text


def test_objects_of_unknown_images_are_counted(cfg, tiny_files, caplog):
    edit_first(tiny_files, image_id=12345)
    with caplog.at_level("INFO"):
        roidb = load(tiny_files).get_roidb(gt=True)
    assert len(roidb[0]["boxes"]) == 2
    assert "1 objects of images that the file does not list" in caplog.text


def test_a_wrong_number_of_keypoints_is_refused(cfg, shared, tmp_path):
    source = shared / "golden/annotations/person_keypoints_train2017.json"
    data = json.loads(source.read_text())
    annotation = next(a for a in data["annotations"] if not a["iscrowd"])
    annotation["keypoints"] = annotation["keypoints"][:-1]
    (tmp_path / "short.json").write_text(json.dumps(data))
    spec = f"{tmp_path / 'short.json'}:{shared / 'data/coco/images/train2017'}"
    with pytest.raises(UserError, match=f"annotation {annotation['id']} has 50 keypoint numbers"):
        JsonDataset(resolve_dataset(spec).train_names[0]).get_roidb(gt=True)


def test_objects_below_the_least_area_are_dropped(cfg, tiny_files, caplog):
    cfg.TRAIN.GT_MIN_AREA = 400
    with caplog.at_level("INFO"):
        roidb = load(tiny_files).get_roidb(gt=True)
    assert roidb[0]["gt_classes"].tolist() == [1, 1]
    assert "1 objects dropped as smaller than TRAIN.GT_MIN_AREA" in caplog.text


@pytest.mark.parametrize("bbox", [[100, 20, 30, 40], [10, -41, 30, 40], [-30, 20, 30, 40]])
def test_a_box_outside_its_image_is_refused(cfg, tiny_files, bbox):
    edit_first(tiny_files, bbox=bbox)
    with pytest.raises(UserError, match=r"tiny\.json: annotation 11 .*outside its image 1\.png"):
        load(tiny_files).get_roidb(gt=True)


def test_short_polygons_are_dropped_and_their_object_kept(cfg, tiny_files):
    edit_first(tiny_files, segmentation=[[10, 20, 30, 40], [10, 20, 30, 20, 30, 40]])
    entry = load(tiny_files).get_roidb(gt=True)[0]
    assert [p.tolist() for p in entry["segms"][0]] == [[10, 20, 30, 20, 30, 40]]
    edit_first(tiny_files, segmentation=[[10, 20, 30, 40]])
    entry = load(tiny_files).get_roidb(gt=True)[0]
    assert entry["segms"][0] == [] and len(entry["boxes"]) == 3


def test_optional_fields_may_be_missing(cfg, tiny_files):
    def strip(data):
        for ann in data["annotations"][:1]:
            for key in ("id", "area", "iscrowd", "segmentation"):
                del ann[key]

    tiny_files.edit(strip)
    dataset = load(tiny_files)
    entry = dataset.get_roidb(gt=True)[0]
    assert entry["seg_areas"][0] == 1200 and entry["segms"][0] == []
    assert sorted(dataset.COCO.anns) == [1, 2, 3, 4, 5]


def test_annotation_id_zero_is_renumbered(cfg, tiny_files):
    # pycocotools' evaluation would take a match with it for no match.
    edit_first(tiny_files, id=0)
    assert 0 not in load(tiny_files).COCO.anns


def without(key):
    return lambda data: data.pop(key)


def first(section, **changes):
    return lambda data: data[section][0].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("images"), "no list 'images'"),
        (without("categories"), "no list 'categories'"),
        (lambda data: data.update(images=[]), "lists no images"),
        (lambda data: data["images"][0].pop("width"), "image number 0 has no 'width'"),
        (lambda data: data["annotations"][2].pop("bbox"), "annotation number 2 has no 'bbox'"),
        (first("annotations", category_id=99), "annotation 11 has category_id 99"),
        (first("images", width=0), "image 1.png has height 80 and width 0"),
        (first("images", height="80"), "image 1.png has height 80"),
        (first("annotations", bbox=[1, 2, 3]), "bbox of annotation 11 is not"),
        (first("annotations", bbox=None), "bbox of annotation 11 is not"),
        (first("annotations", bbox=[1, 2, 3, "4"]), "bbox of annotation 11 is not"),
        (first("annotations", bbox=[1, 2, float("nan"), 4]), "bbox of annotation 11 is not"),
        (first("annotations", bbox=[1, 2, 3, float("inf")]), "bbox of annotation 11 is not"),
        (first("images", id=2), "image id 2 twice, for 1.png and 2.png"),
        (first("categories", id=3), "category id 3 twice, for cat and dog"),
        (first("annotations", segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "annotation 11 has a polygon"),
        (first("annotations", segmentation=[1, 2, 3, 4, 5, 6]), "annotation 11 has a polygon"),
        (
            first("annotations", segmentation={"size": [5, 5], "counts": [25]}),
            r"annotation 11 has size \[5, 5\], its image \[80, 100\]",
        ),
        (first("images", file_name="none.png"), "none.png, listed in .*tiny.json, does not exist"),
    ],
)
def test_annotations_that_cannot_be_used(cfg, tiny_files, change, message):
    tiny_files.edit(change)
    with pytest.raises(UserError, match=message) as error:
        load(tiny_files).get_roidb(gt=True)
    assert "tiny.json" in str(error.value)


def test_a_file_that_is_not_json(cfg, tiny_files):
    tiny_files.annotations.write_text("{")
    with pytest.raises(UserError, match=r"tiny\.json is not valid JSON"):
        load(tiny_files)


def test_missing_files(cfg, tiny_files):
    resolve_dataset(tiny_files.spec)
    tiny_files.annotations.unlink()
    with pytest.raises(UserError, match=r"annotation file .*tiny\.json of data set tiny does not"):
        JsonDataset("tiny")


def test_missing_image_directory(cfg, tiny_files):
    resolve_dataset(f"{tiny_files.annotations}:{tiny_files.images}2")
    with pytest.raises(UserError, match="image directory .*images2 of data set tiny does not"):
        JsonDataset("tiny")


def test_a_segmentation_may_be_null(cfg, tiny_files):
    tiny_files.edit(lambda data: data["annotations"][0].update(segmentation=None))
    assert load(tiny_files).get_roidb(gt=True)[0]["segms"][0] == []
