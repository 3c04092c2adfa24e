"""What `tools/benchmark.py eval` measures: COCO's metrics by pycocotools and as this project does,
in one process and in as many as it takes.

Results are made from real annotations: each object is found once or more, a little displaced,
sometimes as another class or not at all, among detections of nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import utils.segms as segm_utils
from core.benchmark_test import repeat_dataset
from core.errors import UserError
from datasets import coco_scoring
from datasets.dataset_catalog import resolve_dataset
from datasets.json_dataset import JsonDataset

FOUND = 0.9  # share of the objects that are found
OTHER_CLASS = 0.1  # share of the detections that have the wrong class
FALSE_PER_IMAGE = 25  # detections of nothing in an image
SHIFT = 0.08  # standard deviation of the displacement, in sides of the box


@dataclass(frozen=True)
class EvaluationTime:
    """Seconds from results in memory to metrics, and the largest difference in any number."""

    kind: str
    results: int
    reference_seconds: float
    alone_seconds: float  # in one process
    fast_seconds: float
    processes: int
    difference: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"share": self.fast_seconds / self.reference_seconds}


def measure(spec: str, num_images: int, seed: int = 0) -> Iterator[EvaluationTime]:
    """Time both evaluators on boxes and, where there are any, masks and keypoints.

    spec: as --dataset; its test images, repeated to num_images, are the ground truth.
    Raises UserError if it names none.
    """
    names = resolve_dataset(spec).test_names
    if not names:
        raise UserError(f"--dataset {spec} names no images to test on: add val: to it.")
    with tempfile.TemporaryDirectory() as folder:
        dataset = repeat_dataset(JsonDataset(names[0]), num_images, Path(folder))
        for kind, results in synthesise(dataset, np.random.default_rng(seed)).items():
            if results:
                yield _compare(dataset, kind, results)


def _compare(dataset: JsonDataset, kind: str, results: list[dict]) -> EvaluationTime:
    sigmas = coco_scoring.keypoint_sigmas(dataset.COCO)
    processes = coco_scoring.default_processes()
    cases = {"alone": ("fast", 1), "fast": ("fast", processes), "reference": ("pycocotools", 1)}
    seconds, scored = {}, {}
    for name, (evaluator, number) in cases.items():
        begin = time.perf_counter()
        scored[name] = coco_scoring.evaluate(
            dataset.COCO, results, kind, dataset.image_ids, evaluator, sigmas, number
        )
        seconds[f"{name}_seconds"] = time.perf_counter() - begin
    difference = max(
        float(np.abs(scored[name].eval[key] - scored["reference"].eval[key]).max())
        for name in ("alone", "fast")
        for key in ("precision", "recall", "scores")
    )
    return EvaluationTime(kind, len(results), processes=processes, difference=difference, **seconds)


def synthesise(dataset: JsonDataset, rng: np.random.Generator) -> dict[str, list[dict]]:
    """Results in COCO's form: 'bbox', 'segm' and 'keypoints' -> list, empty where the annotations
    have none. Scores have three digits, so some are equal."""
    coco = dataset.COCO
    results: dict[str, list[dict]] = {"bbox": [], "segm": [], "keypoints": []}
    categories = sorted(coco.cats)
    # Of an image's objects: the same image may come again, under another id.
    masks: dict[tuple[str, int], np.ndarray] = {}
    for image_id in dataset.image_ids:
        image = coco.imgs[image_id]
        height, width = image["height"], image["width"]
        for number, found in enumerate(coco.imgToAnns.get(image_id, [])):
            if rng.random() > FOUND:
                continue
            for _ in range(rng.integers(1, 3)):
                other = rng.random() < OTHER_CLASS
                category = int(rng.choice(categories)) if other else found["category_id"]
                score = round(float(rng.random()), 3)
                ids = {"image_id": image_id, "category_id": category, "score": score}
                box = np.array(found["bbox"], dtype=float)
                shift = np.rint(rng.normal(0, SHIFT, 2) * box[2:])
                results["bbox"].append(ids | {"bbox": [*(box[:2] + shift), *box[2:]]})
                if found["segmentation"]:
                    key = image["file_name"], number
                    if key not in masks:
                        masks[key] = coco.annToMask(coco_scoring.with_mask(found, image))
                    moved = np.roll(masks[key], shift[::-1].astype(int), (0, 1))
                    results["segm"].append(ids | {"segmentation": _text_rle(moved)})
                if any(found.get("keypoints", ())):
                    points = np.array(found["keypoints"], dtype=float).reshape(-1, 3)
                    points[:, :2] += rng.normal(0, SHIFT / 2, points[:, :2].shape) * box[2:]
                    points[:, 2] = 1
                    ids = ids | {"category_id": found["category_id"]}
                    results["keypoints"].append(ids | {"keypoints": points.reshape(-1).tolist()})
        for _ in range(FALSE_PER_IMAGE):
            w, h = rng.uniform(0.05, 0.5, 2) * (width, height)
            x, y = rng.uniform(0, 1, 2) * (width - w, height - h)
            score = round(float(rng.random() ** 2), 3)
            ids = {"image_id": image_id, "category_id": int(rng.choice(categories)), "score": score}
            results["bbox"].append(ids | {"bbox": [x, y, w, h]})
            if results["segm"]:
                blob = np.zeros((height, width), np.uint8)
                rows, columns = np.ogrid[:height, :width]
                inside = ((rows - y) / h - 0.5) ** 2 + ((columns - x) / w - 0.5) ** 2 < 0.25
                blob[inside] = 1
                results["segm"].append(ids | {"segmentation": _text_rle(blob)})
    return results


def _text_rle(mask: np.ndarray) -> dict[str, Any]:
    rle = segm_utils.mask_to_rle(mask)
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def table(times: list[EvaluationTime]) -> str:
    """The figures as text."""
    head = ("pycocotools", "1 process", "share", f"{times[0].processes} processes", "share")
    lines = [f"{'':10} {'results':>9}" + "".join(f" {h:>12}" for h in head) + "  difference"]
    for t in times:
        line = f"{t.kind:10} {t.results:9} {t.reference_seconds:10.2f} s"
        for seconds in (t.alone_seconds, t.fast_seconds):
            line += f" {seconds:10.2f} s {100 * seconds / t.reference_seconds:10.1f} %"
        lines.append(f"{line}  {t.difference:.1e}")
    return "\n".join(lines)
