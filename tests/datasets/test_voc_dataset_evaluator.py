"""Pascal VOC's metric beside a slow one that reads like the devkit, on real annotations."""

from __future__ import annotations

import pickle
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from datasets import task_evaluation, voc_dataset_evaluator
from datasets.dataset_catalog import register, resolve_dataset
from datasets.json_dataset import JsonDataset


@pytest.fixture
def bccd(shared, cfg) -> JsonDataset:
    return JsonDataset(resolve_dataset(f"{shared / 'data/bccd'}:test").test_names[0])


def truth_as_detections(dataset: JsonDataset) -> list:
    truth = voc_dataset_evaluator.ground_truth(dataset)
    found = [[[] for _ in dataset.image_ids]]
    for name in dataset.classes[1:]:
        images, boxes, difficult = truth[name]
        rows = np.column_stack((boxes - 1, np.ones(len(boxes))))
        found.append([rows[(images == i) & ~difficult] for i in range(len(dataset.image_ids))])
    return found


def random_detections(dataset: JsonDataset, rng: np.random.Generator) -> list:
    """Objects moved a little, some twice, and boxes anywhere; scores that tie when rounded."""
    found = truth_as_detections(dataset)
    for of_class in found[1:]:
        for i, boxes in enumerate(of_class):
            boxes = np.repeat(boxes, rng.integers(0, 3, len(boxes)), axis=0)
            boxes[:, :4] += rng.normal(0, 8, (len(boxes), 4))
            corner = rng.uniform(0, 400, (4, 2))
            size = rng.uniform(20, 150, (4, 2))
            anywhere = np.column_stack((corner, corner + size, np.ones(4)))
            boxes = np.concatenate((boxes, anywhere))
            boxes[:, 4] = rng.uniform(0, 1, len(boxes)).round(4)
            of_class[i] = boxes.astype(np.float32)
    return found


