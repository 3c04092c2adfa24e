"""How much memory the loader's processes hold, and how much of it is annotations.

A process that shares pages with others is charged its part of them (PSS), so the sum over all
processes is what the machine holds. What annotations take is the difference between a large and a
tiny data set, each loaded in a fresh process, in memory that is not a file's: the share in
libraries depends on what else runs on the machine.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from core.config import cfg
from core.errors import UserError
from datasets.entry import RoidbEntry, make_entry
from datasets.roidb import rank_for_training
from roi_data.loader import build_train_loader
from utils.packed_roidb import PackedRoidb

MIB = 2**20
# Resident memory of all loader processes for annotations, as a multiple of one copy of them.
ALLOWED_COPIES = 1.2
_SIDE = 16  # of the image that every entry shows: annotations are measured here, not pixels
_NUM_CLASSES = 81
_TINY = 64  # images of the data set that the large one is compared with
_VERTICES = (8, 40)  # of an object's polygon; COCO's mean is 24


@dataclass(frozen=True)
class MemorySettings:
    images: int = 118_000
    objects: int = 7
    workers: int = 8
    epochs: int = 2
    batch_size: int = 64


@dataclass(frozen=True)
class ProcessMemory:
    """Resident memory of a process in bytes."""

    name: str
    rss: int  # all of it
    pss: int  # shared pages divided by their number of users
    pss_data: int  # those of them that are no file's
    uss: int  # pages of this process alone


def process_memory(pid: int, name: str) -> ProcessMemory:
    """Read from Linux' /proc."""
    sizes: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, value = line.split(":")
        sizes[key] = int(value.split()[0]) * 1024
    private = sizes["Private_Clean"] + sizes["Private_Dirty"]
    data = sizes["Pss_Anon"] + sizes["Pss_Shmem"]
    return ProcessMemory(name, sizes["Rss"], sizes["Pss"], data, private)


def synthetic_roidb(images: int, objects: int, image: str) -> list[RoidbEntry]:
    """Entries with boxes and one polygon an object, all of the same small image."""
    rng = np.random.default_rng(0)
    roidb = []
    for number in range(images):
        corners = np.sort(rng.uniform(0, _SIDE - 1, (2, objects, 2)).astype(np.float32), axis=0)
        vertices = rng.integers(*_VERTICES, size=objects, endpoint=True)
        coords = np.split(rng.uniform(0, _SIDE, 2 * vertices.sum()), 2 * vertices.cumsum()[:-1])
        roidb.append(
            make_entry(
                image_id=number,
                image=image,
                height=_SIDE,
                width=_SIDE,
                num_classes=_NUM_CLASSES,
                boxes=corners.transpose(1, 0, 2).reshape(-1, 4),
                gt_classes=rng.integers(1, _NUM_CLASSES, objects, dtype=np.int32),
                is_crowd=np.zeros(objects, dtype=bool),
                seg_areas=np.ones(objects, dtype=np.float32),
                segms=[[polygon.copy()] for polygon in coords],
                gt_keypoints=None,
            )
        )
    return roidb


def measure_memory(settings: MemorySettings, say: Callable[[str], None]) -> dict[str, Any]:
    """Load the synthetic data set for some epochs; see `report_lines` for what comes back.

    Raises UserError where there is no /proc/PID/smaps_rollup (Linux 5.4).
    """
    if not Path("/proc/self/smaps_rollup").is_file():
        raise UserError("memory is read from Linux' /proc/PID/smaps_rollup, which is not here")
    say(f"loading {_TINY} images, for comparison")
    tiny = _in_fresh_process(MemorySettings(**{**asdict(settings), "images": _TINY}))
    say(f"loading {settings.images} images with {settings.objects} objects each")
    large = _in_fresh_process(settings)
    copy = large["annotation_bytes"] - tiny["annotation_bytes"]
    growth = [
        {kind: _sum(epoch, kind) - _sum(tiny["epochs"][-1], kind) for kind in ("workers", "all")}
        for epoch in large["epochs"]
    ]
    return {
        "settings": asdict(settings),
        "annotation_bytes": copy,
        "epochs": large["epochs"],
        "tiny_epochs": tiny["epochs"],
        # Of the loader processes, and of these and the main process.
        "copies_in_workers": [g["workers"] / copy for g in growth],
        "copies_in_all": [g["all"] / copy for g in growth],
        "allowed_copies": ALLOWED_COPIES,
    }


def _sum(processes: list[dict[str, Any]], kind: str) -> int:
    return sum(p["pss_data"] for p in processes if kind == "all" or p["name"] != "main")


def _in_fresh_process(settings: MemorySettings) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_load, args=(settings, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        process.join()
        raise RuntimeError(f"the measured process ended with {process.exitcode}") from error
    finally:
        process.join()


def _load(settings: MemorySettings, sender: Any) -> None:
    """Train-like loading, without training, and what every process holds after each epoch."""
    cfg.MODEL.NUM_CLASSES, cfg.MODEL.MASK_ON = _NUM_CLASSES, True
    cfg.TRAIN.SCALES, cfg.TRAIN.IMS_PER_BATCH = (_SIDE,), settings.batch_size
    # torch advises against more processes than CPUs; here they only hold memory.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    with tempfile.TemporaryDirectory() as folder:
        image = os.path.join(folder, "image.jpg")
        cv2.imwrite(image, np.zeros((_SIDE, _SIDE, 3), dtype=np.uint8))
        roidb = synthetic_roidb(settings.images, settings.objects, image)
        size = sum(array.nbytes for array in PackedRoidb.pack(roidb).arrays.values())
        loader = build_train_loader(
            roidb, *rank_for_training(roidb), settings.batch_size, settings.workers
        )
        del roidb  # as the training does
        epochs = []
        for _ in range(settings.epochs):
            for _batch in loader:
                pass
            workers = sorted(p.pid for p in multiprocessing.active_children())
            processes = [process_memory(os.getpid(), "main")]
            processes += [process_memory(pid, f"loader {i}") for i, pid in enumerate(workers)]
            epochs.append([asdict(p) for p in processes])
        sender.send({"annotation_bytes": size, "epochs": epochs})
        sender.close()


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report as text: a line a process and epoch, and what it comes to."""
    lines = ["MiB               resident   its share (PSS)   of it data   its own (USS)"]
    for number, epoch in enumerate(report["epochs"], 1):
        lines.append(f"after epoch {number}")
        for p in epoch:
            rss, pss, data, uss = (p[key] / MIB for key in ("rss", "pss", "pss_data", "uss"))
            lines.append(f"  {p['name']:<12}{rss:12.1f}{pss:18.1f}{data:13.1f}{uss:16.1f}")
    lines.append(f"one copy of the annotations: {report['annotation_bytes'] / MIB:.1f} MiB")
    for number, (workers, everything) in enumerate(
        zip(report["copies_in_workers"], report["copies_in_all"], strict=True), 1
    ):
        lines.append(
            f"epoch {number}: {report['settings']['workers']} loader processes hold {workers:.2f} "
            f"copies (at most {report['allowed_copies']} allowed), with the main process "
            f"{everything:.2f}"
        )
    return lines
