"""Several trainings beside each other: their losses, speeds and scores, as table and as curves."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from core.errors import UserError
from core.test_report import METRICS_FILE
from utils.html_page import data_uri, figure, page, table
from utils.weights import atomic_write

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
# What a log line says besides losses and counts, and how a run's values become one.
_OTHERS: dict[str, Callable[[Sequence[float]], float]] = {
    "lr": lambda values: values[-1],
    "time": lambda values: sorted(values)[len(values) // 2],
    "data_time": lambda values: sorted(values)[len(values) // 2],
    "max_mem_mib": max,
}
_SMOOTHED = 20  # reports whose mean is a run's final loss


@dataclass
class Run:
    """curves: name -> {step: value}, losses and the rest of log.jsonl; scores: what tests in the
    folder gave, `DATASET/TASK/METRIC` -> value."""

    name: str
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def last_step(self) -> int | None:
        return max((max(curve) for curve in self.curves.values()), default=None)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read training folders (log.jsonl) and test results (metrics.json, also in test/).

    Raises UserError naming a folder with neither, or a damaged file.
    """
    paths = [Path(folder) for folder in folders]
    names = _short_names([path.resolve() for path in paths])
    return [_read_run(path, name) for path, name in zip(paths, names, strict=True)]


def _read_run(folder: Path, name: str) -> Run:
    run = Run(name)
    log = folder / LOG_FILE
    if log.is_file():
        for entry in _log_entries(log):
            step = int(entry.pop("step"))
            for key, value in entry.items():
                if isinstance(value, (int, float)) and key != "eta_seconds":
                    # A resumed run repeats steps; what came last counts.
                    run.curves.setdefault(key, {})[step] = value
    found = [folder / METRICS_FILE, *sorted(folder.glob(f"test/**/{METRICS_FILE}"))]
    for path in filter(Path.is_file, found):
        run.scores |= _read_scores(path)
    if not run.curves and not run.scores:
        raise UserError(
            f"{folder} has neither {LOG_FILE} of a training nor {METRICS_FILE} of a test: name the "
            "folder that a training or tools/test_net.py wrote to"
        )
    return run


def _log_entries(path: Path) -> Iterable[dict]:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            int(entry["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # being written, or cut off
                return
            raise UserError(f"{path}, line {number}, is not a report of a training") from error
        yield entry


def _read_scores(path: Path) -> dict[str, float]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        return {
            f"{dataset}/{task}/{metric}": float(value)
            for dataset, tasks in results.items()
            for task, metrics in tasks.items()
            for metric, value in metrics.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not hold the results of a test ({error})") from error


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Each path without what all have in common at either end."""
    if len(set(paths)) < len(paths):
        raise UserError("the same run is named twice")
    parts = [path.parts for path in paths]
    if len(parts) == 1:
        return [parts[0][-1]]
    while len({p[0] for p in parts if len(p) > 1}) == 1 and all(len(p) > 1 for p in parts):
        parts = [p[1:] for p in parts]
    while len({p[-1] for p in parts}) == 1 and all(len(p) > 1 for p in parts):
        parts = [p[:-1] for p in parts]
    return ["/".join(p) for p in parts]


def summary(runs: Sequence[Run]) -> tuple[list[str], list[list]]:
    """(headers, rows): a column for each run; None where a run says nothing.

    Losses are means of the last reports; scores while training the best of them; scores of tests
    as they are.
    """
    rows: list[list] = [
        ["steps", *(None if r.last_step is None else r.last_step + 1 for r in runs)]
    ]
    for key in _keys(runs):
        values = []
        for run in runs:
            curve = run.curves.get(key)
            ordered = [curve[step] for step in sorted(curve)] if curve else None
            values.append(None if ordered is None else _condensed(key, ordered))
        title = f"{key} (best)" if "/" in key else key
        rows.append([title, *values])
    for key in dict.fromkeys(key for run in runs for key in run.scores):
        rows.append([f"test {key}", *(run.scores.get(key) for run in runs)])
    return ["", *(run.name for run in runs)], rows


def _condensed(key: str, values: Sequence[float]) -> float:
    if "/" in key:
        return max(values)
    if key in _OTHERS:
        return _OTHERS[key](values)
    last = values[-_SMOOTHED:]
    return sum(last) / len(last)


def _keys(runs: Sequence[Run]) -> list[str]:
    """Names of all curves: losses, what else a report says, scores."""
    keys = dict.fromkeys(key for run in runs for key in run.curves)
    group = {key: 2 if "/" in key else key in _OTHERS for key in keys}
    return sorted(keys, key=lambda key: group[key])


def text_table(runs: Sequence[Run]) -> str:
    """The summary for a terminal."""
    headers, rows = summary(runs)
    cells = [headers, *([row[0], *map(_shown, row[1:])] for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(headers))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:],
                                                                          strict=True))])
        for row in cells
    )  # fmt: skip


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    return f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2e}"


def write_comparison(runs: Sequence[Run], path: str | Path) -> None:
    """Write curves (PNG), or table and curves (HTML), by the file's suffix.

    Raises UserError for another suffix, and for a PNG of runs without curves.
    """
    path = Path(path)
    if path.suffix not in (".html", ".png"):
        raise UserError(f"--output {path} must end in .html or .png")
    keys = [key for key in _keys(runs) if key != "max_mem_mib"]
    if path.suffix == ".png":
        if not keys:
            raise UserError(f"none of the runs has a {LOG_FILE} to draw: ask for .html")
        content = _curves(runs, keys, "png")
    else:
        body = table(*summary(runs), digits=4)
        if keys:
            body += figure(data_uri(_curves(runs, keys, "svg"), "image/svg+xml"))
        content = page("Comparison of runs", body).encode()
    with atomic_write(path) as file:
        file.write(content)


def _curves(runs: Sequence[Run], keys: Sequence[str], kind: str) -> bytes:
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    drawing = Figure(
        figsize=(4.6 * columns, 3 * rows + 0.3 * len(runs)), layout="constrained", facecolor="white"
    )
    grid = drawing.subplots(rows, columns, squeeze=False)
    lines = {}
    for axes, key in zip(grid.flat, keys, strict=False):
        for number, run in enumerate(runs):
            curve = run.curves.get(key)
            if curve:
                steps = sorted(curve)
                marker = "o" if len(steps) < 30 else None
                (lines[run.name],) = axes.plot(
                    steps, [curve[s] for s in steps], f"C{number % 10}", marker=marker, ms=3, lw=1.2
                )
        axes.set_title(key, fontsize=10)
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(keys) :]:
        axes.set_axis_off()
    drawing.legend(lines.values(), lines.keys(), loc="outside lower center", fontsize=9)
    content = io.BytesIO()
    drawing.savefig(content, format=kind, dpi=110)
    return content.getvalue()
