"""Cityscapes' metric on drawn streets: files as its scripts read them, and their numbers."""

from __future__ import annotations

import json
import sys

import cv2
import numpy as np
import pytest

import utils.segms as segm_utils
from core.errors import UserError
from datasets import cityscapes_evaluator, task_evaluation
from datasets.dataset_catalog import register
from datasets.json_dataset import JsonDataset

STEM = "ulm_000000_000019"
CARS = {1: (10, 10, 60, 40), 2: (80, 20, 50, 50)}  # x, y, width, height
PERSON = (140, 10, 20, 60)
SIZE = (100, 200)


@pytest.fixture
def street(tmp_path, cfg) -> JsonDataset:
    """One image with two cars and a person, in Cityscapes' and in COCO's form."""
    cfg.DATA_DIR = str(tmp_path)
    cfg.MODEL.MASK_ON = True
    truth = tmp_path / "cityscapes/raw/gtFine/val/ulm"
    truth.mkdir(parents=True)
    ids = np.full(SIZE, 7, np.uint16)  # road
    objects = [(26000, CARS[1], 1), (26001, CARS[2], 1), (24000, PERSON, 2)]
    annotations = []
    for number, (instance, (x, y, w, h), category) in enumerate(objects, start=1):
        ids[y : y + h, x : x + w] = instance
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        annotations.append(
            {
                "id": number,
                "image_id": 1,
                "category_id": category,
                "bbox": [x, y, w, h],
                "segmentation": [polygon],
            }
        )
    cv2.imwrite(str(truth / f"{STEM}_gtFine_instanceIds.png"), ids)
    image = {"id": 1, "file_name": f"{STEM}_leftImg8bit.png", "height": 100, "width": 200}
    categories = [{"id": 1, "name": "car"}, {"id": 2, "name": "person"}]
    file = tmp_path / "cityscapes_drawn_val.json"
    data = {"images": [image], "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(data))
    register(file.stem, file, tmp_path)
    return JsonDataset(file.stem)


def mask(x: int, y: int, w: int, h: int) -> dict:
    drawn = np.zeros(SIZE, np.uint8)
    drawn[y : y + h, x : x + w] = 1
    return segm_utils.mask_to_rle(drawn)


def detections(*cars: tuple) -> tuple[list, list]:
    box = [0, 0, 9, 9]
    boxes = [[[]], [np.array([[*box, 0.9]] * len(cars))], [np.array([[*box, 0.8]])]]
    return boxes, [[[]], [[mask(*car) for car in cars]], [[mask(*PERSON)]]]


def test_files_are_cityscapes(street, tmp_path):
    boxes, segms = detections(CARS[1], CARS[2])
    (file,) = cityscapes_evaluator.write_predictions(
        street, boxes, segms, tmp_path / "out", {"car": 26, "person": 24}
    )
    assert file.name == f"{STEM}_leftImg8bitpred.txt"
    assert file.read_text().splitlines() == [
        f"results/{STEM}_leftImg8bit_car_0.png 26 0.9",
        f"results/{STEM}_leftImg8bit_car_1.png 26 0.9",
        f"results/{STEM}_leftImg8bit_person_0.png 24 0.8",
    ]
    picture = cv2.imread(
        str(tmp_path / "out/results" / f"{STEM}_leftImg8bit_car_1.png"), cv2.IMREAD_UNCHANGED
    )
    x, y, w, h = CARS[2]
    assert picture.shape == SIZE
    assert (picture[y : y + h, x : x + w] == 255).all()
    assert (picture == 255).sum() == w * h
    assert set(np.unique(picture)) == {0, 255}


def test_without_the_scripts_it_says_so(street, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cityscapesscripts", None)
    results = task_evaluation.evaluate_all(street, *detections(CARS[1]), [], tmp_path / "out")
    assert set(results[street.name]["mask"].values()) == {-1}
    assert results[street.name]["box"]["AP"] >= 0
    assert "pip install cityscapesscripts" in caplog.text


def test_ground_truth_scores_one_and_a_lost_car_less(street, tmp_path):
    pytest.importorskip("cityscapesscripts")
    found = detections(CARS[1], CARS[2])
    results = task_evaluation.evaluate_all(street, *found, [], tmp_path / "all")
    assert results[street.name]["mask"]["AP"] == pytest.approx(1)
    assert results[street.name]["mask"]["AP50"] == pytest.approx(1)
    assert results[street.name]["mask"]["AP75"] == -1
    found = detections(CARS[1])
    results = task_evaluation.evaluate_all(street, *found, [], tmp_path / "lost")
    assert 0.5 < results[street.name]["mask"]["AP"] < 1


def test_missing_ground_truth_is_one_sentence(street, tmp_path):
    pytest.importorskip("cityscapesscripts")
    next((tmp_path / "cityscapes/raw").rglob("*.png")).unlink()
    with pytest.raises(UserError, match=f"gtFine.*{STEM}_gtFine_instanceIds.png.*soft-link"):
        cityscapes_evaluator.evaluate_masks(street, *detections(CARS[1]), tmp_path / "out")
