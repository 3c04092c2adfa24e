"""Pascal VOC's own metric: precision at IoU > .5, by the devkit's files and rounding."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets import voc_xml
from datasets.json_dataset import JsonDataset
from utils.weights import atomic_write

logger = logging.getLogger(__name__)

MIN_OVERLAP = 0.5  # a detection is right if it overlaps an object by more than this
FIRST_AREA_YEAR = 2010  # from here on AP is the area under the curve, before it has 11 points


@dataclass(frozen=True)
class VocCurve:
    """Precision over recall of one class, detections by falling score.

    recall, precision: float64 (D,); ap: NaN if the data set has no (easy) object of the class.
    """

    recall: np.ndarray
    precision: np.ndarray
    ap: float


def is_voc(dataset: JsonDataset) -> bool:
    """Whether a data set is scored as VOC: named `voc_...`, or read from a folder of its layout."""
    return dataset.name.startswith("voc_") or voc_xml.is_split_file(dataset.annotation_file)


def metric_year(name: str) -> int:
    """The year in a data set's name, whose metric is used; the latest if there is none."""
    found = re.search(r"(?<!\d)(19|20)\d\d(?!\d)", name)
    return int(found.group()) if found else FIRST_AREA_YEAR


def evaluate_boxes(
    dataset: JsonDataset, all_boxes: Sequence, output_dir: str | Path
) -> dict[str, float]:
    """Score boxes (as in datasets.json_dataset_evaluator) as VOC's devkit does.

    Writes `comp4_det_{set}_{class}.txt` (image, score with 3 digits, box counted from 1 with one
    digit) and `{class}_pr.pkl` (a dict of rec, prec, ap) into output_dir. What is scored is what
    the text files say, so their rounding counts, as with the devkit. Objects marked difficult are
    neither wanted nor wrong to find.

    Returns:
        AP by class name, NaN for a class without objects. 11 points for VOC before 2010, else the
        area under the curve's envelope.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    stems = [Path(image["file_name"]).stem for image in dataset.COCO.loadImgs(dataset.image_ids)]
    is_split = voc_xml.is_split_file(dataset.annotation_file)
    split = dataset.annotation_file.stem if is_split else dataset.name.rpartition("_")[2]
    year = metric_year(dataset.name)
    truth = ground_truth(dataset)
    aps = {}
    for label, name in enumerate(dataset.classes[1:], start=1):
        lines = _lines(stems, all_boxes[label])
        with atomic_write(output_dir / f"comp4_det_{split}_{_file_name(name)}.txt") as file:
            file.write("".join(lines).encode())
        owners, rows = _parse(lines, stems)
        curve = class_curve(owners, rows, *truth[name], year)
        content = {"rec": curve.recall, "prec": curve.precision, "ap": curve.ap}
        with atomic_write(output_dir / f"{_file_name(name)}_pr.pkl") as file:
            pickle.dump(content, file, pickle.HIGHEST_PROTOCOL)
        aps[name] = curve.ap
    metric = "11 points" if year < FIRST_AREA_YEAR else "area under the curve"
    table = "\n".join(f"{n:<16} {100 * ap:5.1f}" for n, ap in sorted(aps.items(), key=_by_ap))
    logger.info("%s, AP of each class as VOC's (%s):\n%s", dataset.name, metric, table)
    logger.info("%s, mean AP: %.4f", dataset.name, mean_ap(aps))
    return aps


def mean_ap(aps: dict[str, float]) -> float:
    """Mean over the classes that have objects; -1 if none has."""
    values = [ap for ap in aps.values() if not np.isnan(ap)]
    return float(np.mean(values)) if values else -1.0


def ground_truth(dataset: JsonDataset) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Objects of each class: (image index (G,), boxes xyxy counted from 1 (G, 4), difficult (G,)).

    Boxes are those of the XML files where the data set is VOC's layout, else those of the JSON,
    where objects with `difficult` or `ignore` 1 are difficult.
    """
    found: dict[str, list[tuple]] = {name: [] for name in dataset.classes[1:]}
    if voc_xml.is_split_file(dataset.annotation_file):
        images = voc_xml.split_images(dataset.annotation_file)
        for index, image in enumerate(images[: len(dataset.image_ids)]):
            for obj in image.objects:
                found[obj.name].append((index, *obj.box, obj.difficult))
    else:
        names = {
            category["id"]: category["name"] for category in dataset.COCO.dataset["categories"]
        }
        for index, image_id in enumerate(dataset.image_ids):
            for obj in dataset.COCO.imgToAnns.get(image_id, []):
                x, y, w, h = obj["bbox"]
                difficult = obj.get("difficult", obj.get("ignore", 0)) == 1
                box = x + 1, y + 1, x + w, y + h
                found[names[obj["category_id"]]].append((index, *box, difficult))
    truth = {}
    for name, objects in found.items():
        table = np.array(objects, dtype=np.float64).reshape(-1, 6)
        truth[name] = table[:, 0].astype(np.int64), table[:, 1:5], table[:, 5] == 1
    return truth


