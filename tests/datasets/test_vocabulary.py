"""What class labels are called, and their ids in result files."""

from __future__ import annotations

from datasets.coco_classes import COCO_CATEGORY_IDS, COCO_CLASSES
from datasets.vocabulary import vocabulary_for, vocabulary_of
from utils.skeleton import PERSON_SKELETON


def test_cocos_ids_are_those_of_its_files(shared):
    import json

    file = shared / "data/coco/annotations/instances_val2017.json"
    categories = json.loads(file.read_text())["categories"]
    assert [c["id"] for c in categories] == list(COCO_CATEGORY_IDS)
    assert [c["name"] for c in categories] == list(COCO_CLASSES)


def test_coco_needs_no_files():
    assert vocabulary_of("coco2017").category_ids == (0, *COCO_CATEGORY_IDS)
    assert vocabulary_of("keypoints_coco2017").names == ("__background__", "person")


def test_own_data_bring_names_ids_and_skeleton(tiny_files):
    def add_keypoints(data):
        data["categories"][1] |= {"keypoints": ["nose", "tail"], "skeleton": [[1, 2]]}

    tiny_files.edit(add_keypoints)
    vocabulary = vocabulary_of(tiny_files.spec)
    assert vocabulary.names == ("__background__", "cat", "dog")
    assert vocabulary.category_ids == (0, 7, 3)
    assert vocabulary.skeleton.lines == (((0,), (1,)),)


def test_own_people_keep_their_own_id(tiny_files):
    def one_person(data):
        data["categories"] = [{"id": 7, "name": "person"}]
        data["annotations"] = []

    tiny_files.edit(one_person)
    assert vocabulary_of(tiny_files.spec).category_ids == (0, 7)


def test_a_number_of_classes_gets_names(cfg):
    assert vocabulary_for(81).names[1] == "person"
    assert vocabulary_for(3).names == ("__background__", "class 1", "class 2")
    cfg.MODEL.KEYPOINTS_ON = True
    assert vocabulary_for(2).names == ("__background__", "person")
    assert vocabulary_for(2).skeleton is PERSON_SKELETON
