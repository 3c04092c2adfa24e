"""All scores of a data set's detections: box, mask and keypoint AP in one table of results."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from core.config import cfg
from core.errors import UserError
from datasets import cityscapes_evaluator, json_dataset_evaluator, voc_dataset_evaluator
from datasets.box_proposal_evaluator import average_recalls
from datasets.entry import RoidbEntry
from datasets.json_dataset import JsonDataset
from datasets.json_dataset_evaluator import Evaluation

logger = logging.getLogger(__name__)

# data set -> task -> metric -> value
Results = OrderedDict[str, OrderedDict[str, OrderedDict[str, float]]]

METRICS = {
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
    ahead: Mapping[str, Evaluation] | None = None,
) -> Results:
    """Score boxes and, as the model has them (MODEL.MASK_ON, KEYPOINTS_ON), masks and keypoints.

    Pascal VOC (`voc_...` and folders of its layout) has its own metric for boxes: mean AP at IoU
    > .5, as AP50, the other metrics -1. Masks of `cityscapes_...` have Cityscapes' own metric.
    TEST.FORCE_JSON_DATASET_EVAL scores both by COCO's rules.

    Detections as datasets.json_dataset_evaluator says. Result files go to output_dir. ahead: what
    datasets.scoring_ahead has scored already, and written there, by kind.
    Returns {dataset.name: {'box': {'AP', 'AP50', 'AP75', 'APs', 'APm', 'APl'}, 'mask': the same,
    'keypoint': the same without 'APs'}} with values in [0, 1], -1 where there is nothing to score.
    """
    output_dir = Path(output_dir)
    scores: OrderedDict[str, OrderedDict[str, float]] = OrderedDict()
    if scored_as_voc(dataset):
        aps = voc_dataset_evaluator.evaluate_boxes(dataset, all_boxes, output_dir)
        scores["box"] = _metrics("box", None)
        scores["box"]["AP50"] = voc_dataset_evaluator.mean_ap(aps)
        scores["box"].move_to_end("AP50", last=False)  # trainings keep the best by the first
    else:
        evaluate = partial(json_dataset_evaluator.evaluate_boxes, dataset, all_boxes, output_dir)
        scores["box"] = _metrics("box", _coco_stats("bbox", ahead, evaluate))
    if cfg.MODEL.MASK_ON:
        if cityscapes_evaluator.is_cityscapes(dataset) and not cfg.TEST.FORCE_JSON_DATASET_EVAL:
            scores["mask"] = _metrics("mask", None)
            found = cityscapes_evaluator.evaluate_masks(dataset, all_boxes, all_segms, output_dir)
            scores["mask"].update(found or {})
        else:
            evaluate = partial(
                json_dataset_evaluator.evaluate_masks, dataset, all_boxes, all_segms, output_dir
            )
            scores["mask"] = _metrics("mask", _coco_stats("segm", ahead, evaluate))
    if cfg.MODEL.KEYPOINTS_ON:
        evaluate = partial(
            json_dataset_evaluator.evaluate_keypoints, dataset, all_boxes, all_keyps, output_dir
        )
        scores["keypoint"] = _metrics("keypoint", _coco_stats("keypoints", ahead, evaluate))
    results: Results = OrderedDict([(dataset.name, scores)])
    log_copy_paste_friendly_results(results)
    return results


def scored_as_voc(dataset: JsonDataset) -> bool:
    """Whether boxes are scored by Pascal VOC's metric and not COCO's."""
    return voc_dataset_evaluator.is_voc(dataset) and not cfg.TEST.FORCE_JSON_DATASET_EVAL


def kinds_of_coco(dataset: JsonDataset) -> list[str]:
    """What evaluate_all would score by COCO's rules, if it is all, and as datasets.scoring_ahead
    does it; else []."""
    cityscapes = cfg.MODEL.MASK_ON and cityscapes_evaluator.is_cityscapes(dataset)
    other = scored_as_voc(dataset) or (cityscapes and not cfg.TEST.FORCE_JSON_DATASET_EVAL)
    if other or cfg.TEST.COCO_EVALUATOR != "fast":
        return []
    heads = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINTS_ON}
    return [kind for kind, there in heads.items() if there]


def _coco_stats(
    kind: str,
    ahead: Mapping[str, Evaluation] | None,
    evaluate: Callable[[], COCOeval | None],
) -> np.ndarray | None:
    if ahead is not None:
        return json_dataset_evaluator.log_evaluation(ahead[kind])
    coco_eval = evaluate()
    return None if coco_eval is None else coco_eval.stats


def _metrics(task: str, stats: Sequence[float] | None) -> OrderedDict[str, float]:
    names = METRICS[task]
    values = [-1.0] * len(names) if stats is None else stats[: len(names)]
    return OrderedDict((name, float(value)) for name, value in zip(names, values, strict=True))


def evaluate_box_proposals(dataset: JsonDataset, roidb: Sequence[RoidbEntry]) -> Results:
    """Average recall of the proposals in a roidb that also has the ground truth.

    Returns {dataset.name: {'box_proposal': {'AR@100', 'ARs@100', 'ARm@100', 'ARl@100', 'AR@1000',
    ...}}} with values in [0, 1], -1 where there is no object of the size.
    """
    metrics, _ = average_recalls(roidb, cfg.TEST.CLASS_SPECIFIC_AR)
    results: Results = OrderedDict([(dataset.name, OrderedDict([("box_proposal", metrics)]))])
    log_copy_paste_friendly_results(results)
    return results


def check_expected_results(
    results: Mapping[str, Mapping[str, Mapping[str, float]]],
    expected: Sequence[Sequence[Any]],
    atol: float = 0.005,
    rtol: float = 0.1,
    sigma_tol: float = 4,
) -> list[str]:
    """Compare results with EXPECTED_RESULTS; every comparison is logged.

    Args:
        results: data set -> task -> metric -> value.
        expected: entries [data set, task, metric, v]. v is a value, met by results that differ by
            at most atol + rtol * |v|; or [mean, standard deviation], met by results that lie
            strictly within sigma_tol deviations of the mean.

    Returns:
        a sentence for each expectation that is not met.

    Raises:
        UserError: an entry has another form, or names what was not tested.
    """
    failures = []
    for entry in expected:
        dataset, task, metric, wanted = parse_expectation(entry)
        try:
            value = results[dataset][task][metric]
        except KeyError as error:
            raise UserError(
                f"EXPECTED_RESULTS: {[dataset, task, metric]} was not tested ({error} is unknown); "
                f"the results have {_outline(results)}"
            ) from error
        if isinstance(wanted, float):
            met = abs(value - wanted) <= atol + rtol * abs(wanted)
            form = f"{wanted:.4f} +- {atol + rtol * abs(wanted):.4f}"
        else:
            mean, deviation = wanted
            met = abs(value - mean) < sigma_tol * deviation
            form = f"{mean:.4f} +- {sigma_tol} * {deviation:.4f}"
        sentence = f"{dataset} > {task} > {metric} is {value:.4f}, expected {form}"
        logger.log(
            logging.INFO if met else logging.ERROR, "%s: %s", ("FAIL", "PASS")[met], sentence
        )
        if not met:
            failures.append(sentence)
    return failures


def parse_expectation(entry: Any) -> tuple[str, str, str, float | tuple[float, float]]:
    """(data set, task, metric, v) of an entry of EXPECTED_RESULTS, v being a float or (mean,
    standard deviation). Raises UserError if it has another form."""

    def is_number(v: Any) -> bool:
        return isinstance(v, (int, float)) and not isinstance(v, bool)

    if isinstance(entry, (list, tuple)) and len(entry) == 4:
        *names, wanted = entry
        if all(isinstance(name, str) for name in names):
            if is_number(wanted):
                return *names, float(wanted)
            is_pair = isinstance(wanted, (list, tuple)) and len(wanted) == 2
            if is_pair and all(is_number(v) for v in wanted):
                return *names, (float(wanted[0]), float(wanted[1]))
    raise UserError(
        f"EXPECTED_RESULTS: {entry} is not [data set, task, metric, value] or [data set, task, "
        "metric, [mean, standard deviation]]"
    )


def _outline(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """`set > task > metric, metric ...; ...`"""
    return "; ".join(
        f"{dataset} > {task} > {', '.join(metrics)}"
        for dataset, tasks in results.items()
        for task, metrics in tasks.items()
    )


def log_copy_paste_friendly_results(results: Results) -> None:
    """Log, for each data set and task, a line of metric names and a line of values."""
    for dataset, tasks in results.items():
        logger.info("copypaste: Dataset: %s", dataset)
        for task, metrics in tasks.items():
            logger.info("copypaste: Task: %s", task)
            logger.info("copypaste: %s", ",".join(metrics))
            logger.info("copypaste: %s", ",".join(f"{value:.4f}" for value in metrics.values()))
