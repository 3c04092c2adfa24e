"""A trained detector as a function of images.

from core.predictor import Predictor

predict = Predictor("configs/baselines/e2e_mask_rcnn_R-50-FPN_1x.yaml", "model.pth")
result = predict(cv2.imread("photo.jpg"))   # or of a list of images
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from core.config import (
    assert_and_infer_cfg,
    cfg,
    merge_cfg_from_file,
    merge_cfg_from_list,
    reset_cfg,
)
from core.detections import Detections
from core.errors import UserError
from core.test import network_size, queue_batch
from core.test_engine import initialize_model_from_cfg
from core.test_pipeline import finish, one_ahead, plan_batches
from core.train_engine import AMP_DTYPES
from datasets.vocabulary import Vocabulary, vocabulary_for, vocabulary_of
from utils.class_count import count_classes
from utils.device import pick_devices
from utils.image import read_image
from utils.image_sources import read_ahead
from utils.model_zoo import local_weights
from utils.run_dir import plain
from utils.segms import rle_to_mask
from utils.vis import convert_from_cls_format, draw
from utils.vis_layout import Layout, lay_out

logger = logging.getLogger(__name__)

Key = TypeVar("Key")
Done = TypeVar("Done")

# Drawing is what takes longest when a GPU detects.
FINISHING_THREADS = min(8, os.cpu_count() or 1)
# A stream looks this many batches ahead for images that fit into one.
LOOK_AHEAD = 4


@dataclass(frozen=True)
class Result:
    """What was found in one image, ordered by class; everything in pixels of that image."""

    height: int
    width: int
    boxes: np.ndarray  # (n, 4) float32 [x1, y1, x2, y2], both ends inside
    scores: np.ndarray  # (n,) float32
    classes: np.ndarray  # (n,) int64 labels, 1 ..
    rles: list[dict[str, Any]] | None  # n COCO run lengths; None for a model without masks
    keypoints: np.ndarray | None  # (n, 4, K) float32 x, y, logit, probability; None without
    vocabulary: Vocabulary

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def class_names(self) -> list[str]:
        """The n detections' classes by name."""
        return [self.vocabulary.names[label] for label in self.classes]

    @cached_property
    def masks(self) -> np.ndarray | None:
        """(n, height, width) bool; None for a model without masks."""
        if self.rles is None:
            return None
        masks = np.zeros((len(self), self.height, self.width), bool)
        for mask, rle in zip(masks, self.rles, strict=True):
            mask[:] = rle_to_mask(rle)
        return masks

    def above(self, thresh: float) -> Result:
        """Only the detections that score at least `thresh`."""
        keep = np.flatnonzero(self.scores >= thresh)
        return replace(
            self,
            boxes=self.boxes[keep],
            scores=self.scores[keep],
            classes=self.classes[keep],
            rles=None if self.rles is None else [self.rles[i] for i in keep],
            keypoints=None if self.keypoints is None else self.keypoints[keep],
        )

    def layout(self, thresh: float = 0.7, kp_thresh: float = 2.0) -> Layout:
        """What a picture of these detections shows, for `utils.vis`."""
        return lay_out(
            (self.height, self.width),
            np.hstack([self.boxes, self.scores[:, None]]),
            self.classes,
            self.rles,
            self.vocabulary.names,
            thresh,
            keypoints=self.keypoints,
            kp_thresh=kp_thresh,
            skeleton=self.vocabulary.skeleton,
        )

    def draw(self, image: np.ndarray, thresh: float = 0.7, kp_thresh: float = 2.0) -> np.ndarray:
        """The image (height, width, 3) uint8 BGR with its detections; small ones are enlarged."""
        return draw(image, self.layout(thresh, kp_thresh))


