"""All scores of a data set's detections: box, mask and keypoint AP in one table of results."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from pycocotools.cocoeval import COCOeval

from core.config import cfg
from datasets import json_dataset_evaluator
from datasets.json_dataset import JsonDataset

logger = logging.getLogger(__name__)

# data set -> task -> metric -> value
Results = OrderedDict[str, OrderedDict[str, OrderedDict[str, float]]]

_METRICS = {
    "box": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "mask": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "keypoint": ("AP", "AP50", "AP75", "APm", "APl"),
}


def evaluate_all(
    dataset: JsonDataset,
    all_boxes: Sequence,
    all_segms: Sequence,
    all_keyps: Sequence,
    output_dir: str | Path,
) -> Results:
    """Score boxes and, as the model has them (MODEL.MASK_ON, KEYPOINTS_ON), masks and keypoints.

    Detections as datasets.json_dataset_evaluator says. Result files go to output_dir.
    Returns {dataset.name: {'box': {'AP', 'AP50', 'AP75', 'APs', 'APm', 'APl'}, 'mask': the same,
    'keypoint': the same without 'APs'}} with values in [0, 1], -1 where there is nothing to score.
    """
    output_dir = Path(output_dir)
    scores: OrderedDict[str, OrderedDict[str, float]] = OrderedDict()
    scores["box"] = _metrics(
        "box", json_dataset_evaluator.evaluate_boxes(dataset, all_boxes, output_dir)
    )
    if cfg.MODEL.MASK_ON:
        coco_eval = json_dataset_evaluator.evaluate_masks(dataset, all_boxes, all_segms, output_dir)
        scores["mask"] = _metrics("mask", coco_eval)
    if cfg.MODEL.KEYPOINTS_ON:
        coco_eval = json_dataset_evaluator.evaluate_keypoints(
            dataset, all_boxes, all_keyps, output_dir
        )
        scores["keypoint"] = _metrics("keypoint", coco_eval)
    results: Results = OrderedDict([(dataset.name, scores)])
    log_copy_paste_friendly_results(results)
    return results


def _metrics(task: str, coco_eval: COCOeval | None) -> OrderedDict[str, float]:
    names = _METRICS[task]
    values = [-1.0] * len(names) if coco_eval is None else coco_eval.stats[: len(names)]
    return OrderedDict((name, float(value)) for name, value in zip(names, values, strict=True))


def log_copy_paste_friendly_results(results: Results) -> None:
    """Log, for each data set and task, a line of metric names and a line of values."""
    for dataset, tasks in results.items():
        logger.info("copypaste: Dataset: %s", dataset)
        for task, metrics in tasks.items():
            logger.info("copypaste: Task: %s", task)
            logger.info("copypaste: %s", ",".join(metrics))
            logger.info("copypaste: %s", ",".join(f"{value:.4f}" for value in metrics.values()))
