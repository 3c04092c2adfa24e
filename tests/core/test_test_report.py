"""What a test leaves for people, whichever metric its data set has."""

from __future__ import annotations

import json

import numpy as np
import pytest

from core.test_engine import score_detections
from core.test_report import write_reports
from core.test_results import DETECTIONS_FILE, DatasetResults
from datasets import voc_dataset_evaluator
from datasets.dataset_catalog import resolve_dataset
from datasets.json_dataset import JsonDataset


@pytest.fixture
def bccd(shared, cfg) -> JsonDataset:
    names = resolve_dataset(f"{shared / 'data/bccd'}:test").test_names
    cfg.TEST.DATASETS = names
    return JsonDataset(names[0])


def save_truth(dataset: JsonDataset, path) -> None:
    truth = voc_dataset_evaluator.ground_truth(dataset)
    boxes = [[[] for _ in dataset.image_ids]]
    for images, xyxy, _ in truth.values():
        rows = np.column_stack((xyxy - 1, np.full(len(xyxy), 0.9))).astype(np.float32)
        boxes.append([rows[images == i] for i in range(len(dataset.image_ids))])
    nothing = [[[] for _ in dataset.image_ids] for _ in dataset.classes]
    DatasetResults(boxes, nothing, nothing).save(path)


def test_voc_has_a_report_with_coco_metrics(bccd, tmp_path):
    save_truth(bccd, tmp_path / DETECTIONS_FILE)
    results = score_detections(tmp_path / DETECTIONS_FILE, tmp_path / "out")
    assert results[bccd.name]["box"]["AP50"] == pytest.approx(1.0)
    # Not this data set's numbers, as a folder used before may have them.
    (tmp_path / "out/detection_results.pkl").write_bytes(b"of another test")
    (file,) = write_reports(results, tmp_path / "out", tmp_path / DETECTIONS_FILE)
    html = file.read_text()
    assert file == tmp_path / "out/report.html"
    assert "own metric" in html
    for name in bccd.classes[1:]:
        assert f">{name}</td>" in html


def test_models_without_detections_leave_their_numbers(bccd, cfg, tmp_path):
    cfg.MODEL.RPN_ONLY = True
    results = {bccd.name: {"box_proposal": {"AR@100": 0.5}}}
    assert write_reports(results, tmp_path) == []
    assert json.loads((tmp_path / "metrics.json").read_text()) == results
