"""What `tools/benchmark.py infer` measures: images to detections beside torchvision's and others'.

Batches of one are measured as a latency. Larger ones are measured as a test runs: threads paste and
encode the masks while the next batch is on the device. The peers paste them into planes of the size
of the image.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.benchmark import synchronize, timing_of
from core.benchmark_models import (
    CANDIDATES,
    PRECISIONS,
    Batch,
    Rate,
    Scene,
    calibrate,
    choose_threshold,
    detects_by_itself,
    draw_batches,
    flop_counter,
    fresh_memory,
    left_out_if_it_fails,
    matrix_rate,
    peak_gib,
    pinned,
    random_model,
    reserved_gib,
    spread_scores,
    torchvision_model,
)
from core.config import cfg
from core.detections import Detections, class_results
from core.errors import UserError
from core.test import queue_batch
from core.test_pipeline import FINISHING_THREADS, finish, one_ahead, precision
from core.test_slots import forget_graphs
from core.train_engine import AMP_DTYPES, place_model, prepare_device
from nn.parallel.scatter import move_to
from utils.blob import pack_images

BATCHES = 4  # different ones, in turn


class OwnDetector:
    """This project's model, to RLEs as a test makes them."""

    def __init__(
        self, batches: Sequence[Sequence[Scene]], device: torch.device, amp: str, paste: bool
    ) -> None:
        torch.manual_seed(cfg.RNG_SEED)
        self.device, self._amp, self._paste = device, amp, paste
        model = random_model()
        spread_scores(model)
        self.model = place_model(model, device).eval()
        self._batches = []
        for batch in batches:
            images = [scene.image for scene in batch]
            pixels, places = pack_images(images)
            self._batches.append((images, (pinned(pixels, device), places)))
        calibrate(self.model, self._batches, device, amp)

    def run(self) -> int:
        """Every batch once; how many detections that made."""
        kept = 0
        if len(self._batches[0][0]) == 1:  # a latency: nothing else is to be done meanwhile
            for batch in self._batches:
                (found,) = self._queue(batch)()
                kept += len(found.scores)
                if self._paste:
                    class_results(found, cfg.MODEL.NUM_CLASSES)
            synchronize(self.device)
            return kept
        pending = []
        with ThreadPoolExecutor(FINISHING_THREADS, "finish") as pool:
            for _, found in one_ahead(self._batches, self._queue):
                kept += sum(len(one.scores) for one in found)
                if self._paste:
                    pending += [pool.submit(finish, d, cfg.MODEL.NUM_CLASSES) for d in found]
            for task in pending:
                task.result()
        synchronize(self.device)
        return kept

    def _queue(self, batch: Batch) -> Callable[[], list[Detections]]:
        images, packed = batch
        with precision(self.device, self._amp):
            return queue_batch(self.model, images, packed=packed)


def flops_of_detecting(batches: Sequence[Sequence[Scene]], device: torch.device) -> int:
    """Floating-point operations of the matrix products and convolutions of this project's model."""
    detector = OwnDetector(batches, device, "off", paste=False)
    forget_graphs(detector.model)  # nothing can be counted in a replay
    with flop_counter() as counter:
        detector.run()
    return counter.get_total_flops()


