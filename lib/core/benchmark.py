"""Measuring: how long a call takes on a device, what device that was, and how to say so."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torchvision

WARM_UP = 3
REPEATS = (5, 100)  # fewest and most calls of a measurement
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}


@dataclass
class Timing:
    """Milliseconds of one call."""

    median: float
    low: float  # 10th percentile
    high: float  # 90th percentile
    repeats: int


@dataclass
class Row:
    """One measured case, what it is compared with and the least it could take."""

    name: str
    case: str
    ours: Timing
    peers: dict[str, Timing] = field(default_factory=dict)
    floor_bytes: int | None = None  # memory traffic that no implementation can avoid
    note: str = ""

    def as_dict(self, bandwidth: float) -> dict[str, Any]:
        """For JSON; `bandwidth` in bytes/s."""
        values = asdict(self)
        values["speedup"] = {k: peer.median / self.ours.median for k, peer in self.peers.items()}
        if self.floor_bytes is not None:
            values["floor_ms"] = 1e3 * self.floor_bytes / bandwidth
            values["floor_fraction"] = values["floor_ms"] / self.ours.median
        return values


def measure(call: Callable[[int], object], device: torch.device, budget: float = 0.4) -> Timing:
    """Time `call(i)`, i counting up so that it can rotate its inputs.

    After `WARM_UP` calls it is repeated for about `budget` seconds, within REPEATS. CUDA events
    stand before and after every call and are read at the end: the host may run ahead, as in a
    program, and a call that waits for the device is charged for it.
    """
    for i in range(WARM_UP):
        call(i)
    synchronize(device)
    begin = time.perf_counter()
    call(0)
    synchronize(device)
    once = time.perf_counter() - begin
    repeats = max(REPEATS[0], min(REPEATS[1], int(budget / max(once, 1e-6))))
    if device.type == "cuda":
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2)]
        for i in range(repeats):
            events[0][i].record()
            call(i)
            events[1][i].record()
        synchronize(device)
        times = [start.elapsed_time(end) for start, end in zip(*events, strict=True)]
    else:
        times = []
        for i in range(repeats):
            begin = time.perf_counter()
            call(i)
            times.append(1e3 * (time.perf_counter() - begin))
    return timing_of(times)


def timing_of(times: Sequence[float]) -> Timing:
    """Median and spread of at least two times in milliseconds."""
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(statistics.median(times), deciles[0], deciles[-1], len(times))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written, of copying one large tensor into another."""
    source = torch.zeros(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    timing = measure(lambda i: target.copy_(source), device)
    return 2 * source.nbytes / (timing.median * 1e-3)


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, for the record."""
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "device": _cpu_name(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def format_rows(rows: list[Row], bandwidth: float) -> str:
    """A table, a line for each peer of each row."""
    head = ["operator", "case", "ms", "(10%-90%)", "peer", "ms", "(10%-90%)", "x", "floor", "of it"]
    lines = [head]
    for row in rows:
        own = [row.name, row.case, *_times(row.ours)]
        floor = ["", ""]
        if row.floor_bytes is not None:
            least = 1e3 * row.floor_bytes / bandwidth
            floor = [f"{least:.3f}", f"{100 * least / row.ours.median:.0f} %"]
        peers = [
            [name, *_times(peer), f"{peer.median / row.ours.median:.2f}"]
            for name, peer in row.peers.items()
        ] or [[""] * 4]
        for k, peer in enumerate(peers):
            lines.append([*(own if k == 0 else [""] * 4), *peer, *(floor if k == 0 else ["", ""])])
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    text = [_align(line, widths) for line in lines]
    text.insert(1, "-" * len(text[0]))
    notes = dict.fromkeys(f"{row.name}: {row.note}" for row in rows if row.note)
    return "\n".join([*text, "", *notes])


def _times(timing: Timing) -> list[str]:
    return [f"{timing.median:.3f}", f"({timing.low:.3f}-{timing.high:.3f})"]


def _align(cells: list[str], widths: list[int]) -> str:
    words = {0, 1, 4}  # the rest are numbers
    return "  ".join(
        cell.ljust(width) if k in words else cell.rjust(width)
        for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
