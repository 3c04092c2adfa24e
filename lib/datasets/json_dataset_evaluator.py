"""Scoring detections by COCO's rules, and COCO's result files.

Detections come as core.test_engine collects them: `all_boxes[label][image]` float (N, 5) rows
x1, y1, x2, y2, score (or []), `all_segms[label][image]` lists of N RLEs, `all_keyps[label][image]`
lists of N (4, K) arrays (x, y, logit, probability). Images are in the order of
`JsonDataset.image_ids`, coordinates in image pixels; label 0 is empty.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import pickle
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools.cocoeval import COCOeval

from core.config import cfg
from datasets import coco_scoring
from datasets.coco_matching import Arrays
from datasets.coco_results import KindOfResults, Part, image_found, joined_text
from datasets.forked_pool import in_processes
from datasets.json_dataset import JsonDataset
from utils.weights import atomic_write

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The scores of a kind of results, and what is to be said about them."""

    stats: np.ndarray | None  # of COCOeval; None: there is nothing to score by
    messages: list[str]


def evaluate_boxes(dataset: JsonDataset, all_boxes: Sequence, output_dir: Path) -> COCOeval | None:
    """Write `bbox_{dataset}_results.json`, score it, and pickle the COCOeval.

    Returns the COCOeval, None if the data set has no annotations (test sets of a server).
    """
    return _evaluate(dataset, "bbox", output_dir, all_boxes)


def score_boxes(dataset: JsonDataset, all_boxes: Sequence) -> COCOeval:
    """As evaluate_boxes, without writing anything."""
    results = kind_of_results(dataset, "bbox", written=not _matched_here())
    coco_eval = _scored(results, _parts(results, all_boxes))
    _log(_summary(results, coco_eval))
    return coco_eval


def evaluate_masks(
    dataset: JsonDataset, all_boxes: Sequence, all_segms: Sequence, output_dir: Path
) -> COCOeval | None:
    """As evaluate_boxes, for masks: `segmentations_{dataset}_results.json`."""
    return _evaluate(dataset, "segm", output_dir, all_boxes, all_segms=all_segms)


def evaluate_keypoints(
    dataset: JsonDataset, all_boxes: Sequence, all_keyps: Sequence, output_dir: Path
) -> COCOeval | None:
    """As evaluate_boxes, for keypoints: `keypoints_{dataset}_results.json`.

    The score is that of KRCNN.KEYPOINT_CONFIDENCE: the box's, or the points' mean logit or
    probability.
    """
    return _evaluate(dataset, "keypoints", output_dir, all_boxes, all_keyps=all_keyps)


def log_evaluation(evaluation: Evaluation) -> np.ndarray | None:
    """Say what is to be said; the scores."""
    _log(evaluation.messages)
    return evaluation.stats


_TASKS = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}
_FILE_NAMES = {"bbox": "bbox", "segm": "segmentations", "keypoints": "keypoints"}
_PICKLE_NAMES = {"bbox": "detection", "segm": "segmentation", "keypoints": "keypoint"}


def _evaluate(
    dataset: JsonDataset,
    kind: str,
    output_dir: Path,
    all_boxes: Sequence,
    all_segms: Sequence | None = None,
    all_keyps: Sequence | None = None,
) -> COCOeval | None:
    results = kind_of_results(dataset, kind)
    parts = _parts(results, all_boxes, all_segms, all_keyps)
    messages = write_results(results, parts, output_dir)
    coco_eval = None
    if dataset.has_annotations:
        coco_eval = _scored(results, parts)
        messages = _summary(results, coco_eval) + messages
        _pickle(coco_eval, kind, output_dir)
    _log(messages)
    return coco_eval


def score_sums(results: KindOfResults, whole: Arrays, output_dir: Path) -> Evaluation:
    """What _evaluate does once all is matched and added up, but for write_results."""
    coco_eval = coco_scoring.complete(results.unscored, whole)
    messages = _summary(results, coco_eval)
    _pickle(coco_eval, results.kind, output_dir)
    return Evaluation(coco_eval.stats, messages)


def kind_of_results(dataset: JsonDataset, kind: str, written: bool | None = None) -> KindOfResults:
    """How the results of a kind are scored and written as the config asks for it."""
    unscored = None
    if dataset.has_annotations and _matched_here():
        sigmas = coco_scoring.keypoint_sigmas(dataset.COCO) if kind == "keypoints" else None
        unscored = coco_scoring.unscored(dataset.COCO, kind, dataset.image_ids, sigmas)
    if written is None:
        written = unscored is None or cfg.TEST.COMPETITION_MODE
    return KindOfResults(kind, dataset, unscored, written, cfg.KRCNN.KEYPOINT_CONFIDENCE)


def _matched_here() -> bool:
    return cfg.TEST.COCO_EVALUATOR == "fast"