def slow_ap(folder: Path, split: str, name: str, file: Path, eleven_points: bool) -> float:
    """AP as the devkit's script has it: one detection after the other, from the files."""
    wanted, objects = 0, {}
    for stem in (folder / f"ImageSets/Main/{split}.txt").read_text().split():
        objects[stem] = []
        for obj in ElementTree.parse(folder / f"Annotations/{stem}.xml").findall("object"):
            if obj.findtext("name") == name:
                box = [float(obj.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax")]
                difficult = obj.findtext("difficult") == "1"
                objects[stem].append({"box": box, "difficult": difficult, "taken": False})
                wanted += not difficult
    lines = [line.split() for line in file.read_text().splitlines()]
    right, wrong, recall, precision = 0, 0, [], []
    for stem, _, *box in sorted(lines, key=lambda line: -float(line[1])):
        x1, y1, x2, y2 = map(float, box)
        best, nearest = -1.0, None
        for obj in objects[stem]:
            a1, b1, a2, b2 = obj["box"]
            w = max(min(x2, a2) - max(x1, a1) + 1, 0)
            h = max(min(y2, b2) - max(y1, b1) + 1, 0)
            union = (x2 - x1 + 1) * (y2 - y1 + 1) + (a2 - a1 + 1) * (b2 - b1 + 1) - w * h
            if w * h / union > best:
                best, nearest = w * h / union, obj
        if best > 0.5:
            if not nearest["difficult"]:
                right, wrong = (right, wrong + 1) if nearest["taken"] else (right + 1, wrong)
                nearest["taken"] = True
        else:
            wrong += 1
        recall.append(right / wanted)
        precision.append(right / max(right + wrong, 1e-16))
    if eleven_points:
        levels = np.arange(0.0, 1.1, 0.1)
        return sum(
            max([p for r, p in zip(recall, precision, strict=True) if r >= t], default=0) / 11
            for t in levels
        )
    area, last = 0.0, 0.0
    for i, r in enumerate(recall):
        area += (r - last) * max(precision[i:])
        last = r
    return area


def test_ground_truth_scores_one(bccd, tmp_path):
    found = truth_as_detections(bccd)
    results = task_evaluation.evaluate_all(bccd, found, [], [], tmp_path)
    assert results[bccd.name]["box"]["AP50"] == pytest.approx(1.0, abs=1e-12)
    assert results[bccd.name]["box"]["AP"] == -1  # VOC has no such metric


@pytest.mark.parametrize("year", [2007, 2012])
def test_random_results_score_as_by_the_devkit(bccd, shared, tmp_path, monkeypatch, year):
    monkeypatch.setattr(voc_dataset_evaluator, "metric_year", lambda name: year)
    found = random_detections(bccd, np.random.default_rng(0))
    aps = voc_dataset_evaluator.evaluate_boxes(bccd, found, tmp_path)
    for name, ap in aps.items():
        file = tmp_path / f"comp4_det_test_{name}.txt"
        assert ap == pytest.approx(
            slow_ap(shared / "data/bccd", "test", name, file, year < 2010), abs=1e-12
        )
        assert 0.05 < ap < 0.95
        with open(tmp_path / f"{name}_pr.pkl", "rb") as curve:
            assert pickle.load(curve)["ap"] == ap


def test_json_and_xml_score_alike(bccd, shared, tmp_path, monkeypatch):
    """The catalog's `voc_...` sets may be JSON; only boxes beyond the image differ."""
    file = shared / "data/bccd/annotations/instances_test.json"
    register("voc_of_json_test", file, shared / "data/bccd/JPEGImages")
    dataset = JsonDataset("voc_of_json_test")
    found = random_detections(bccd, np.random.default_rng(1))
    order = [bccd.classes.index(name) for name in dataset.classes]
    stems = [
        [Path(i["file_name"]).stem for i in d.COCO.loadImgs(d.image_ids)] for d in (bccd, dataset)
    ]
    images = [stems[0].index(stem) for stem in stems[1]]
    same = [[found[k][i] for i in images] for k in order]
    aps = voc_dataset_evaluator.evaluate_boxes(bccd, found, tmp_path / "xml")
    of_json = task_evaluation.evaluate_all(dataset, same, [], [], tmp_path / "json")
    expected = voc_dataset_evaluator.mean_ap(aps)
    assert of_json[dataset.name]["box"]["AP50"] == pytest.approx(expected, abs=0.01)


def test_difficult_objects_are_neither_wanted_nor_wrong():
    boxes = np.array([[1, 1, 10, 10], [21, 21, 30, 30]], dtype=float)
    images, difficult = np.array([0, 0]), np.array([False, True])
    dets = np.array([[0.9, 21, 21, 30, 30], [0.8, 21, 21, 30, 30], [0.7, 1, 1, 10, 10]])
    curve = voc_dataset_evaluator.class_curve(
        np.zeros(3, int), dets, images, boxes, difficult, 2012
    )
    assert curve.ap == 1
    curve = voc_dataset_evaluator.class_curve(
        np.zeros(3, int), dets, images, boxes, np.zeros(2, bool), 2012
    )
    assert curve.ap == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_half_an_overlap_is_not_enough():
    """VOC's limit is strict, and boxes are counted in whole pixels."""
    truth = np.array([0]), np.array([[1.0, 1, 10, 10]]), np.array([False])
    for right, ap in ((5, 0), (6, 1)):
        dets = np.array([[0.5, 1, 1, right, 10]])
        assert voc_dataset_evaluator.class_curve(np.array([0]), dets, *truth, 2007).ap == (
            pytest.approx(ap)
        )


def test_the_year_chooses_the_metric():
    assert voc_dataset_evaluator.metric_year("voc_2007_test") == 2007
    assert voc_dataset_evaluator.metric_year("VOC2009_val") == 2009
    assert voc_dataset_evaluator.metric_year("bccd_test") == 2010


def test_coco_rules_can_be_forced(bccd, cfg, tmp_path):
    cfg.TEST.FORCE_JSON_DATASET_EVAL = True
    boxes = [[[] for _ in bccd.image_ids] for _ in bccd.classes]
    results = task_evaluation.evaluate_all(bccd, boxes, [], [], tmp_path)
    assert results[bccd.name]["box"]["AP75"] == 0
    assert (tmp_path / f"bbox_{bccd.name}_results.json").exists()
