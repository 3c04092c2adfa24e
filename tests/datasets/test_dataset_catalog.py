"""What --dataset may name, and what is said when files are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import UserError
from datasets.dataset_catalog import get_entry, resolve_class_names, resolve_dataset


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.fixture
def data_dir(cfg, tmp_path) -> Path:
    cfg.DATA_DIR = str(tmp_path)
    return tmp_path


def test_coco2017_is_train_and_val_with_80_classes():
    resolved = resolve_dataset("coco2017")
    assert resolved.train_names == ("coco_2017_train",)
    assert resolved.test_names == ("coco_2017_val",)
    assert resolved.num_classes == 81
    assert resolved.class_names[:2] == ("__background__", "person")
    assert resolved.class_names[-1] == "toothbrush"


def test_keypoints_coco2017_has_persons_only():
    resolved = resolve_dataset("keypoints_coco2017")
    assert resolved.train_names == ("keypoints_coco_2017_train",)
    assert resolved.class_names == ("__background__", "person")


def test_a_catalog_name_is_that_split_for_both():
    resolved = resolve_dataset("coco_2014_minival")
    assert resolved.train_names == resolved.test_names == ("coco_2014_minival",)


def test_this_familys_folders(data_dir):
    annotations = touch(data_dir / "coco/annotations/person_keypoints_train2017.json")
    (data_dir / "coco/images/train2017").mkdir(parents=True)
    entry = get_entry("keypoints_coco_2017_train")
    assert entry.annotation_file() == annotations
    assert entry.image_dir() == (data_dir / "coco/images/train2017", "")


def test_detectrons_folders_are_found(data_dir):
    (data_dir / "coco/coco_val2014").mkdir(parents=True)
    assert get_entry("coco_2014_minival").image_dir() == (data_dir / "coco/coco_val2014", "")
    (data_dir / "coco/coco_test2015").mkdir(parents=True)
    assert get_entry("coco_2017_test-dev").image_dir() == (
        data_dir / "coco/coco_test2015",
        "COCO_test2015_",
    )


@pytest.mark.parametrize(
    ("name", "annotations", "images"),
    [
        ("voc_2007_test", "VOC2007/annotations/voc_2007_test.json", "VOC2007/JPEGImages"),
        (
            "cityscapes_fine_instanceonly_seg_val",
            "cityscapes/annotations/instancesonly_filtered_gtFine_val.json",
            "cityscapes/images",
        ),
        (
            "keypoints_coco_2015_test-dev",
            "coco/annotations/image_info_test-dev2015.json",
            "coco/images/test2015",
        ),
        (
            "coco_2014_valminusminival",
            "coco/annotations/instances_valminusminival2014.json",
            "coco/images/val2014",
        ),
    ],
)
def test_other_catalog_paths(data_dir, name, annotations, images):
    touch(data_dir / annotations)
    (data_dir / images).mkdir(parents=True)
    assert get_entry(name).annotation_file() == data_dir / annotations
    assert get_entry(name).image_dir()[0] == data_dir / images


def test_missing_files_are_named_with_what_to_do(data_dir):
    entry = get_entry("coco_2017_train")
    with pytest.raises(UserError) as error:
        entry.annotation_file()
    assert str(data_dir / "coco/annotations/instances_train2017.json") in str(error.value)
    assert f"soft-link the data set as {data_dir / 'coco'}" in str(error.value)
    with pytest.raises(UserError, match="image directory .*coco/images/train2017"):
        entry.image_dir()


def test_an_unknown_name_gets_the_nearest_ones():
    with pytest.raises(UserError, match=r"unknown data set 'coco_2017_trian'.*coco_2017_train"):
        resolve_dataset("coco_2017_trian")


def test_class_names_for_inference_need_no_files(data_dir):
    assert len(resolve_class_names("coco")) == 81
    assert resolve_class_names("keypoints_coco2014") == ("__background__", "person")
    with pytest.raises(UserError, match="unknown data set"):
        resolve_class_names("kitti")


def test_annotations_and_image_directory_of_ones_own(cfg, tiny_files):
    resolved = resolve_dataset(tiny_files.spec)
    assert resolved.train_names == resolved.test_names == ("tiny",)
    assert resolved.class_names == ("__background__", "cat", "dog")
    assert get_entry("tiny").annotation_file() == tiny_files.annotations
    assert get_entry("tiny").image_dir() == (tiny_files.images, "")
    assert resolve_class_names(tiny_files.spec) == resolved.class_names


def test_yaml_file_of_ones_own_is_relative_to_itself(tiny_files, tmp_path, monkeypatch):
    file = tiny_files.annotations.parent / "mine.yaml"
    file.write_text(
        "train: {annotations: tiny.json, images: images}\n"
        f"val: {{annotations: {tiny_files.annotations}, images: {tiny_files.images}}}\n"
    )
    monkeypatch.chdir(tmp_path)
    resolved = resolve_dataset(str(file))
    assert resolved.train_names == ("mine_train",)
    assert resolved.test_names == ("mine_val",)
    assert resolved.num_classes == 3
    for name in ("mine_train", "mine_val"):
        assert get_entry(name).annotation_file() == tiny_files.annotations
        assert get_entry(name).image_dir()[0] == tiny_files.images


def test_yaml_file_with_val_only(tiny_files):
    file = tiny_files.annotations.parent / "only.yml"
    file.write_text("val: {annotations: tiny.json, images: images}\n")
    resolved = resolve_dataset(str(file))
    assert resolved.train_names == () and resolved.test_names == ("only_val",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: tiny.json\n", "'train' must have the form"),
        ("test: {annotations: a, images: b}\n", "must have the form"),
        ("train: {annotations: tiny.json}\n", "'train' must have the form"),
        ("train: {annotations: 3, images: b}\n", "train.annotations must be a path"),
        ("train: [\n", "is not valid YAML"),
        ("", "must have the form"),
        ("train: {annotations: none.json, images: images}\n", "none.json .*does not exist"),
    ],
)
def test_bad_yaml_files(tiny_files, text, message):
    file = tiny_files.annotations.parent / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        resolve_dataset(str(file))


def test_yaml_file_whose_splits_differ_in_classes(tiny_files):
    folder = tiny_files.annotations.parent
    other = folder / "other.json"
    other.write_text(tiny_files.annotations.read_text().replace('"dog"', '"hen"'))
    file = folder / "two.yaml"
    file.write_text(
        "train: {annotations: tiny.json, images: images}\n"
        "val: {annotations: other.json, images: images}\n"
    )
    with pytest.raises(UserError, match="categories of train and val differ"):
        resolve_dataset(str(file))


def test_a_users_name_cannot_hide_a_catalog_name(tiny_files):
    file = tiny_files.annotations.with_name("coco_2017_val.json")
    file.write_text(tiny_files.annotations.read_text())
    with pytest.raises(UserError, match="'coco_2017_val' is taken"):
        resolve_dataset(f"{file}:{tiny_files.images}")


def test_json_without_image_directory(tiny_files):
    with pytest.raises(UserError, match="lacks the image directory"):
        resolve_dataset(str(tiny_files.annotations))
