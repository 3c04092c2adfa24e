"""What `tools/benchmark.py growth` measures: time and memory against the size of the work.

One thing grows, all else stays: the images' size, the objects, the RoIs, the images of a batch.
Beside each series stands what it would be if it grew as the floating-point operations of the matrix
products and convolutions do. Those do not see the objects: what matching them costs shows as growth
over a level line.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from core.benchmark import Timing, timing_of
from core.benchmark_infer import OwnDetector, flops_of_detecting
from core.benchmark_models import draw_batches, fresh_memory, peak_gib
from core.benchmark_train import NEAR, OwnTrainer, flops_of_training
from core.config import cfg
from core.errors import UserError
from core.train_engine import prepare_device
from utils.weights import atomic_write

WARM_UP = 3  # steps; a GPU's are recorded in them (core.train_graphs)
# What grows -> what it is called.
AXES = {
    "side": "short side, pixels",
    "objects": "ground truths an image",
    "rois": "RoIs an image",
    "batch": "images a batch",
}
TRAIN, MEMORY, INFER = "training step, ms", "peak memory of training, GiB", "inference, ms"


@dataclass(frozen=True)
class Size:
    """The size of the work: pixels of the shorter side, and an image's or a batch's numbers."""

    side: int = 800
    objects: int = 7
    rois: int = 512
    batch: int = 8


@dataclass(frozen=True)
class GrowthCases:
    """What is measured: at `base` one field takes the values of `values[field]`, in turn."""

    base: Size
    values: dict[str, tuple[int, ...]]
    amp: str = "off"
    steps: int = 6


@dataclass(frozen=True)
class Point:
    """One measurement. flops: of a training step, and of inference where that was measured."""

    size: Size
    train: Timing
    train_flops: int
    peak_gib: float | None  # None on the CPU
    infer: Timing | None  # not for other numbers of objects: it sees none
    infer_flops: int | None

    def value(self, what: str) -> float | None:
        """The measured figure `what`: TRAIN, MEMORY or INFER."""
        return {
            TRAIN: self.train.median,
            MEMORY: self.peak_gib,
            INFER: self.infer and self.infer.median,
        }[what]

    def work(self, what: str) -> int | None:
        """The operations that the figure is compared with."""
        return self.infer_flops if what == INFER else self.train_flops


def growth(device: torch.device, cases: GrowthCases) -> Iterator[tuple[str, Point]]:
    """(what grows, point) of every series, smallest first. TRAIN's and TEST's sizes of the config
    are changed for it and then as before.

    Raises UserError if the config's model is not one of two stages that makes its own proposals.
    """
    if not cfg.MODEL.FASTER_RCNN or cfg.MODEL.RPN_ONLY:
        raise UserError("--cfg is not a model of two stages (MODEL.FASTER_RCNN True)")
    prepare_device(device)
    known: dict[Size, Point] = {}
    before = _sizes_of_config()
    try:
        for axis, values in cases.values.items():
            for value in sorted(values):
                size = replace(cases.base, **{axis: value})
                if size not in known:
                    # Inference sees no objects.
                    infer = size.objects == cases.base.objects
                    known[size] = _measure(device, size, cases, infer)
                yield axis, known[size]
    finally:
        _set_sizes(before)


def _measure(device: torch.device, size: Size, cases: GrowthCases, infer: bool) -> Point:
    longest = {"MAX_SIZE": round(size.side * 1333 / 800)}
    _set_sizes(
        {
            "TRAIN": longest | {"SCALES": (size.side,), "BATCH_SIZE_PER_IM": size.rois},
            "TEST": longest | {"SCALE": size.side, "RPN_POST_NMS_TOP_N": size.rois},
        }
    )
    draw = {"classes": cfg.MODEL.NUM_CLASSES - 1, "one_size": True, "objects": size.objects}
    if cfg.MODEL.KEYPOINTS_ON:
        draw["keypoints"] = cfg.KRCNN.NUM_KEYPOINTS
    batches = draw_batches(1, size.batch, near=NEAR, **draw)
    train_flops = flops_of_training(batches, device)
    fresh_memory(device)
    trainer = OwnTrainer(batches, device, cases.amp)
    train = timing_of(trainer.steps(cases.steps, WARM_UP))
    point = Point(size, train, train_flops, peak_gib(device), None, None)
    del trainer
    if not infer:
        return point
    infer_flops = flops_of_detecting(batches, device)
    fresh_memory(device)
    detector = OwnDetector(batches, device, cases.amp, paste=True)
    detector.run()
    times = []
    for _ in range(cases.steps):
        begin = time.perf_counter()
        detector.run()
        times.append(1e3 * (time.perf_counter() - begin))
    timing = timing_of(times)
    return replace(point, infer=timing, infer_flops=infer_flops)


def _sizes_of_config() -> dict[str, dict[str, Any]]:
    keys = {
        "TRAIN": ("SCALES", "MAX_SIZE", "BATCH_SIZE_PER_IM"),
        "TEST": ("SCALE", "MAX_SIZE", "RPN_POST_NMS_TOP_N"),
    }
    return {part: {key: cfg[part][key] for key in names} for part, names in keys.items()}


def _set_sizes(values: dict[str, dict[str, Any]]) -> None:
    cfg.freeze(False)
    for part, entries in values.items():
        cfg[part].update(entries)
    cfg.freeze()


def excess(points: Sequence[Point], what: str) -> float:
    """How many times as much the figure grew, first point to last, as the work did."""
    first, last = points[0], points[-1]
    return (last.value(what) / first.value(what)) / (last.work(what) / first.work(what))


def figures_of(points: Sequence[Point]) -> list[str]:
    """What was measured at all of these points: of TRAIN, MEMORY and INFER."""
    return [
        what
        for what in (TRAIN, MEMORY, INFER)
        if all(point.value(what) is not None for point in points)
    ]


def table(series: dict[str, list[Point]]) -> str:
    """The figures as text, and by how much each grew more than the work."""
    lines = []
    for axis, points in series.items():
        head = [AXES[axis], *(str(getattr(point.size, axis)) for point in points), "x work"]
        rows = [head]
        for what in figures_of(points):
            digits = 2 if what == MEMORY else 1
            cells = [f"{point.value(what):.{digits}f}" for point in points]
            rows.append([what, *cells, f"{excess(points, what):.2f}"])
        rows.append(["TFLOP of a step", *(f"{p.train_flops / 1e12:.2f}" for p in points), ""])
        lines += [f"{row[0]:<30}" + "".join(f"{c:>9}" for c in row[1:]) for row in rows] + [""]
    lines.append("x work: growth from first to last over that of the floating-point operations")
    return "\n".join(lines)


def plot(series: dict[str, list[Point]], path: Path, title: str) -> None:
    """One picture (PNG) of a panel for each figure and series, both axes logarithmic."""
    rows = [
        what
        for what in (TRAIN, MEMORY, INFER)
        if any(what in figures_of(points) for points in series.values())
    ]
    size = (2.9 * len(series), 2.3 * len(rows) + 0.4)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=9)
    # One scale for a row: growth looks as large as it is.
    grid = figure.subplots(len(rows), len(series), sharey="row", squeeze=False)
    for row, what in zip(grid, rows, strict=True):
        for axes, (axis, points) in zip(row, series.items(), strict=True):
            if what not in figures_of(points):
                axes.axis("off")
                continue
            at = [getattr(point.size, axis) for point in points]
            first = points[0]
            line = [first.value(what) * p.work(what) / first.work(what) for p in points]
            axes.loglog(at, line, "--", color="0.6", lw=1, label="proportional to the work")
            axes.loglog(at, [p.value(what) for p in points], "o-", ms=3, lw=1.3, label="measured")
            axes.set_xticks(at, [str(value) for value in at], fontsize=7)
            axes.minorticks_off()
            axes.set_xlabel(AXES[axis], fontsize=8)
            axes.grid(True, color="0.9")
        row[0].set_ylabel(what, fontsize=8)
        ticks = _ticks(*row[0].get_ylim())
        row[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
    grid[0][0].legend(fontsize=6)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=90)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) between two positive ones."""
    numbers = [digit * 10.0**power for power in range(-4, 7) for digit in (1, 2, 5)]
    return [number for number in numbers if low <= number <= high]


def report(series: dict[str, list[Point]], cases: GrowthCases) -> dict[str, Any]:
    """For JSON."""
    return {
        "settings": asdict(cases),
        "series": {
            axis: {
                "points": [asdict(point) for point in points],
                "growth_over_work": {what: excess(points, what) for what in figures_of(points)},
            }
            for axis, points in series.items()
        },
    }
