"""Scoring: perfect detections score 1, none score 0, and files are where Detectron's are."""

from __future__ import annotations

import json

import numpy as np
import pytest

import utils.segms as segm_utils
from datasets import task_evaluation
from datasets.dataset_catalog import resolve_dataset
from datasets.json_dataset import JsonDataset


def ground_truth_as_detections(dataset: JsonDataset):
    """(all_boxes, all_segms, all_keyps) with score 1 for every object that is not crowd."""
    roidb = dataset.get_roidb(gt=True)
    boxes, segms, keyps = ([[[] for _ in roidb] for _ in dataset.classes] for _ in range(3))
    for i, entry in enumerate(roidb):
        wanted = ~entry["is_crowd"]
        if "gt_keypoints" in entry:  # COCO does not score persons without a labelled point
            wanted &= (entry["gt_keypoints"][:, 2] > 0).any(axis=1)
        for j in np.flatnonzero(wanted):
            label = entry["gt_classes"][j]
            boxes[label][i].append([*entry["boxes"][j], 1.0])
            segm = entry["segms"][j]
            if not isinstance(segm, dict):
                mask = segm_utils.polys_to_mask(segm, entry["height"], entry["width"])
                segm = segm_utils.mask_to_rle(mask)
            segms[label][i].append(segm)
            if "gt_keypoints" in entry:
                x, y, _ = entry["gt_keypoints"][j]
                keyps[label][i].append(np.stack((x, y, 0 * x, 0 * x)).astype(np.float32))
    return [[np.array(b) if b else [] for b in row] for row in boxes], segms, keyps


def resolve(shared, annotations: str, images: str) -> JsonDataset:
    data = shared / "data"
    return JsonDataset(resolve_dataset(f"{data / annotations}:{data / images}").test_names[0])


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("coco/annotations/instances_val2017.json", "coco/images/val2017"),
        ("nuclei/annotations/instances_val.json", "nuclei/images"),
    ],
)
def test_ground_truth_scores_one(cfg, shared, tmp_path, annotations, images):
    cfg.MODEL.MASK_ON = True
    dataset = resolve(shared, annotations, images)
    detections = ground_truth_as_detections(dataset)
    results = task_evaluation.evaluate_all(dataset, *detections, tmp_path)
    for task in ("box", "mask"):
        values = results[dataset.name][task]
        assert list(values) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
        for value in values.values():
            assert value == pytest.approx(1.0, abs=1e-6) or value == -1  # no object of the size


def test_ground_truth_keypoints_score_one(cfg, shared, tmp_path):
    cfg.MODEL.KEYPOINTS_ON = True
    file = "coco/annotations/person_keypoints_val2017.json"
    dataset = resolve(shared, file, "coco/images/val2017")
    detections = ground_truth_as_detections(dataset)
    results = task_evaluation.evaluate_all(dataset, *detections, tmp_path)
    values = results[dataset.name]["keypoint"]
    assert list(values) == ["AP", "AP50", "AP75", "APm", "APl"]
    assert values["AP"] == pytest.approx(1.0, abs=1e-6)


def test_wrong_class_and_missing_detections_cost_precision(cfg, tiny_dataset, tmp_path):
    dataset = JsonDataset(tiny_dataset.train_names[0])
    boxes, segms, keyps = ground_truth_as_detections(dataset)
    half = [boxes[0], boxes[1], [[] for _ in boxes[2]]]  # nothing found of the second class
    results = task_evaluation.evaluate_all(dataset, half, segms, keyps, tmp_path)
    assert results[dataset.name]["box"]["AP"] == pytest.approx(0.5)


def test_no_detection_scores_zero(cfg, tiny_dataset, tmp_path):
    dataset = JsonDataset(tiny_dataset.train_names[0])
    cfg.MODEL.MASK_ON = True
    nothing = [[[] for _ in dataset.image_ids] for _ in dataset.classes]
    results = task_evaluation.evaluate_all(dataset, nothing, nothing, nothing, tmp_path)
    assert results[dataset.name]["box"]["AP"] == 0
    assert results[dataset.name]["mask"]["AP"] == 0


def test_result_files(cfg, tiny_dataset, tmp_path):
    cfg.MODEL.MASK_ON = True
    dataset = JsonDataset(tiny_dataset.train_names[0])
    detections = ground_truth_as_detections(dataset)
    task_evaluation.evaluate_all(dataset, *detections, tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        f"bbox_{dataset.name}_results.json",
        f"segmentations_{dataset.name}_results.json",
        "detection_results.pkl",
        "segmentation_results.pkl",
    }
    first = json.loads((tmp_path / "out" / f"bbox_{dataset.name}_results.json").read_text())[0]
    # Written as COCO's [x, y, width, height] and with the file's own category id.
    assert first == {
        "image_id": 1,
        "category_id": 7,
        "bbox": [10.0, 20.0, 30.0, 40.0],
        "score": 1.0,
    }


def test_outside_competition_mode_result_files_are_removed(cfg, tiny_dataset, tmp_path):
    cfg.TEST.COMPETITION_MODE = False
    dataset = JsonDataset(tiny_dataset.train_names[0])
    task_evaluation.evaluate_all(dataset, *ground_truth_as_detections(dataset), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["detection_results.pkl"]


def test_results_of_a_data_set_without_annotations_are_only_written(cfg, tiny_files, tmp_path):
    data = json.loads(tiny_files.annotations.read_text())
    del data["annotations"]
    file = tmp_path / "image_info.json"
    file.write_text(json.dumps(data))
    dataset = JsonDataset(resolve_dataset(f"{file}:{tiny_files.images}").test_names[0])
    boxes = [[[] for _ in dataset.image_ids] for _ in dataset.classes]
    boxes[1][0] = np.array([[0, 0, 9, 9, 0.5]])
    results = task_evaluation.evaluate_all(dataset, boxes, boxes, boxes, tmp_path / "out")
    assert results[dataset.name]["box"]["AP"] == -1
    assert (tmp_path / "out" / f"bbox_{dataset.name}_results.json").exists()


def test_class_table_ranks_classes(cfg, tiny_dataset, tmp_path, caplog):
    dataset = JsonDataset(tiny_dataset.train_names[0])
    boxes, segms, keyps = ground_truth_as_detections(dataset)
    boxes[1] = [[] for _ in boxes[1]]
    with caplog.at_level("INFO"):
        task_evaluation.evaluate_all(dataset, boxes, segms, keyps, tmp_path)
    table = next(r.getMessage() for r in caplog.records if "AP of each class" in r.getMessage())
    assert table.splitlines()[1].split() == ["dog", "100.0", "|", "cat", "0.0"]
    assert "Average Precision" in caplog.text
