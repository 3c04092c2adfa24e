"""What `tools/benchmark.py test` measures: a whole test, from JPEG files to average precision.

The network has random weights but the work of a trained one: the score threshold is set so that
the usual number of detections is kept in every image, and their masks are discs, not noise.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.benchmark import synchronize
from core.benchmark_models import calibrate, random_model
from core.config import assert_and_infer_cfg, cfg, merge_cfg_from_file, merge_cfg_from_list
from core.errors import UserError
from core.test import class_results, detect_batch, queue_batch
from core.test_engine import detect_and_score
from core.test_pipeline import (
    FINISHING_THREADS,
    MOST_UNFINISHED,
    Stages,
    finish,
    one_ahead,
    plan_batches,
    precision,
)
from core.train_engine import place_model, prepare_device
from datasets.dataset_catalog import register, resolve_dataset
from datasets.json_dataset import JsonDataset
from utils.blob import Placed, pack_images
from utils.garbage import only_young_garbage
from utils.image import read_image

CALIBRATION_IMAGES = 16  # that the score threshold is tried on
PROFILED_BATCHES = 8


@dataclass
class TestBenchmark:
    """Rates in images a second, times in seconds."""

    __test__ = False

    settings: dict[str, Any]
    detections_per_image: float
    pure_rate: float  # decoded images in memory to boxes and masks; nothing pasted
    pasted_rate: float  # the same to masks pasted and encoded
    test_rate: float  # JPEG files to scored AP
    test_seconds: float
    evaluation_seconds: float  # from the last image tested to the scores
    waits: dict[str, float]  # seconds that the thread which feeds the device spent on what
    stages: dict[str, float]  # milliseconds an image, each stage by itself

    @property
    def share(self) -> float:
        """The test's rate as a part of the pure rate."""
        return self.test_rate / self.pure_rate

    @property
    def share_of_pasted(self) -> float:
        """The test's rate as a part of the rate of inference with masks pasted and encoded."""
        return self.test_rate / self.pasted_rate

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {
            "share_of_pure_rate": self.share,
            "share_of_pasted_rate": self.share_of_pasted,
        }

    def table(self) -> str:
        """The figures as text."""
        images = self.settings["images"]
        rows = [
            ("detections an image", f"{self.detections_per_image:.1f}", ""),
            ("pure forward", f"{self.pure_rate:.1f} images/s", "decoded images to boxes and masks"),
            ("pure inference", f"{self.pasted_rate:.1f} images/s", "to masks pasted and encoded"),
            ("whole test", f"{self.test_rate:.1f} images/s", "JPEG files to scored AP"),
            (
                "of the pure forward",
                f"{100 * self.share:.0f} %",
                f"{self.test_seconds:.2f} s in all",
            ),
            ("of the pure inference", f"{100 * self.share_of_pasted:.0f} %", ""),
            ("evaluation", f"{self.evaluation_seconds:.2f} s", "what is left of it after the test"),
        ]
        rows += [
            (f"main thread: {what}", f"{seconds:.2f} s", f"{1e3 * seconds / images:.2f} ms/image")
            for what, seconds in self.waits.items()
        ]
        rows += [(f"alone: {what}", f"{ms:.2f} ms/image", "") for what, ms in self.stages.items()]
        widths = [max(len(row[k]) for row in rows) for k in (0, 1)]
        return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def configure(spec: str, cfg_file: str | Path, options: Sequence[str]) -> str:
    """Set and freeze the config of a model for a data set; the name of its part that is tested.

    spec: as --dataset; options: `[key, value, ...]` as --set. Raises UserError for either.
    """
    merge_cfg_from_file(cfg_file)
    merge_cfg_from_list(options)
    if not cfg.MODEL.FASTER_RCNN:
        raise UserError(f"{cfg_file} is not a model of two stages (MODEL.FASTER_RCNN True)")
    dataset = resolve_dataset(spec)
    if not dataset.test_names:
        raise UserError(f"--dataset {spec} names no images to test on: add val: to it.")
    cfg.MODEL.NUM_CLASSES = dataset.num_classes
    cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS = False
    assert_and_infer_cfg()
    return dataset.test_names[0]


