"""The figures of a test's report, as SVG pictures in data URIs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pycocotools.cocoeval import COCOeval

from utils.html_page import data_uri

LEGEND_CLASSES = 10
MATRIX_CLASSES = 25


def precision_recall(coco_eval: COCOeval) -> str:
    """Precision over recall, mean of the classes, at some IoUs."""
    figure, axes = _figure(5.2, 4)
    precision = coco_eval.eval["precision"][..., 0, -1]  # IoU, recall, class
    recalls = coco_eval.params.recThrs
    for threshold in (0.5, 0.75, 0.9):
        curve = _mean(precision[_iou_index(coco_eval, threshold)], axis=1)
        axes.plot(recalls, curve, label=f"IoU {threshold:.2f}")
    axes.plot(recalls, _mean(precision, axis=(0, 2)), "k--", label="IoU .50 to .95")
    return _finish_curves(figure, axes)


def precision_recall_of_classes(coco_eval: COCOeval, names: Sequence[str]) -> str:
    """Precision over recall at IoU .5 of each class; the best and worst ones are named."""
    figure, axes = _figure(5.2, 4)
    curves = coco_eval.eval["precision"][_iou_index(coco_eval, 0.5), :, :, 0, -1]
    averages = _mean(curves, axis=0)
    ranked = [int(k) for k in np.argsort(-averages, kind="stable") if not np.isnan(averages[k])]
    half = LEGEND_CLASSES // 2
    named = ranked if len(ranked) <= LEGEND_CLASSES else ranked[:half] + ranked[-half:]
    for k in set(ranked) - set(named):
        axes.plot(coco_eval.params.recThrs, curves[:, k], color="0.85", linewidth=0.7)
    for k in named:
        label = f"{names[k]} {100 * averages[k]:.0f}"
        axes.plot(coco_eval.params.recThrs, curves[:, k], label=label, linewidth=1.2)
    return _finish_curves(figure, axes)


def ap_by_size(evaluations: Mapping[str, COCOeval]) -> str:
    """AP of all, small, medium and large objects, a bar for each task."""
    figure, axes = _figure(5.2, 3)
    sizes = ("all", "small", "medium", "large")
    width = 0.8 / len(evaluations)
    for number, (task, coco_eval) in enumerate(evaluations.items()):
        places, heights = [], []
        for place, size in enumerate(sizes):
            if size in coco_eval.params.areaRngLbl:
                area = coco_eval.params.areaRngLbl.index(size)
                mean = _mean(coco_eval.eval["precision"][..., area, -1], axis=None)
                if not np.isnan(mean):
                    places.append(place + (number - (len(evaluations) - 1) / 2) * width)
                    heights.append(float(mean))
        bars = axes.bar(places, heights, width, label=task)
        axes.bar_label(bars, [f"{100 * h:.1f}" for h in heights], fontsize=8)
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("AP, IoU .50 to .95")
    axes.legend(fontsize=8)
    return _svg(figure)


def score_histogram(scores: Mapping[str, np.ndarray]) -> str:
    """How many detections have which score, stacked by what they are."""
    figure, axes = _figure(5.2, 3)
    names = [name for name in scores if len(scores[name])]
    axes.hist([scores[n] for n in names], np.linspace(0, 1, 41), stacked=True, label=names)
    if names:
        axes.set_yscale("symlog", linthresh=10)
        axes.legend(fontsize=8)
    axes.set_xlabel("score")
    axes.set_ylabel("detections")
    return _svg(figure)


def confusion_matrix(counts: np.ndarray, names: Sequence[str]) -> str:
    """Share of each class's objects taken for what; the classes that are confused most.

    counts: as datasets.detection_matches.confusion; names: by label, background first.
    """
    wrong = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
    ranked = 1 + np.argsort(-wrong[1:], kind="stable")[: MATRIX_CLASSES - 1]
    shown = [*sorted(ranked.tolist()), 0]
    part = counts[np.ix_(shown, shown)]
    shares = part / np.maximum(counts[shown].sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.36 * len(shown)
    figure, axes = _figure(max(side, 4), max(side - 0.6, 3.4))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(part):
        if count:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=7)
    labels = [names[k] if k else "(nothing)" for k in shown]
    axes.set_xticks(range(len(shown)), labels, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.set_xlabel("taken for")
    axes.set_ylabel("what is there")
    axes.grid(False)
    return _svg(figure)


def _iou_index(coco_eval: COCOeval, threshold: float) -> int:
    return int(np.argmin(np.abs(coco_eval.params.iouThrs - threshold)))


def _mean(values: np.ndarray, axis: int | tuple[int, ...] | None) -> np.ndarray:
    """Mean over what is there (-1 is not); NaN where nothing is."""
    there = values > -1
    total = np.where(there, values, 0).sum(axis=axis)
    count = there.sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Without pyplot: it keeps every figure, and may want a display.
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _finish_curves(figure: Figure, axes: Axes) -> str:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    if axes.get_legend_handles_labels()[1]:  # matplotlib warns of a legend of nothing
        axes.legend(fontsize=8)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return data_uri(content.getvalue(), "image/svg+xml")
