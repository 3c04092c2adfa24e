"""Checking a data set names everything that is wrong with it, and draws what it shows."""

from __future__ import annotations

import json
import shutil

import cv2
import numpy as np
import pytest

import check_dataset as script
from datasets.annotation_check import ERROR, WARNING, Findings, check_annotations
from datasets.dataset_check import check_dataset, report_lines, sample_page
from tiny_data import tiny_files

__all__ = ["tiny_files"]


def levels(check) -> dict[str, str]:
    return {finding.what: finding.level for finding in check.findings.sorted()}


def first(check, what: str):
    return next(f for f in check.findings.sorted() if f.what == what)


def test_a_sound_data_set_has_no_findings(cfg, tiny_files):
    (check,) = check_dataset(tiny_files.spec, workers=2)
    assert levels(check) == {}
    statistics = check.statistics
    assert statistics["images"] == 4 and statistics["images_without_objects"] == 1
    assert statistics["objects"] == 5 and statistics["crowds"] == 2
    assert statistics["classes"] == {
        "cat": {"objects": 2, "images": 1},
        "dog": {"objects": 3, "images": 3},
    }
    assert statistics["shorter_side"] == [50, 60, 80]
    assert statistics["sizes"] == {"small": 2, "medium": 3, "large": 0}
    text = "\n".join(report_lines(check))
    assert "4 images (1 without objects), 5 objects" in text and "nothing is wrong" in text


def object_of(**changes) -> dict:
    square = [[10, 10, 30, 10, 30, 30, 10, 30]]
    return {
        "id": 99, "image_id": 1, "category_id": 7, "bbox": [10, 10, 20, 20],
        "segmentation": square, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "level", "what"),
    [
        ({"bbox": [100, 10, 5, 5]}, ERROR, "boxes outside their image"),
        ({"bbox": [10, 10, 5]}, ERROR, "boxes that are not four numbers [x, y, width, height]"),
        (
            {"bbox": [10, 10, float("nan"), 5]},
            ERROR,
            "boxes that are not four numbers [x, y, width, height]",
        ),
        ({"bbox": [10, 10, 0, 5]}, WARNING, "boxes without area (not trained on)"),
        ({"bbox": [10, 70, 20, 20]}, WARNING, "boxes that reach over the image's edge (cut)"),
        ({"bbox": [10, 10, 1, 20]}, WARNING, "boxes less than 2 pixels wide or high"),
        ({"bbox": [0, 0, 100, 80]}, WARNING, "boxes over 98 % of their image"),
        ({"bbox": [40, 40, 20, 20]}, WARNING, "boxes that do not fit their polygons"),
        ({"image_id": 55}, ERROR, "objects of an image that is not listed"),
        ({"category_id": 55}, ERROR, "objects of an unknown category"),
        ({"id": 11}, WARNING, "annotation ids missing, 0 or repeated (renumbered)"),
        ({"id": None}, WARNING, "annotation ids missing, 0 or repeated (renumbered)"),
        ({"segmentation": []}, WARNING, "objects without a mask among others with one"),
        (
            {"segmentation": [[1, 2, 3, 4]]},
            WARNING,
            "polygons of less than three points (left out)",
        ),
        ({"segmentation": [[1, 2, 3]]}, ERROR, "polygons that are not lists x1, y1, x2, y2, ..."),
        (
            {"segmentation": {"size": [80, 99], "counts": []}},
            ERROR,
            "run-length masks that do not fit their image",
        ),
        (
            {"segmentation": [[10, 10, 130, 10, 30, 30]]},
            WARNING,
            "polygons that reach over the image's edge",
        ),
        ({"bbox": [10, 20, 30, 40]}, WARNING, "objects given twice (image, class and box)"),
    ],
)
def test_what_can_be_wrong_with_an_object(tiny_files, changes, level, what):
    data = json.loads(tiny_files.annotations.read_text())
    data["annotations"].append(object_of(**changes))
    found = Findings()
    check_annotations(data, found)
    assert (level, what) in [(f.level, f.what) for f in found.sorted()]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda d: d["images"].append(d["images"][0]), "image id used more than once"),
        (lambda d: d["images"][0].pop("height"), "images without 'height'"),
        (lambda d: d["images"][0].update(width=0), "images without a size in whole pixels"),
        (
            lambda d: d["categories"].append({"id": 7, "name": "hen"}),
            "category id used more than once",
        ),
        (
            lambda d: d["categories"].append({"id": 9, "name": "cat"}),
            "category name used more than once",
        ),
        (lambda d: d["annotations"][0].pop("bbox"), "annotations without 'bbox'"),
        (lambda d: d.pop("categories"), "not in COCO's format"),
    ],
)
def test_what_can_be_wrong_with_the_lists(tiny_files, change, what):
    data = json.loads(tiny_files.annotations.read_text())
    change(data)
    found = Findings()
    check_annotations(data, found)
    assert (ERROR, what) in [(f.level, f.what) for f in found.sorted()]