def _parts(
    results: KindOfResults,
    all_boxes: Sequence,
    all_segms: Sequence | None = None,
    all_keyps: Sequence | None = None,
) -> list[Part]:
    """The results of all images, made in as many processes as pay."""
    count = len(results.dataset.image_ids)
    for kind in (all_boxes, all_segms, all_keyps):
        if kind is not None and {len(of_label) for of_label in kind} != {count}:
            raise ValueError(f"{results.dataset.name} has {count} images, the detections others")
    found = sum(len(boxes) for of_label in all_boxes for boxes in of_label)
    processes = coco_scoring.processes_that_pay(found)
    step = coco_scoring.images_at_once(count, processes)

    def of_image(kind: Sequence | None, position: int) -> list | None:
        return None if kind is None else [of_label[position] for of_label in kind]

    def part(begin: int) -> Part:
        return results.part(
            [
                image_found(i, *(of_image(kind, i) for kind in (all_boxes, all_segms, all_keyps)))
                for i in range(begin, min(begin + step, count))
            ]
        )

    return in_processes(part, range(0, count, step), processes)


def write_results(results: KindOfResults, parts: Sequence[Part], output_dir: Path) -> list[str]:
    """Write the result file if it is to stay; what there is to say about it.

    Outside competition mode it would only be scratch, but for a data set without annotations.
    """
    dataset = results.dataset
    if dataset.has_annotations and not cfg.TEST.COMPETITION_MODE:
        return []
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    salt = "" if cfg.TEST.COMPETITION_MODE else f"_{uuid.uuid4()}"
    path = output_dir / f"{_FILE_NAMES[results.kind]}_{dataset.name}_results{salt}.json"
    with atomic_write(path, synced=False) as file:  # detections.pkl is: it can be made again
        file.writelines(joined_text(parts))
    if not dataset.has_annotations:
        return [f"{dataset.name} has no annotations to score by; results are in {path}"]
    return [f"Wrote {path}"]


def _scored(results: KindOfResults, parts: Sequence[Part]) -> COCOeval:
    dataset, kind = results.dataset, results.kind
    if results.unscored is not None:
        whole = coco_scoring.sums(results.unscored, [part.matches for part in parts])
        return coco_scoring.complete(results.unscored, whole)
    sigmas = coco_scoring.keypoint_sigmas(dataset.COCO) if kind == "keypoints" else None
    listed = json.loads(b"".join(joined_text(parts)))
    return coco_scoring.evaluate(
        dataset.COCO, listed, kind, dataset.image_ids, cfg.TEST.COCO_EVALUATOR, sigmas
    )


def _summary(results: KindOfResults, coco_eval: COCOeval) -> list[str]:
    """COCO's summary and the AP of each class; fills coco_eval.stats."""
    dataset, task = results.dataset, _TASKS[results.kind]
    messages = []
    if results.kind == "keypoints":
        sigmas = coco_scoring.keypoint_sigmas(dataset.COCO)
        if sigmas is not None:
            text = ", ".join(f"{sigma:.3f}" for sigma in sigmas)
            messages.append(f"{dataset.name}: sigmas of its {len(sigmas)} keypoints: {text}")
    summary = io.StringIO()
    with contextlib.redirect_stdout(summary):
        coco_eval.summarize()
    messages.append(f"{dataset.name}, {task}:\n{summary.getvalue().rstrip()}")
    messages.append(f"AP of each class, {task}:\n{class_table(dataset, coco_eval)}")
    return messages


def _pickle(coco_eval: COCOeval, kind: str, output_dir: Path) -> None:
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(output_dir / f"{_PICKLE_NAMES[kind]}_results.pkl", synced=False) as file:
        pickle.dump(coco_eval, file, pickle.HIGHEST_PROTOCOL)


def _log(messages: Sequence[str]) -> None:
    for message in messages:
        logger.info("%s", message)


def class_average_precision(dataset: JsonDataset, coco_eval: COCOeval) -> dict[str, float]:
    """AP of each class, averaged over IoU .50:.95, all areas; NaN for a class without objects."""
    precision = coco_eval.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class
    names = [c["name"] for c in dataset.COCO.loadCats(coco_eval.params.catIds)]
    averages = {}
    for i, name in enumerate(names):
        valid = precision[:, :, i][precision[:, :, i] > -1]
        averages[name] = float(valid.mean()) if valid.size else float("nan")
    return averages


def class_table(dataset: JsonDataset, coco_eval: COCOeval, columns: int = 4) -> str:
    """The AP of each class as text, best first, classes without objects last, in columns."""
    averages = class_average_precision(dataset, coco_eval)
    ranked = sorted(averages.items(), key=lambda item: (np.isnan(item[1]), -item[1], item[0]))
    cells = [
        (name, "-" if np.isnan(average) else f"{100 * average:.1f}") for name, average in ranked
    ]
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    width = max(len(name) for name, _ in cells)
    lines = []
    for row in range(rows):
        line = [f"{name:<{width}} {value:>5}" for name, value in cells[row::rows]]
        lines.append(" | ".join(line))
    return "\n".join(lines)
