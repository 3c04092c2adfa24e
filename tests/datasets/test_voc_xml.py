"""Folders of Pascal VOC's layout are data sets: as they are, in every script."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from datasets import voc_xml
from datasets.annotations import load_annotations
from datasets.dataset_catalog import get_entry, resolve_class_names, resolve_dataset
from datasets.json_dataset import JsonDataset
from datasets.roidb_cache import cache_path, cached_gt_roidb


def xml(objects: list[tuple[str, tuple, int]], size: tuple[int, int] | None = (40, 60)) -> str:
    """An annotation file of objects (name, xyxy from 1, difficult) in an image (height, width)."""
    side = f"<size><width>{size[1]}</width><height>{size[0]}</height></size>" if size else ""
    body = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin>"
        f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>"
        "<part><name>head</name></part></object>"
        for name, (x1, y1, x2, y2), difficult in objects
    )
    return f"<annotation>{side}{body}</annotation>"


@pytest.fixture
def folder(cfg, tmp_path) -> Path:
    """b: a dog and a difficult cat; a: a cat; c: a bird, in no split. train: b, a; val: a."""
    cfg.DATA_DIR = str(tmp_path / "data_dir")
    folder = tmp_path / "pets"
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    files = {
        "a": [("cat", (1, 1, 60, 40), 0)],
        "b": [("dog", (11, 6, 30, 25), 0), ("cat", (2, 3, 8.5, 9), 1)],
        "c": [("bird", (1, 1, 5, 5), 0)],
    }
    for name, objects in files.items():
        (folder / f"Annotations/{name}.xml").write_text(xml(objects))
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(folder / f"JPEGImages/{name}.jpg")
    (folder / "ImageSets/Main/train.txt").write_text("b\na\n")
    (folder / "ImageSets/Main/val.txt").write_text("a  1\n\n")
    (folder / "ImageSets/Main/cat_train.txt").write_text("b -1\na  1\n")
    return folder


def test_a_folder_is_trained_and_tested_on_by_its_splits(folder):
    resolved = resolve_dataset(str(folder))
    assert resolved.train_names == ("pets_train",) and resolved.test_names == ("pets_val",)
    # Of all files of the folder, so that splits agree.
    assert resolved.class_names == ("__background__", "bird", "cat", "dog")
    assert resolve_class_names(str(folder)) == resolved.class_names
    for split in ("trainval", "test"):
        (folder / f"ImageSets/Main/{split}.txt").write_text("a\n")
    resolved = resolve_dataset(str(folder))
    assert resolved.train_names == ("pets_trainval",) and resolved.test_names == ("pets_test",)


def test_a_split_can_be_named(folder):
    resolved = resolve_dataset(f"{folder}:val")
    assert resolved.train_names == resolved.test_names == ("pets_val",)
    with pytest.raises(UserError, match=r"no split 'tset'.*\(splits: train, val\)"):
        resolve_dataset(f"{folder}:tset")


def test_boxes_count_from_0_and_images_keep_the_splits_order(folder):
    dataset = JsonDataset(resolve_dataset(str(folder)).train_names[0])
    assert [dataset.COCO.imgs[i]["file_name"] for i in dataset.image_ids] == ["b.jpg", "a.jpg"]
    annotations = dataset.COCO.dataset["annotations"]
    assert [a["bbox"] for a in annotations] == [[10, 5, 20, 20], [1, 2, 7.5, 7], [0, 0, 60, 40]]
    assert [a["difficult"] for a in annotations] == [0, 1, 0]
    roidb = dataset.get_roidb(gt=True)
    # Difficult objects are not trained on.
    assert [entry["gt_classes"].tolist() for entry in roidb] == [[3], [2]]
    assert roidb[0]["boxes"].tolist() == [[10, 5, 29, 24]]
    assert roidb[1]["boxes"].tolist() == [[0, 0, 59, 39]]


@pytest.mark.parametrize(
    ("stems", "ids"),
    [
        (["000005", "000012"], [5, 12]),
        (["2007_000027", "2008_000008"], [2007000027, 2008000008]),
        (["000012", "000005"], [1, 2]),
        (["000000", "000005"], [1, 2]),
        (["000012", "x"], [1, 2]),
    ],
)
def test_vocs_own_numbers_are_ids(stems, ids):
    assert voc_xml.image_ids(stems) == ids


def test_data_yaml_may_name_splits_of_folders(folder):
    file = folder.parent / "data.yaml"
    file.write_text("train: {voc: pets, set: train}\nval: {voc: pets, set: val}\n")
    resolved = resolve_dataset(str(file))
    assert resolved.train_names == ("data_train",) and resolved.num_classes == 4
    assert get_entry("data_val").image_dir() == (folder / "JPEGImages", "")


def test_vocs_own_archives_are_found_by_name(cfg, folder, tmp_path):
    target = Path(cfg.DATA_DIR) / "VOCdevkit/VOC2007"
    target.parent.mkdir(parents=True)
    shutil.copytree(folder, target)
    dataset = JsonDataset("voc_2007_val")
    assert dataset.annotation_file == target / "ImageSets/Main/val.txt"
    assert len(dataset.get_roidb(gt=True)) == 1


def test_a_changed_annotation_is_read_anew_and_makes_another_cache_file(folder):
    dataset = JsonDataset(resolve_dataset(str(folder)).train_names[0])
    before = cache_path(dataset)
    assert len(cached_gt_roidb(dataset)[1]["boxes"]) == 1
    two = [("cat", (1, 1, 60, 40), 0), ("dog", (5, 5, 20, 20), 0)]
    (folder / "Annotations/a.xml").write_text(xml(two))
    changed = JsonDataset(dataset.name)
    assert cache_path(changed) != before
    assert len(cached_gt_roidb(changed)[1]["boxes"]) == 2


def test_a_size_that_is_not_stated_is_the_images(folder):
    (folder / "Annotations/a.xml").write_text(xml([("cat", (1, 1, 100, 40), 0)], size=None))
    data = load_annotations(folder / "ImageSets/Main/val.txt").dataset
    assert (data["images"][0]["height"], data["images"][0]["width"]) == (40, 60)
    assert data["annotations"][0]["bbox"] == [0, 0, 60, 40]  # cut to it


BOMB = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>'
FILE = '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;</annotation>'


@pytest.mark.parametrize("text", [BOMB, FILE, BOMB.replace("&c;", "")])
def test_document_types_and_entities_are_refused(folder, text):
    (folder / "Annotations/a.xml").write_text(text)
    with pytest.raises(UserError, match=r"a\.xml has a document type"):
        resolve_dataset(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "Annotations/a.xml").write_text("<annotation>"), r"a\.xml is not XML"),
        (lambda f: (f / "Annotations/a.xml").unlink(), r"a\.xml, listed in .*train\.txt.*1 of 2"),
        (lambda f: (f / "ImageSets/Main/train.txt").write_text("\n"), "lists no image"),
        (lambda f: (f / "ImageSets/Main/train.txt").write_text("a\na\n"), "lists 1 images twice"),
        (
            lambda f: (f / "Annotations/a.xml").write_text(xml([("cat", (1, 1, "x", 4), 0)])),
            r"a\.xml: bndbox/xmax of cat is 'x', not a number",
        ),
        (
            lambda f: (f / "Annotations/a.xml").write_text(xml([("", (1, 1, 2, 4), 0)])),
            r"a\.xml: an object has no name",
        ),
        (lambda f: shutil.rmtree(f / "JPEGImages"), "without Pascal VOC's Annotations"),
    ],
)
def test_what_is_wrong_is_named(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message):
        resolve_dataset(str(folder))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_bccd_has_the_boxes_of_its_json(cfg, shared, split):
    resolve_dataset(f"{shared / 'data/bccd'}:{split}")
    ours = JsonDataset(f"bccd_{split}").COCO
    path = shared / f"data/bccd/annotations/instances_{split}.json"
    theirs = load_annotations(path)

    def boxes(coco):
        return {
            (coco.imgs[a["image_id"]]["file_name"], coco.cats[a["category_id"]]["name"], *a["bbox"])
            for a in coco.dataset["annotations"]
        }

    assert {i["file_name"] for i in ours.dataset["images"]} == {
        i["file_name"] for i in json.loads(path.read_text())["images"]
    }
    # The JSON files leave out two boxes of a single pixel.
    assert boxes(ours) >= boxes(theirs)
    assert all(box[-2:] == (1, 1) for box in boxes(ours) - boxes(theirs))