def class_curve(
    det_images: np.ndarray,
    dets: np.ndarray,
    gt_images: np.ndarray,
    gt_boxes: np.ndarray,
    difficult: np.ndarray,
    year: int,
) -> VocCurve:
    """Match the detections of one class in all images to its objects.

    Args:
        det_images: (D,) image of each detection; dets: (D, 5) score, x1, y1, x2, y2.
        gt_images: (G,); gt_boxes: (G, 4) xyxy; difficult: (G,) bool.
        year: which metric, see metric_year.
    """
    order = np.argsort(-dets[:, 0], kind="stable")
    det_images, boxes = det_images[order], dets[order, 1:]
    best = np.full(len(boxes), -1)  # the object that a detection overlaps enough, and most
    objects_of = _groups(gt_images)
    for image, here in _groups(det_images).items():
        if image in objects_of:
            objects = objects_of[image]
            overlaps = _overlaps(boxes[here], gt_boxes[objects])
            enough = overlaps.max(axis=1) > MIN_OVERLAP
            best[here[enough]] = objects[overlaps.argmax(axis=1)[enough]]
    hits = best >= 0
    first = np.zeros(len(best), dtype=bool)  # the best-scored detection of its object
    first[np.unique(best, return_index=True)[1]] = True
    easy = np.append(~difficult, False)[best]
    right = np.cumsum(hits & easy & first)
    wrong = np.cumsum(~hits | (easy & ~first))
    wanted = int((~difficult).sum())
    if wanted == 0:
        nothing = np.full(len(best), np.nan)
        return VocCurve(nothing, nothing, float("nan"))
    recall = right / wanted
    precision = right / np.maximum(right + wrong, np.finfo(np.float64).eps)
    return VocCurve(recall, precision, average_precision(recall, precision, year))


def average_precision(recall: np.ndarray, precision: np.ndarray, year: int) -> float:
    """Mean of the best precision at recalls 0, .1, ... 1 (before 2010), or the area under it."""
    if year < FIRST_AREA_YEAR:
        levels = np.arange(0.0, 1.1, 0.1)
        return float(np.mean([precision[recall >= t].max(initial=0.0) for t in levels]))
    recall = np.concatenate(([0.0], recall, [1.0]))
    precision = np.concatenate(([0.0], precision, [0.0]))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope[1:]))


def _groups(numbers: np.ndarray) -> dict[int, np.ndarray]:
    """number -> ascending indices where it is."""
    order = np.argsort(numbers, kind="stable")
    values, begins = np.unique(numbers[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, begins[1:]), strict=False))


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU (N, M) in float64 of boxes counted in whole pixels (+1), as the devkit computes it."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.maximum(high - low + 1, 0).prod(axis=2)
    areas = (boxes[:, 2:] - boxes[:, :2] + 1).prod(axis=1)
    other_areas = (others[:, 2:] - others[:, :2] + 1).prod(axis=1)
    return shared / (areas[:, None] + other_areas - shared)


def _lines(stems: Sequence[str], boxes: Sequence) -> list[str]:
    lines = []
    for stem, dets in zip(stems, boxes, strict=True):
        for x1, y1, x2, y2, score in np.asarray(dets, dtype=np.float64).reshape(-1, 5).tolist():
            lines.append(
                f"{stem} {score:.3f} {x1 + 1:.1f} {y1 + 1:.1f} {x2 + 1:.1f} {y2 + 1:.1f}\n"
            )
    return lines


def _parse(lines: Sequence[str], stems: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(image index (D,), score and box (D, 5)) of a text file's lines."""
    number = {stem: index for index, stem in enumerate(stems)}
    # Names of images may have spaces.
    parts = [line.rsplit(maxsplit=5) for line in lines]
    images = np.array([number[part[0]] for part in parts], dtype=np.int64)
    return images, np.array([part[1:] for part in parts], dtype=np.float64).reshape(-1, 5)


def _by_ap(item: tuple[str, float]) -> tuple:
    return np.isnan(item[1]), -item[1], item[0]


def _file_name(class_name: str) -> str:
    return class_name.replace("/", "_")
