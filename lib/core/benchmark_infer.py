"""What `tools/benchmark.py infer` measures: decoded images to detections beside torchvision's.

Batches of one are measured as a latency. Larger ones are measured as a test runs: threads paste and
encode the masks while the next batch is on the device. torchvision pastes them into planes of the
size of the image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
    fresh_memory,
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
from core.train_engine import place_model, prepare_device
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


class TorchvisionDetector:
    """torchvision's model, its results on its device."""

    def __init__(
        self, batches: Sequence[Sequence[Scene]], device: torch.device, amp: str, paste: bool
    ) -> None:
        torch.manual_seed(cfg.RNG_SEED)
        self.device, self._amp = device, amp
        model = torchvision_model(cfg.TEST.SCALE, cfg.TEST.MAX_SIZE)
        spread_scores(model)
        self._model = model.to(device).eval()
        if amp != "off":
            self._model = self._model.to(memory_format=torch.channels_last)
        self._batches = [
            [
                pinned(torch.from_numpy(s.image[..., ::-1].transpose(2, 0, 1).copy()), device)
                for s in batch
            ]
            for batch in batches
        ]
        self._calibrate()
        if not paste:
            resize = self._model.transform.postprocess

            def without_masks(results: list[dict[str, Tensor]], *sizes: list) -> list:
                for result in results:
                    result.pop("masks", None)
                return resize(results, *sizes)

            self._model.transform.postprocess = without_masks

    def run(self) -> int:
        """Every batch once; how many detections that made."""
        kept = 0
        for batch in self._batches:
            kept += sum(len(result["scores"]) for result in self._detect(batch))
        synchronize(self.device)
        return kept

    @torch.inference_mode()
    def _detect(self, batch: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        images = [image / 255 for image in move_to(batch, self.device)]
        with precision(self.device, self._amp):
            return self._model(images)

    def _calibrate(self) -> None:
        scores: list[Tensor] = []
        if cfg.RETINANET.RETINANET_ON:
            scored, predictor = self._model, self._model.head.classification_head
        else:
            scored, predictor = self._model.roi_heads, self._model.roi_heads.box_predictor

        def keep(module: nn.Module, args: tuple, out: Tensor | tuple[Tensor, ...]) -> None:
            if torch.is_tensor(out):  # RetinaNet's: of every anchor, far more than can be kept
                best = out.float().flatten(1).topk(min(CANDIDATES[-1], out[0].numel())).values
                scores.append(best.sigmoid().flatten().cpu())
            else:
                scores.append(out[0].float().softmax(-1)[:, 1:].flatten().cpu())

        hook = predictor.register_forward_hook(keep)
        scored.score_thresh = 1.0
        images = sum(map(len, self._batches))
        self.run()
        hook.remove()

        def kept_at(threshold: float) -> float:
            scored.score_thresh = threshold
            return self.run() / images

        choose_threshold(torch.cat(scores), images, kept_at)


@dataclass(frozen=True)
class InferCases:
    """What is measured."""

    batch_sizes: tuple[int, ...] = (1, 8)
    precisions: tuple[str, ...] = ("off", "bf16")  # as --amp
    rounds: int = 10
    batches: int = BATCHES  # different ones, all in each round


def infer_rates(device: torch.device, cases: InferCases) -> Iterator[Rate]:
    """Measure every case, this project's and torchvision's in turn, with masks pasted and without;
    yields each when it is there. A time is a batch's, the mean of a round.

    Raises UserError if the config's model detects nothing by itself.
    """
    if not detects_by_itself():
        raise UserError(
            "--cfg is not a model that makes detections by itself (MODEL.FASTER_RCNN or "
            "RETINANET.RETINANET_ON True, MODEL.RPN_ONLY False)"
        )
    prepare_device(device)
    who = {"ours": OwnDetector}
    if torchvision_model(cfg.TEST.SCALE, cfg.TEST.MAX_SIZE) is not None:
        who["torchvision"] = TorchvisionDetector
    for batch_size in cases.batch_sizes:
        batches = draw_batches(
            cases.batches, batch_size, classes=cfg.MODEL.NUM_CLASSES - 1, one_size=True
        )
        for amp in cases.precisions:
            for paste in (True, False) if cfg.MODEL.MASK_ON else (True,):
                for name, kind in who.items():
                    fresh_memory(device)
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
                    yield Rate(name, title, batch_size, timing_of(times), *memory, notes)
                    del detector