def benchmark_test(
    dataset_name: str,
    device: torch.device,
    *,
    num_images: int = 1000,
    batch_size: int = 8,
    amp: str = "off",
) -> TestBenchmark:
    """Measure a test with the model of the (frozen) config.

    Args:
        dataset_name: of the catalog; its images are repeated until there are num_images.

    Raises:
        UserError: the model finds too little to make a test of it.
    """
    prepare_device(device)
    torch.manual_seed(cfg.RNG_SEED)
    model = place_model(random_model(), device).eval()
    with tempfile.TemporaryDirectory() as folder:
        dataset = repeat_dataset(JsonDataset(dataset_name), num_images, Path(folder))
        roidb = dataset.get_roidb()
        sizes = [(entry["height"], entry["width"]) for entry in roidb]
        batches = plan_batches(len(roidb), sizes, batch_size)
        images = _Decoded([entry["image"] for entry in roidb], device)
        tried = batches[:: max(1, len(batches) * batch_size // CALIBRATION_IMAGES)]
        calibrate(model, [images.batch(batch) for batch in tried], device, amp)
        with precision(device, amp), only_young_garbage():
            _one_batch_of_each_size(model, images, batches)
            pure = _pure_rate(model, images, batches)
            pasted = _pasted_rate(model, images, batches)
            stages = _profile(model, images, batches[:: max(1, len(batches) // PROFILED_BATCHES)])
        del images  # a test does not have them, and forks the slower the more there is
        waits = Stages()
        begin = time.perf_counter()
        again = JsonDataset(dataset.name)  # its annotations have been read by now
        found, _ = detect_and_score(
            model, again, Path(folder), batch_size=batch_size, amp=amp, stages=waits
        )
        end = time.perf_counter()
    total, evaluation = end - begin, waits.seconds["evaluate"]
    seconds = dict(waits.seconds)
    seconds["the rest"] = total - sum(seconds.values())
    kept = sum(len(boxes) for of_class in found.all_boxes for boxes in of_class)
    settings = {
        "model": cfg.MODEL.CONV_BODY,
        "scale": f"{cfg.TEST.SCALE}/{cfg.TEST.MAX_SIZE}",
        "images": num_images,
        "batch_size": batch_size,
        "amp": amp,
        "decoding_threads": cfg.DATA_LOADER.NUM_THREADS,
        "score_thresh": cfg.TEST.SCORE_THRESH,
    }
    return TestBenchmark(
        settings=settings,
        detections_per_image=kept / num_images,
        pure_rate=pure,
        pasted_rate=pasted,
        test_rate=num_images / total,
        test_seconds=total,
        evaluation_seconds=evaluation,
        waits=seconds,
        stages=stages | {"evaluate": 1e3 * evaluation / num_images},
    )


def repeat_dataset(dataset: JsonDataset, count: int, folder: Path) -> JsonDataset:
    """A data set of `count` images: those of `dataset`, in its order, as often as needed.

    Its annotation file goes to `folder`; the image files are the same.
    """
    source = dataset.COCO
    images, annotations = [], []
    for number in range(count):
        image = source.imgs[dataset.image_ids[number % len(dataset.image_ids)]]
        images.append(
            image | {"id": number, "file_name": dataset.image_prefix + image["file_name"]}
        )
        for annotation in source.imgToAnns[image["id"]]:
            annotations.append(annotation | {"id": len(annotations) + 1, "image_id": number})
    content = {"images": images, "annotations": annotations}
    content["categories"] = source.dataset["categories"]
    file = folder / f"{dataset.name}_{count}.json"
    file.write_text(json.dumps(content))
    register(file.stem, file, Path(dataset.image_directory))
    return JsonDataset(file.stem)


class _Decoded:
    """Batches of decoded images, pinned for a GPU; a file is decoded and kept once."""

    def __init__(self, paths: Sequence[str], device: torch.device) -> None:
        self.paths, self.device = paths, device
        self._images: dict[str, np.ndarray] = {}
        self._packed: dict[tuple[str, ...], tuple[Tensor, list[Placed]]] = {}

    def batch(self, indices: Sequence[int]) -> tuple[list[np.ndarray], tuple]:
        """Images (H, W, 3) uint8, and the same packed."""
        paths = tuple(self.paths[i] for i in indices)
        for path in paths:
            if path not in self._images:
                self._images[path] = read_image(path)
        images = [self._images[path] for path in paths]
        if paths not in self._packed:
            pixels, places = pack_images(images)
            pinned = pixels.pin_memory() if self.device.type == "cuda" else pixels
            self._packed[paths] = pinned, places
        return images, self._packed[paths]


def _one_batch_of_each_size(
    model: nn.Module, images: _Decoded, batches: Sequence[Sequence[int]]
) -> None:
    """Warm up: libraries choose their kernels by the shape of the input."""
    seen = set()
    for batch in batches:
        decoded, packed = images.batch(batch)
        shape = len(batch), decoded[0].shape
        if shape not in seen:
            seen.add(shape)
            for _ in range(2):  # the second time it is recorded
                for found in detect_batch(model, decoded, packed=packed):
                    class_results(found, cfg.MODEL.NUM_CLASSES)
    synchronize(images.device)


def _pure_rate(model: nn.Module, images: _Decoded, batches: Sequence[Sequence[int]]) -> float:
    """Images a second from decoded images in memory to boxes and soft masks on the device."""
    decoded = [images.batch(batch) for batch in batches]
    synchronize(images.device)
    begin = time.perf_counter()
    for _ in one_ahead(decoded, lambda batch: queue_batch(model, batch[0], packed=batch[1])):
        pass
    synchronize(images.device)
    return sum(map(len, batches)) / (time.perf_counter() - begin)


def _pasted_rate(model: nn.Module, images: _Decoded, batches: Sequence[Sequence[int]]) -> float:
    """Images a second from decoded images in memory to boxes and RLEs, as a test makes them."""
    decoded = [images.batch(batch) for batch in batches]
    synchronize(images.device)
    waiting: deque[Future] = deque()
    begin = time.perf_counter()
    with ThreadPoolExecutor(FINISHING_THREADS) as threads:
        for _, detections in one_ahead(
            decoded, lambda batch: queue_batch(model, batch[0], packed=batch[1])
        ):
            for found in detections:
                waiting.append(threads.submit(finish, found, cfg.MODEL.NUM_CLASSES))
            while len(waiting) > MOST_UNFINISHED:
                waiting.popleft().result()
        for future in waiting:
            future.result()
    synchronize(images.device)
    return sum(map(len, batches)) / (time.perf_counter() - begin)


class _Watch:
    """A timer of detect_batch that waits for the device at both ends."""

    def __init__(self, seconds: dict[str, float], name: str, device: torch.device) -> None:
        self._seconds, self._name, self._device = seconds, name, device

    def tic(self) -> None:
        synchronize(self._device)
        self._begin = time.perf_counter()

    def toc(self) -> None:
        synchronize(self._device)
        self._seconds[self._name] += time.perf_counter() - self._begin


_STAGES = {
    "im_detect_bbox": "forward",
    "misc_bbox": "suppression",
    "im_detect_mask": "mask head",
    "im_detect_keypoints": "keypoint head",
}


def _profile(
    model: nn.Module, images: _Decoded, batches: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Milliseconds an image of each stage, one after the other in one thread."""
    seconds: dict[str, float] = defaultdict(float)
    timers = {key: _Watch(seconds, name, images.device) for key, name in _STAGES.items()}
    for batch in batches:
        decode = _Watch(seconds, "decode", images.device)
        decode.tic()
        for index in batch:
            read_image(images.paths[index])
        decode.toc()
        decoded, packed = images.batch(batch)
        found = detect_batch(model, decoded, timers, packed=packed)
        finish = _Watch(seconds, "paste and encode", images.device)
        finish.tic()
        for one in found:
            class_results(one, cfg.MODEL.NUM_CLASSES)
        finish.toc()
    count = sum(map(len, batches))
    return {name: 1e3 * value / count for name, value in seconds.items()}