class PeerDetector(ABC):
    """Another project's model, its results on its device.

    batches: in memory, of nested lists and dicts; their tensors are copied to the device each time.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[list], device: torch.device, amp: str
    ) -> None:
        self.device, self._amp = device, amp
        self._take(model)
        self._batches = [pinned(batch, device) for batch in batches]
        self._calibrate()

    @abstractmethod
    def detect(self, batch: list) -> list[int]:
        """How many detections each image of a batch on the device has."""

    @abstractmethod
    def scoring(self) -> nn.Module:
        """The part of the model that makes scores."""

    @abstractmethod
    def scores(self, made: Any) -> Tensor:
        """(K,) scores of all that may become a detection, from what `scoring` returns."""

    @abstractmethod
    def set_threshold(self, threshold: float) -> None:
        """Detections have higher scores than this."""

    def run(self) -> int:
        """Every batch once; how many detections that made."""
        kept = 0
        with torch.inference_mode():
            for batch in self._batches:
                moved = move_to(batch, self.device)
                with precision(self.device, self._amp):
                    kept += sum(self.detect(moved))
        synchronize(self.device)
        return kept

    def _take(self, model: nn.Module) -> None:
        spread_scores(model)
        self.model = model.to(self.device).eval()
        if self._amp != "off":
            self.model = self.model.to(memory_format=torch.channels_last)

    def _calibrate(self) -> None:
        found: list[Tensor] = []
        self.set_threshold(1.0)
        hook = self.scoring().register_forward_hook(
            lambda _, __, made: found.append(self.scores(made).float().cpu())
        )
        self.run()
        hook.remove()
        images = sum(map(len, self._batches))

        def kept_at(threshold: float) -> float:
            self.set_threshold(threshold)
            return self.run() / images

        choose_threshold(torch.cat(found), images, kept_at)


def best_sigmoids(logits: Tensor) -> Tensor:
    """(K,) scores of RetinaNet's anchors, fewer than all but more than can be kept.

    logits: of every class and anchor, (images, ...).
    """
    logits = logits.float().flatten(1)
    best = logits.topk(min(CANDIDATES[-1], logits.shape[1])).values
    return best.sigmoid().flatten()


class TorchvisionDetector(PeerDetector):
    """torchvision's model."""

    def __init__(
        self, batches: Sequence[Sequence[Scene]], device: torch.device, amp: str, paste: bool
    ) -> None:
        torch.manual_seed(cfg.RNG_SEED)
        model = torchvision_model(cfg.TEST.SCALE, cfg.TEST.MAX_SIZE)
        images = [
            [torch.from_numpy(s.image[..., ::-1].transpose(2, 0, 1).copy()) for s in batch]
            for batch in batches
        ]
        super().__init__(model, images, device, amp)
        if not paste:
            resize = self.model.transform.postprocess

            def without_masks(results: list[dict[str, Tensor]], *sizes: list) -> list:
                for result in results:
                    result.pop("masks", None)
                return resize(results, *sizes)

            self.model.transform.postprocess = without_masks

    def detect(self, batch: list[Tensor]) -> list[int]:
        return [len(found["scores"]) for found in self.model([image / 255 for image in batch])]

    def scoring(self) -> nn.Module:
        if cfg.RETINANET.RETINANET_ON:
            return self.model.head.classification_head
        return self.model.roi_heads.box_predictor

    def scores(self, made: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        if torch.is_tensor(made):
            return best_sigmoids(made)
        return made[0].float().softmax(-1)[:, 1:].flatten()

    def set_threshold(self, threshold: float) -> None:
        scored = self.model if cfg.RETINANET.RETINANET_ON else self.model.roi_heads
        scored.score_thresh = threshold


@dataclass(frozen=True)
class InferCases:
    """What is measured."""

    batch_sizes: tuple[int, ...] = (1, 8)
    precisions: tuple[str, ...] = ("off", "bf16")  # as --amp
    rounds: int = 10
    batches: int = BATCHES  # different ones, all in each round


def infer_rates(
    device: torch.device, cases: InferCases, others: Mapping[str, type[PeerDetector]]
) -> Iterator[Rate]:
    """Measure every case, this project's, torchvision's and the others' in turn, with masks pasted
    and without; yields each when it is there. A time is a batch's, the mean of a round.

    others: more peers by name, called as OwnDetector is; one that fails is left out. Raises
    UserError if the config's model detects nothing by itself.
    """
    if not detects_by_itself():
        raise UserError(
            "--cfg is not a model that makes detections by itself (MODEL.FASTER_RCNN or "
            "RETINANET.RETINANET_ON True, MODEL.RPN_ONLY False)"
        )
    prepare_device(device)
    who: dict[str, type[OwnDetector] | type[PeerDetector]] = {"ours": OwnDetector}
    if torchvision_model(cfg.TEST.SCALE, cfg.TEST.MAX_SIZE) is not None:
        who["torchvision"] = TorchvisionDetector
    who |= others
    for batch_size in cases.batch_sizes:
        batches = draw_batches(
            cases.batches, batch_size, classes=cfg.MODEL.NUM_CLASSES - 1, one_size=True
        )
        flops = flops_of_detecting(batches[:1], device)
        for amp in cases.precisions:
            floor = 1e3 * flops / matrix_rate(device, AMP_DTYPES[amp] or torch.float32)
            for paste in (True, False) if cfg.MODEL.MASK_ON else (True,):
                for name, kind in who.items():
                    fresh_memory(device)
                    with left_out_if_it_fails(name, others):
                        detector = kind(batches, device, amp, paste)
                        detector.run()
                        kept, times = 0, []
                        for _ in range(cases.rounds):
                            begin = time.perf_counter()
                            kept += detector.run()
                            times.append(1e3 * (time.perf_counter() - begin) / cases.batches)
                        notes = {"detections": kept / (cases.rounds * cases.batches * batch_size)}
                        title = PRECISIONS[amp] + ("" if paste else ", not pasted")
                        memory = peak_gib(device), reserved_gib(device)
                        yield Rate(name, title, batch_size, timing_of(times), *memory, notes, floor)
                    detector = None
