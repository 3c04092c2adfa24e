"""How fast training images become batches: per stage, and as a whole by number of processes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import torch
import torch.utils.data as torch_data
from torchvision.datasets.folder import default_loader
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.functional import pil_to_tensor

from core.benchmark import Row, measure
from core.config import cfg
from core.errors import UserError
from datasets.dataset_catalog import resolve_dataset
from datasets.entry import RoidbEntry
from datasets.roidb import combined_roidb_for_training, rank_for_training
from roi_data.loader import RoiDataLoader, build_train_loader, collate_minibatch
from roi_data.minibatch import MinibatchOptions
from utils import image as image_utils
from utils.device import available_cpus

CPU = torch.device("cpu")
_SECONDS_PER_STAGE = 2.0  # spent on each
_STAGE_IMAGES = 200  # held decoded


@dataclass(frozen=True)
class DataSettings:
    """images: of the data set, repeated; batch_size: of a pass of one GPU."""

    processes: tuple[int, ...]
    images: int = 1000
    batch_size: int = 16
    scale: int = 800
    max_size: int = 1333


@dataclass(frozen=True)
class Rate:
    """Images a second with so many loader processes."""

    processes: int
    ours: float
    torchvision: float
    megapixels: float  # a second, ours


def default_processes() -> tuple[int, ...]:
    """1, 2, 4, ... 16, as far as there are CPUs."""
    return tuple(n for n in (1, 2, 4, 8, 16) if n <= available_cpus())


def configure(spec: str, settings: DataSettings) -> list[RoidbEntry]:
    """Set the config for Mask R-CNN on a data set; its training roidb without mirrored copies.

    spec: as --dataset. Raises UserError for data that cannot be trained on.
    """
    dataset = resolve_dataset(spec)
    if not dataset.train_names:
        raise UserError(f"--dataset {spec} has no part `train`")
    cfg.MODEL.NUM_CLASSES, cfg.MODEL.MASK_ON, cfg.FPN.FPN_ON = dataset.num_classes, True, True
    cfg.TRAIN.SCALES, cfg.TRAIN.MAX_SIZE = (settings.scale,), settings.max_size
    cfg.TRAIN.IMS_PER_BATCH, cfg.TRAIN.USE_FLIPPED = settings.batch_size, False
    cfg.CUDA = torch.cuda.is_available()
    return combined_roidb_for_training(dataset.train_names)[0]


def stage_rows(roidb: Sequence[RoidbEntry], settings: DataSettings) -> Iterator[Row]:
    """Milliseconds of each stage, in one process with one thread, over the first images."""
    roidb = roidb[:_STAGE_IMAGES]
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    paths = [entry["image"] for entry in roidb]
    contents = [image_utils.read_file(path) for path in paths]
    images = [image_utils.decode_image(*pair) for pair in zip(paths, contents, strict=True)]
    targets = [image.copy() for image in images]
    loader = RoiDataLoader(roidb, cfg.MODEL.NUM_CLASSES)
    samples = [loader[(i, 1.0, i)] for i in range(len(roidb))]
    options = MinibatchOptions.from_cfg()
    count = len(paths)

    def timed(call: Callable[[int], object]) -> Any:
        return measure(lambda i: call(i % count), CPU, _SECONDS_PER_STAGE)

    yield Row("read", "a file in the page cache", timed(lambda i: image_utils.read_file(paths[i])))
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in contents]
    yield Row(
        "decode",
        "into given memory",
        timed(lambda i: image_utils.decode_image(paths[i], contents[i], targets[i])),
        {
            "cv2.imread (reads too)": timed(lambda i: cv2.imread(paths[i])),
            "torchvision.io (RGB)": timed(lambda i: decode_image(tensors[i], ImageReadMode.RGB)),
        },
    )
    yield Row(
        "sample",
        "read, decode, objects, draws",
        timed(lambda i: loader.read((i, 1.0, i), targets[i])),
    )
    size = settings.batch_size

    def collate(i: int) -> dict[str, list]:
        return collate_minibatch([samples[(i + k) % count] for k in range(size)], options)

    yield Row("collate", f"a batch of {size}, pixels copied", timed(collate))
    if torch.cuda.is_available():
        pixels = collate(0)["data"][0]
        timing = timed(lambda i: pixels.pin_memory())
        yield Row("pin", f"{pixels.nbytes / 2**20:.1f} MiB of a batch of {size}", timing)


class _TorchvisionImages(torch_data.Dataset):
    """Images as torchvision's reference training reads them, without its targets."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return pil_to_tensor(default_loader(self._paths[index]))


def rate(roidb: Sequence[RoidbEntry], settings: DataSettings, processes: int) -> Rate:
    """Images/s of `build_train_loader` and of torchvision's images in a DataLoader."""
    # Before the first of these all processes have begun, and what they had prepared is used up.
    skipped = 2 * processes + 1
    batches = max(settings.images // settings.batch_size, 4 * skipped)
    wanted = batches * settings.batch_size
    repeated = [roidb[i % len(roidb)] for i in range(wanted)]
    warnings.filterwarnings("ignore", "This DataLoader will create")
    ours = build_train_loader(
        repeated, *rank_for_training(repeated), settings.batch_size, processes
    )
    theirs = torch_data.DataLoader(
        _TorchvisionImages([entry["image"] for entry in repeated]),
        settings.batch_size,
        shuffle=True,
        num_workers=processes,
        collate_fn=tuple,
        pin_memory=cfg.CUDA,
    )
    per_batch = [_seconds_per_batch(loader, skipped) for loader in (ours, theirs)]
    rates = [settings.batch_size / seconds for seconds in per_batch]
    pixels = sum(entry["height"] * entry["width"] for entry in roidb) / len(roidb)
    return Rate(processes, rates[0], rates[1], rates[0] * pixels / 1e6)


def _seconds_per_batch(loader: torch_data.DataLoader, skipped: int) -> float:
    begin, count = 0.0, 0
    for number, _batch in enumerate(loader):
        if number == skipped:
            begin = time.perf_counter()
        count = number
    return (time.perf_counter() - begin) / (count - skipped)


def format_rates(rates: Sequence[Rate]) -> str:
    """A table, a line a number of processes."""
    lines = ["processes    images/s   torchvision       x   Mpixel/s"]
    for r in rates:
        ratio = r.ours / r.torchvision
        lines.append(
            f"{r.processes:9d}{r.ours:12.1f}{r.torchvision:14.1f}{ratio:8.2f}{r.megapixels:11.1f}"
        )
    return "\n".join(lines)


def report(rows: Sequence[Row], rates: Sequence[Rate], settings: DataSettings) -> dict[str, Any]:
    """For JSON; stages in ms an image (collate and pin: a batch)."""
    return {
        "settings": asdict(settings),
        "stages": [asdict(row) for row in rows],
        "rates": [asdict(r) for r in rates],
    }