def test_keypoints_are_checked():
    category = {"id": 1, "name": "person", "keypoints": ["nose", "eye"]}
    image = {"id": 1, "file_name": "a", "height": 50, "width": 50}
    objects = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": [i, 1, 9, 9], "keypoints": points}
        for i, points in enumerate([[1, 1, 2], [1, 1, 2, 60, 1, 1], [60, 1, 0, 5, 5, 2]], 1)
    ]
    found = Findings()
    check_annotations({"images": [image], "categories": [category], "annotations": objects}, found)
    assert [(f.what, f.count) for f in found.sorted()] == [
        ("keypoints that are not 3 numbers for each of 2", 1),
        ("keypoints outside their image", 1),
    ]


def test_image_files_are_looked_at(cfg, tiny_files):
    folder = tiny_files.images
    (folder / "1.png").unlink()
    (folder / "2.png").write_bytes(b"no picture")
    cv2.imwrite(str(folder / "3.png"), np.zeros((40, 50, 3), np.uint8))
    jpeg = cv2.imencode(".jpg", cv2.imread(str(folder / "4.png")))[1].tobytes()
    (folder / "4.png").write_bytes(jpeg[:-300])  # OpenCV reads it as far as it goes
    (check,) = check_dataset(tiny_files.spec, workers=1)
    assert "missing image files" in levels(check)
    assert first(check, "images that cannot be decoded").examples == ["2.png (10 bytes)"]
    size = first(check, "images of another size than annotated")
    assert size.examples == ["3.png (50 x 40, annotated 50 x 50)"] and size.level == ERROR
    damaged = first(check, "damaged images")
    assert damaged.level == WARNING and damaged.examples[0].startswith("4.png (image file is trunc")


def test_images_that_are_in_both_splits_are_a_leak(cfg, tiny_files):
    folder = tiny_files.annotations.parent
    shutil.copytree(tiny_files.images, folder / "val_images")
    for number in (1, 3, 4):  # other pictures under the same names
        file = folder / f"val_images/{number}.png"
        cv2.imwrite(str(file), cv2.imread(str(file)) // 2)
    # Not its name but its content counts.
    data = json.loads(tiny_files.annotations.read_text())
    data["images"][1]["file_name"] = "other.png"
    data["categories"][0]["name"] = "lion"
    (folder / "val_images/2.png").rename(folder / "val_images/other.png")
    (folder / "val.json").write_text(json.dumps(data))
    file = folder / "data.yaml"
    file.write_text(
        "train: {annotations: tiny.json, images: images}\n"
        "val: {annotations: val.json, images: val_images}\n"
    )
    train, val = check_dataset(str(file), workers=1)
    assert levels(train) == {}
    leak = first(val, "images that are in data_train too")
    assert leak.level == ERROR and leak.count == 1
    assert leak.examples == ["other.png is 2.png of data_train"]
    assert "other categories than data_train" in levels(val)


def test_equal_files_within_a_split_are_named(cfg, tiny_files):
    tiny_files.edit(lambda d: d["images"].append(dict(d["images"][2], id=9, file_name="copy.png")))
    shutil.copy(tiny_files.images / "3.png", tiny_files.images / "copy.png")
    (check,) = check_dataset(tiny_files.spec, workers=1)
    assert first(check, "images given twice (equal files)").examples == ["3.png, copy.png"]


def test_a_page_shows_images_with_their_objects(cfg, tiny_files):
    (check,) = check_dataset(tiny_files.spec, workers=0)
    page = sample_page(check, 3)
    assert page.shape == (376, 3 * 488 + 8, 3)
    assert sample_page(check, 9).shape == (376, 4 * 488 + 8, 3)  # there are four images
    # Each cell has a picture: a pixel in five is enough for the narrowest.
    cells = [page[8:368, 8 + i * 488 : 488 + i * 488] for i in range(3)]
    assert all((cell != 255).any(axis=2).mean() > 0.2 for cell in cells)
    check.data["images"] = []
    assert sample_page(check, 3) is None


def test_every_bad_xml_file_is_named(cfg, tmp_path):
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / "pets" / part).mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / f"pets/Annotations/{name}.xml").write_text("<annotation>")
    for split in ("train", "val"):
        (tmp_path / f"pets/ImageSets/Main/{split}.txt").write_text("a\nb\n")
    train, _ = check_dataset(str(tmp_path / "pets"), workers=0)
    finding = first(train, "annotation files that cannot be used")
    assert finding.count == 2 and "b.xml is not XML" in finding.examples[1]


def test_the_script_reports_and_its_exit_code_tells(cfg, tiny_files, tmp_path, capsys):
    folder = tmp_path / "report"
    args = ["--dataset", tiny_files.spec, "--nw", "1", "--output_dir", str(folder)]
    assert script.main(args) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    assert cv2.imread(str(folder / "samples_tiny.png")) is not None
    report = json.loads((folder / "report.json").read_text())
    assert report["tiny"]["findings"] == [] and report["tiny"]["statistics"]["objects"] == 5
    (tiny_files.images / "1.png").unlink()
    assert script.main(args) == 1
    assert "ERROR: 1 missing image files" in capsys.readouterr().out
    assert script.main([*args[:2], "--no_images"]) == 0
    assert script.main(["--dataset", "nothing"]) == 2
