"""A test's report for people: one HTML file with numbers, curves and the worst images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from pycocotools.cocoeval import COCOeval

from datasets import report_plots
from datasets.detection_matches import (
    IGNORED,
    MISPLACED,
    NAMES,
    RIGHT,
    ImageMatches,
    confusion,
    match_image,
)
from datasets.json_dataset import JsonDataset
from datasets.task_evaluation import METRICS
from utils.html_page import figure, image_uri, page, table, write_page
from utils.image import read_image
from utils.skeleton import skeleton_of
from utils.vis import draw
from utils.vis_layout import lay_out

logger = logging.getLogger(__name__)

SHOWN_SCORE = 0.5  # detections that count as the model's statement in confusions and pictures
WORST_IMAGES = 6  # of each kind of mistake
PICTURE_SIDE = 520
CONFUSION_ROWS = 200

_STYLE = """
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.row figure { background: #fff; color: #222; padding: .3rem; border-radius: 4px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; max-width: 1080px;
  margin: 0 0 1rem; }
.pair img { width: 100%; }
.pair p { grid-column: 1 / 3; margin: .2rem 0; font-size: .85rem; overflow-wrap: anywhere; }
"""

_RECALLS = {
    "box": ("AR@1", "AR@10", "AR@100", "ARs", "ARm", "ARl"),
    "mask": ("AR@1", "AR@10", "AR@100", "ARs", "ARm", "ARl"),
    "keypoint": ("AR", "AR50", "AR75", "ARm", "ARl"),
}


@dataclass(frozen=True)
class Detections:
    """As datasets.json_dataset_evaluator says; segms and keyps are None without such heads."""

    boxes: Sequence
    segms: Sequence | None = None
    keyps: Sequence | None = None


def write_report(
    dataset: JsonDataset,
    found: Detections,
    evaluations: Mapping[str, COCOeval],
    path: str | Path,
    notes: Sequence[str] = (),
) -> None:
    """Write the report of a test to an HTML file that needs nothing but itself.

    Args:
        evaluations: task ('box', 'mask', 'keypoint') -> accumulated evaluation.
        notes: sentences put on top.
    """
    matches = [match_image(dataset, found.boxes, i) for i in range(len(dataset.image_ids))]
    parts = [f"<p>{escape(note)}</p>" for note in notes]
    parts += [_metrics(evaluations), _classes(dataset, matches, evaluations), "<h2>Curves</h2>"]
    names = dataset.classes[1:]
    for task, coco_eval in evaluations.items():
        scored = [dataset.COCO.cats[c]["name"] for c in coco_eval.params.catIds]
        curves = figure(
            report_plots.precision_recall(coco_eval), f"{task}: precision over recall, all classes"
        )
        curves += figure(
            report_plots.precision_recall_of_classes(coco_eval, scored),
            f"{task}: precision over recall at IoU .5, by class (with its AP)",
        )
        parts.append(f'<div class="row">{curves}</div>')
    sizes = figure(report_plots.ap_by_size(evaluations), "AP by the size of objects")
    scores = {
        name: np.concatenate([m.boxes[m.kinds == kind, 4] for m in matches])
        for kind, name in enumerate(NAMES)
        if kind != IGNORED
    }
    histogram = figure(report_plots.score_histogram(scores), "boxes by score (IoU .5)")
    parts.append(f'<h2>Sizes and scores</h2><div class="row">{sizes}{histogram}</div>')
    parts.append(_confusions(dataset, matches))
    parts += _worst(dataset, found, matches)
    title = f"{dataset.name}: {len(dataset.image_ids)} images, {len(names)} classes"
    write_page(path, page(title, "\n".join(parts), style=_STYLE))
    logger.info("Wrote %s", path)


def _metrics(evaluations: Mapping[str, COCOeval]) -> str:
    parts = ["<h2>Average precision and recall</h2>"]
    for names_of in (METRICS, _RECALLS):
        rows: dict[tuple, list] = {}
        for task, coco_eval in evaluations.items():
            names = names_of[task]
            begin = 0 if names_of is METRICS else len(METRICS[task])
            stats = [float(v) for v in coco_eval.stats[begin : begin + len(names)]]
            rows.setdefault(names, []).append([task, *(_percent(v) for v in stats)])
        parts += [
            table(["task", *names], body, digits=1, sortable=False) for names, body in rows.items()
        ]
    return "\n".join(parts)


def _classes(
    dataset: JsonDataset, matches: Sequence[ImageMatches], evaluations: Mapping[str, COCOeval]
) -> str:
    labels = np.concatenate([m.gt_labels[m.gt_wanted] for m in matches])
    found = np.concatenate([m.labels for m in matches])
    objects, detections = (np.bincount(v, minlength=dataset.num_classes) for v in (labels, found))
    headers = ["class", "objects", "detections"]
    rows = [
        [n, int(objects[k]), int(detections[k])] for k, n in enumerate(dataset.classes) if k > 0
    ]
    for task, coco_eval in evaluations.items():
        sizes = coco_eval.params.areaRngLbl
        headers += [f"{task} AP", "AP50", "AP75", *(f"AP{size[0]}" for size in sizes[1:]), "AR"]
        places = {category: k for k, category in enumerate(coco_eval.params.catIds)}
        precision, recall = coco_eval.eval["precision"], coco_eval.eval["recall"]
        for label, row in enumerate(rows, start=1):
            k = places.get(dataset.contiguous_category_id_to_json_id[label])
            if k is None:  # a class without keypoints
                row += [None] * (len(sizes) + 3)
                continue
            of_class = precision[:, :, k, :, -1]  # IoU, recall, area
            values = [of_class[..., 0], of_class[0, :, 0], of_class[5, :, 0]]
            values += [of_class[..., area] for area in range(1, len(sizes))]
            row += [_percent(_mean(v)) for v in (*values, recall[:, k, 0, -1])]
    rows.sort(key=lambda row: (row[3] is None, -(row[3] or 0)))
    note = "<p>Click on a column's head to sort by it. COCO's metrics, in percent.</p>"
    return f"<h2>Classes</h2>{note}{table(headers, rows, digits=1)}"


def _mean(values: np.ndarray) -> float:
    there = values[values > -1]
    return float(there.mean()) if there.size else -1.0


def _percent(value: float) -> float | None:
    return None if value < 0 else 100 * value


def _confusions(dataset: JsonDataset, matches: Sequence[ImageMatches]) -> str:
    counts = confusion(matches, dataset.num_classes, SHOWN_SCORE)
    picture = figure(
        report_plots.confusion_matrix(counts, dataset.classes),
        f"boxes that score at least {SHOWN_SCORE}, IoU .5; the classes with most mistakes",
    )
    off = counts.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:CONFUSION_ROWS]
    pairs = [divmod(int(i), dataset.num_classes) for i in order]
    names = ["(nothing)", *dataset.classes[1:]]
    rows = [[names[a], names[b], int(off[a, b])] for a, b in pairs if off[a, b]]
    listed = table(["what is there", "taken for", "how often"], rows)
    return f'<h2>Confusion of classes</h2><div class="row">{picture}{listed}</div>'


def _worst(dataset: JsonDataset, found: Detections, matches: Sequence[ImageMatches]) -> list[str]:
    """The images with the most of each kind of mistake, ground truth beside detections."""
    wrong = [kind for kind in range(len(NAMES)) if kind not in (RIGHT, MISPLACED, IGNORED)]
    rankings = (
        ("False positives", "sum of scores", [_scores(m, wrong) for m in matches]),
        ("Misses", "objects missed", [_missed(m) for m in matches]),
        ("Poor localisation", "sum of scores", [_scores(m, [MISPLACED]) for m in matches]),
    )
    parts = []
    for title, what, values in rankings:
        order = np.argsort(-np.array(values), kind="stable")[:WORST_IMAGES]
        worst = [int(i) for i in order if values[i] > 0]
        parts.append(f"<h2>{title}</h2>")
        if not worst:
            parts.append("<p>None.</p>")
        for i in worst:
            parts.append(_pair(dataset, found, matches[i], i, f"{what}: {values[i]:.3g}"))
    return parts


def _scores(m: ImageMatches, kinds: Sequence[int]) -> float:
    return float(m.boxes[np.isin(m.kinds, kinds) & (m.boxes[:, 4] >= SHOWN_SCORE), 4].sum())


def _missed(m: ImageMatches) -> int:
    return int((m.gt_wanted & ~(m.gt_scores >= SHOWN_SCORE)).sum())


def _pair(dataset: JsonDataset, found: Detections, m: ImageMatches, index: int, text: str) -> str:
    info = dataset.COCO.imgs[dataset.image_ids[index]]
    im = read_image(dataset.image_path(info["file_name"]))
    annotations = [dataset.COCO.anns[i] for i in m.gt_ids]
    truth = np.column_stack((m.gt_boxes, np.ones(len(m.gt_boxes))))
    true_segms = [a["segmentation"] for a in annotations]
    true_keyps = None
    if found.keyps is not None:
        true_keyps = [_true_points(a, dataset.num_keypoints) for a in annotations]
    shown = m.boxes[:, 4] >= SHOWN_SCORE
    cells = list(zip(m.labels[shown].tolist(), m.rows[shown].tolist(), strict=True))
    segms, keyps = (
        None if kind is None else [kind[label][index][row] for label, row in cells]
        for kind in (found.segms, found.keyps)
    )
    pictures = (
        ("ground truth", truth, m.gt_labels, true_segms, true_keyps),
        (f"detections that score {SHOWN_SCORE} or more", m.boxes[shown], m.labels[shown],
         segms, keyps),
    )  # fmt: skip
    skeleton = skeleton_of(dataset.keypoints or ())
    figures = []
    for caption, boxes, labels, masks, points in pictures:
        layout = lay_out(
            im.shape, boxes, labels, masks, dataset.classes, 0.0,
            keypoints=points, skeleton=skeleton,
        )  # fmt: skip
        figures.append(figure(image_uri(draw(im, layout), longest=PICTURE_SIDE), caption))
    line = f"{info['file_name']}, {text}"
    return f'<div class="pair"><p>{escape(line)}</p>{"".join(figures)}</div>'


def _true_points(annotation: Mapping, number: int) -> np.ndarray:
    """(4, K) as detections have them; points without a label are below any threshold."""
    points = np.zeros((4, number))
    given = np.array(annotation.get("keypoints") or [0] * 3 * number, float).reshape(-1, 3).T
    points[:2] = given[:2]
    points[2] = np.where(given[2] > 0, 1e3, -1e3)
    return points
