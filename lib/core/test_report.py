"""The reports of tests: what `tools/test_net.py` leaves for people in each output folder."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

from pycocotools.cocoeval import COCOeval

from core.config import cfg
from core.test_results import DETECTIONS_FILE, load_detections
from datasets import json_dataset_evaluator
from datasets.json_dataset import JsonDataset
from datasets.report import Detections, write_report
from datasets.task_evaluation import Results, scored_as_voc
from utils.weights import atomic_write

REPORT_FILE = "report.html"
METRICS_FILE = "metrics.json"


def write_reports(
    results: Results, output_dir: str | Path, detections: str | Path | None = None
) -> list[Path]:
    """Write `metrics.json` (results, for tools/compare_runs.py) for the data sets of
    cfg.TEST.DATASETS and `report.html` for those that have been scored.

    Args:
        results: data set -> task -> metric -> value.
        output_dir: where the tests' results are, in folders of the data sets if there are several.
        detections: the detections file, if it is not in output_dir.

    Returns:
        the reports. None for models without detections or data without annotations.
    """
    written = []
    names = cfg.TEST.DATASETS
    for name in names:
        folder = Path(output_dir) / name if len(names) > 1 else Path(output_dir)
        with atomic_write(folder / METRICS_FILE) as file:
            file.write(json.dumps({name: results[name]}, indent=2).encode())
        dataset = JsonDataset(name)
        if cfg.MODEL.RPN_ONLY or not dataset.has_annotations:
            continue
        found, _ = load_detections(detections or folder / DETECTIONS_FILE)
        evaluations, notes = _evaluations(dataset, found.all_boxes, folder)
        shown = Detections(
            found.all_boxes,
            found.all_segms if cfg.MODEL.MASK_ON else None,
            found.all_keyps if cfg.MODEL.KEYPOINTS_ON else None,
        )
        write_report(dataset, shown, evaluations, folder / REPORT_FILE, notes)
        written.append(folder / REPORT_FILE)
    return written


def _evaluations(
    dataset: JsonDataset, all_boxes: list, folder: Path
) -> tuple[dict[str, COCOeval], list[str]]:
    """The evaluations that the test has just pickled, by task, and what to say of them."""
    evaluations, notes = {}, []
    for task, kind, wanted in (
        ("box", "detection", not scored_as_voc(dataset)),
        ("mask", "segmentation", cfg.MODEL.MASK_ON),
        ("keypoint", "keypoint", cfg.MODEL.KEYPOINTS_ON),
    ):
        path = folder / f"{kind}_results.pkl"
        if wanted and path.exists():
            with open(path, "rb") as file:
                evaluations[task] = pickle.load(file)
    if "box" not in evaluations:
        evaluations["box"] = json_dataset_evaluator.score_boxes(dataset, all_boxes)
        notes.append(
            "The data set's own metric is in the log and in the files beside this one; here are "
            "COCO's metrics."
        )
    return evaluations, notes
