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
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from pycocotools.cocoeval import COCOeval

import utils.boxes as box_utils
import utils.segms as segm_utils
from core.config import cfg
from datasets import coco_scoring
from datasets.json_dataset import JsonDataset
from utils.weights import atomic_write

logger = logging.getLogger(__name__)


def evaluate_boxes(dataset: JsonDataset, all_boxes: Sequence, output_dir: Path) -> COCOeval | None:
    """Write `bbox_{dataset}_results.json`, score it, and pickle the COCOeval.

    Returns the COCOeval, None if the data set has no annotations (test sets of a server).
    """
    return _evaluate(dataset, _box_results(dataset, all_boxes), "bbox", output_dir)


def score_boxes(dataset: JsonDataset, all_boxes: Sequence) -> COCOeval:
    """As evaluate_boxes, without writing anything."""
    return _score(dataset, _box_results(dataset, all_boxes), "bbox")


def _box_results(dataset: JsonDataset, all_boxes: Sequence) -> list[dict]:
    return [
        {"bbox": box, "score": score, **ids}
        for boxes, ids in _per_image(dataset, all_boxes)
        for box, score in _xywh_and_scores(boxes)
    ]


def evaluate_masks(
    dataset: JsonDataset, all_boxes: Sequence, all_segms: Sequence, output_dir: Path
) -> COCOeval | None:
    """As evaluate_boxes, for masks: `segmentations_{dataset}_results.json`."""
    results = []
    for boxes, segms, ids in _per_image(dataset, all_boxes, all_segms):
        for score, segm in zip(np.asarray(boxes)[:, -1].tolist(), segms, strict=True):
            counts = segm_utils.compress_rle(segm)["counts"].decode("ascii")
            rle = {"size": list(segm["size"]), "counts": counts}
            results.append({"segmentation": rle, "score": score, **ids})
    return _evaluate(dataset, results, "segm", output_dir)


def evaluate_keypoints(
    dataset: JsonDataset, all_boxes: Sequence, all_keyps: Sequence, output_dir: Path
) -> COCOeval | None:
    """As evaluate_boxes, for keypoints: `keypoints_{dataset}_results.json`.

    The score is that of KRCNN.KEYPOINT_CONFIDENCE: the box's, or the points' mean logit or
    probability.
    """
    confidence = cfg.KRCNN.KEYPOINT_CONFIDENCE
    results = []
    for boxes, keyps, ids in _per_image(dataset, all_boxes, all_keyps):
        for box, points in zip(boxes, keyps, strict=True):
            row = {"bbox": -1, "logit": 2, "prob": 3}[confidence]
            score = box[-1] if confidence == "bbox" else np.mean(points[row])
            triples = np.stack((points[0], points[1], np.ones(len(points[0]))), axis=1)
            flat = triples.reshape(-1).astype(np.float64).tolist()
            results.append({"keypoints": flat, "score": float(score), **ids})
    return _evaluate(dataset, results, "keypoints", output_dir)


def _per_image(dataset: JsonDataset, *detections: Sequence) -> Iterator[tuple]:
    """(detections of one label in one image ..., ids for the result file) where there are any."""
    for label, category_id in dataset.contiguous_category_id_to_json_id.items():
        of_label = [kind[label] for kind in detections]
        for found in zip(*of_label, dataset.image_ids, strict=True):
            if len(found[0]):
                yield *found[:-1], {"image_id": found[-1], "category_id": category_id}


def _xywh_and_scores(boxes: np.ndarray) -> Iterator[tuple[list[float], float]]:
    dets = np.asarray(boxes, dtype=np.float64)
    return zip(box_utils.xyxy_to_xywh(dets[:, :4]).tolist(), dets[:, 4].tolist(), strict=True)


_FILE_NAMES = {"bbox": "bbox", "segm": "segmentations", "keypoints": "keypoints"}
_PICKLE_NAMES = {"bbox": "detection", "segm": "segmentation", "keypoints": "keypoint"}


def _evaluate(
    dataset: JsonDataset, results: list[dict], kind: str, output_dir: Path
) -> COCOeval | None:
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    # Outside competition mode results are scratch: a name of their own, removed after scoring.
    salt = "" if cfg.TEST.COMPETITION_MODE else f"_{uuid.uuid4()}"
    path = output_dir / f"{_FILE_NAMES[kind]}_{dataset.name}_results{salt}.json"
    with atomic_write(path) as file:
        file.write(json.dumps(results).encode())
    if not dataset.has_annotations:
        logger.info("%s has no annotations to score by; results are in %s", dataset.name, path)
        return None
    coco_eval = _score(dataset, results, kind)
    with atomic_write(output_dir / f"{_PICKLE_NAMES[kind]}_results.pkl") as file:
        pickle.dump(coco_eval, file, pickle.HIGHEST_PROTOCOL)
    if salt:
        path.unlink()
    else:
        logger.info("Wrote %s", path)
    return coco_eval


def _score(dataset: JsonDataset, results: list[dict], kind: str) -> COCOeval:
    """Score the images of the data set; log COCO's summary and the AP of each class."""
    sigmas = _sigmas(dataset) if kind == "keypoints" else None
    coco_eval = coco_scoring.evaluate(
        dataset.COCO, results, kind, dataset.image_ids, cfg.TEST.COCO_EVALUATOR, sigmas
    )
    summary = io.StringIO()
    with contextlib.redirect_stdout(summary):
        coco_eval.summarize()
    task = {"bbox": "box", "segm": "mask", "keypoints": "keypoint"}[kind]
    logger.info("%s, %s:\n%s", dataset.name, task, summary.getvalue().rstrip())
    logger.info("AP of each class, %s:\n%s", task, class_table(dataset, coco_eval))
    return coco_eval


def _sigmas(dataset: JsonDataset) -> np.ndarray | None:
    sigmas = coco_scoring.keypoint_sigmas(dataset.COCO)
    if sigmas is not None:
        text = ", ".join(f"{sigma:.3f}" for sigma in sigmas)
        logger.info("%s: sigmas of its %d keypoints: %s", dataset.name, len(sigmas), text)
    return sigmas


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