class Predictor:
    """Detects in images with one model.

    Thread safety: any number of threads may call one Predictor at once. Forward passes take turns
    on the device; pasting masks runs beside them. The global config belongs to the process: all
    Predictors of a process must have the same one, apart from their weights, and are made before
    others are in use.
    """

    def __init__(
        self,
        cfg_file: str | Path,
        weights: str | Path,
        dataset: str | None = None,
        *,
        device: str | torch.device | None = None,
        amp: str = "off",
        batch_size: int = 8,
        options: Sequence[Any] = (),
        detectron: bool | None = None,
    ) -> None:
        """Load a detector.

        Args:
            cfg_file: config (YAML), of this family or Detectron's own.
            weights: a checkpoint (`.pth`), Detectron's weights (`.pkl`), or a published model
                (`zoo://<config name>`).
            dataset: whose classes: what `--dataset` takes. Without it their number is read from
                the weights, and they are COCO's if there are 80 of them.
            device: `cuda`, `cuda:1`, `cpu`; by default a GPU if there is one.
            amp: `off`, `bf16` or `fp16`: precision of the network.
            batch_size: most images in a forward pass.
            options: `[key, value, ...]` merged into the config, as `--set` does.
            detectron: whether the weights are Detectron's; None: what the suffix says.

        Raises:
            UserError: a file is missing or does not fit, the device is not there, or this process
                already works with another config.
        """
        if batch_size < 1:
            raise UserError(f"batches hold at least one image, not {batch_size}")
        if amp not in AMP_DTYPES:
            raise UserError(f"amp is one of {', '.join(AMP_DTYPES)}, not {amp!r}")
        self.device = pick_devices(None if device is None else str(device))[0]
        weights = local_weights(weights)
        if detectron is None:
            detectron = weights.suffix == ".pkl"
        if dataset is not None:
            self.vocabulary = configure(cfg_file, options, lambda: vocabulary_of(dataset))
        else:
            self.vocabulary = configure(
                cfg_file, options, lambda: vocabulary_for(count_classes(weights))
            )
        self.model = initialize_model_from_cfg(
            argparse.Namespace(
                load_ckpt=None if detectron else str(weights),
                load_detectron=str(weights) if detectron else None,
                device=self.device,
            )
        )
        self._set_up(amp, batch_size)

    @classmethod
    def of_model(
        cls,
        model: torch.nn.Module,
        vocabulary: Vocabulary,
        *,
        device: torch.device,
        amp: str = "off",
        batch_size: int = 8,
    ) -> Predictor:
        """A Predictor of a model in eval mode on a device, by the config as it stands."""
        predictor = cls.__new__(cls)
        predictor.model, predictor.vocabulary, predictor.device = model, vocabulary, device
        predictor._set_up(amp, batch_size)
        return predictor

    def _set_up(self, amp: str, batch_size: int) -> None:
        self.batch_size = batch_size
        self._dtype = AMP_DTYPES[amp]
        self._turn = threading.Lock()

    def __call__(
        self, images: np.ndarray | str | Path | Sequence[np.ndarray | str | Path]
    ) -> Result | list[Result]:
        """Detect in an image, or in several.

        Args:
            images: (H, W, 3) uint8 BGR or a file's name: one Result; a sequence of them, of any
                sizes, or an array (N, H, W, 3): a list of Results in their order.

        Raises:
            UserError: a file cannot be read.
            ValueError, TypeError: an array is not an image.
        """
        if isinstance(images, (str, Path)) or (isinstance(images, np.ndarray) and images.ndim == 3):
            return self([images])[0]
        loaded = [_as_image(image) for image in images]
        sizes = [image.shape[:2] for image in loaded]
        results: list[Result] = [None] * len(loaded)
        batches = plan_batches(len(loaded), sizes, self.batch_size)
        for batch, found in one_ahead(batches, lambda b: self._queue([loaded[i] for i in b])):
            for i, detections in zip(batch, found, strict=True):
                results[i] = self._result(detections)
        return results

    def stream(
        self,
        images: Iterable[tuple[Key, np.ndarray]],
        then: Callable[[Key, np.ndarray, Result], Done],
    ) -> Iterator[Done]:
        """Detect in a stream of images while the next are being read and the last ones drawn.

        Args:
            images: (key, image (H, W, 3) uint8 BGR); read in a thread of its own.
            then: called with (key, image, Result) in threads, several at once.

        Yields:
            what `then` returned, in the order of the batches: images of equal size, such as a
            video's, keep their order; others may wait for their like.
        """
        waiting: deque[Future[Done]] = deque()
        most = FINISHING_THREADS + self.batch_size
        with ThreadPoolExecutor(FINISHING_THREADS, "finish") as threads:
            batches = self._batches(read_ahead(images, 2 * self.batch_size))
            for batch, found in one_ahead(batches, lambda b: self._queue([im for _, im in b])):
                for (key, image), detections in zip(batch, found, strict=True):
                    waiting.append(threads.submit(self._complete, key, image, detections, then))
                while waiting and (len(waiting) > most or waiting[0].done()):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _batches(
        self, images: Iterable[tuple[Key, np.ndarray]]
    ) -> Iterator[list[tuple[Key, np.ndarray]]]:
        """Images in batches of equal size in the network; a few at most are held back."""
        alike: dict[tuple[int, int], list[tuple[Key, np.ndarray]]] = {}
        for key, image in images:
            size = network_size(*image.shape[:2])
            group = alike.setdefault(size, [])
            group.append((key, image))
            if len(group) == self.batch_size:
                yield alike.pop(size)
            elif sum(map(len, alike.values())) >= LOOK_AHEAD * self.batch_size:
                yield alike.pop(next(iter(alike)))  # the one that has waited longest
        yield from alike.values()

    def _queue(self, images: list[np.ndarray]) -> Callable[[], list[Detections]]:
        """Begin with images of equal network size; what is returned waits for the detections."""
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with (
            self._turn,
            on_device,
            torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None),
        ):
            wait = queue_batch(self.model, images)

        def take_turns() -> list[Detections]:
            with self._turn, on_device:
                return wait()

        return take_turns

    def _result(self, detections: Detections) -> Result:
        by_class = finish(detections, cfg.MODEL.NUM_CLASSES)
        boxes, rles, keypoints, classes = convert_from_cls_format(*by_class)
        if keypoints is not None:
            shape = (len(keypoints), 4, cfg.KRCNN.NUM_KEYPOINTS)
            keypoints = np.array(keypoints, np.float32).reshape(shape)
        return Result(
            detections.height,
            detections.width,
            boxes[:, :4],
            boxes[:, 4],
            classes,
            rles,
            keypoints,
            self.vocabulary,
        )

    def _complete(
        self,
        key: Key,
        image: np.ndarray,
        detections: Detections,
        then: Callable[[Key, np.ndarray, Result], Done],
    ) -> Done:
        return then(key, image, self._result(detections))


def _as_image(image: np.ndarray | str | Path) -> np.ndarray:
    if isinstance(image, (str, Path)):
        return read_image(image)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = getattr(image, "dtype", type(image).__name__)
        raise TypeError(f"an image is a numpy array of uint8 in BGR order, not {kind}")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"an image has the shape (height, width, 3), not {image.shape}")
    return image


def configure(
    cfg_file: str | Path, options: Sequence[Any], find_vocabulary: Callable[[], Vocabulary]
) -> Vocabulary:
    """Set the global config up; what it was comes back if that fails."""
    before, was_frozen = copy.deepcopy(cfg), cfg.is_frozen()
    try:
        reset_cfg()
        merge_cfg_from_file(cfg_file)
        merge_cfg_from_list(options)
        vocabulary = find_vocabulary()
        cfg.MODEL.NUM_CLASSES = len(vocabulary.names)
        cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS = False
        assert_and_infer_cfg()
        if was_frozen and plain(cfg) != plain(before):
            raise UserError(
                f"{cfg_file} differs from the config that this process works with already: use "
                "one process for each config"
            )
    except UserError:
        cfg.freeze(False)
        cfg.update(before)
        cfg.freeze(was_frozen)
        raise
    return vocabulary
