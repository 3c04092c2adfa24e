"""What `tools/benchmark.py train` measures: whole training steps beside torchvision's and others'.

This project's steps are those of core.train_engine.train(), the loop that the training scripts run.
An untrained RPN proposes hardly anything near the objects, a trained one a lot: to either model's
proposals are added boxes near the objects, as many as make the usual number of foreground RoIs.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import modeling.model_builder as model_builder
import nn as mynn
import utils.blob as blob_utils
import utils.net as net_utils
from core.benchmark import synchronize, timing_of
from core.benchmark_models import (
    LYING,
    PRECISIONS,
    Rate,
    Scene,
    draw_batches,
    flop_counter,
    fresh_memory,
    left_out_if_it_fails,
    matrix_rate,
    peak_gib,
    pinned,
    random_model,
    reserved_gib,
    torchvision_model,
)
from core.config import cfg
from core.test_pipeline import precision
from core.train_engine import AMP_DTYPES, TrainSettings, place_model, prepare_device, train
from core.train_job import CPU_INPUTS
from modeling.compilation import compile_parts
from modeling.generate_proposals import Proposals
from nn.parallel.scatter import move_to
from roi_data.minibatch import MinibatchOptions, Sample, pack_minibatch
from utils.training_stats import TrainingStats

BATCHES = 4  # different ones, in turn
WARM_UP = 3 * BATCHES  # steps; ours records the steps of each batch in them (core.train_graphs)
# Boxes near the objects, an image: with the objects themselves and what an untrained RPN finds they
# make about 80 foreground RoIs.
NEAR = 72
# Random weights: steps so small that they stay as they are.
LEARNING_RATE = 1e-5


class OwnTrainer:
    """This project's model and loop."""

    def __init__(self, batches: Sequence[Sequence[Scene]], device: torch.device, amp: str) -> None:
        torch.manual_seed(cfg.RNG_SEED)
        self.device, self._amp = device, amp
        model = place_model(random_model(), device)
        self.model = model
        _add_proposals(model, len(batches[0]))
        if cfg.MODEL.COMPILE:
            compile_parts(model)
        self._optimizer = net_utils.build_optimizer(model, cfg.SOLVER)
        self._parallel = mynn.DataParallel(model, [device], cpu_keywords=CPU_INPUTS, minibatch=True)
        options = MinibatchOptions.from_cfg()
        self._loader = [
            {name: [value] for name, value in pinned(_packed(b, options), device).items()}
            for b in batches
        ]

    def steps(self, count: int, warm_up: int = 0, cuda_graphs: bool = True) -> list[float]:
        """Train `count` steps after some to warm up; the milliseconds of each."""
        clock, count = _Clock(self.device), count + warm_up
        # The loop asks for the rate when a step begins; the last of count + 1 has no end.
        settings = TrainSettings(
            count + 1,
            disp_interval=count + 2,
            amp=self._amp,
            cuda_graphs=cuda_graphs and cfg.MODEL.CUDA_GRAPHS,
        )
        signal = train(
            self._parallel,
            self._optimizer,
            self._loader,
            clock,
            settings,
            TrainingStats(count + 1, quiet=True),  # raises if a loss is not finite
        )
        if signal:
            raise SystemExit(128 + signal)
        return clock.milliseconds()[warm_up:]

    def gradients(self) -> list[Tensor]:
        """Train one step; its gradients, of all trained parameters in their order."""
        found: list[Tensor] = []

        def keep(*_: Any) -> None:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            # A head without a RoI has none.
            found.extend(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained)

        hook = self._optimizer.register_step_pre_hook(keep)
        try:
            self.steps(0)
        finally:
            hook.remove()
        return found

    def counts(self) -> dict[str, float]:
        """Train a step or two; RoIs and foreground RoIs (RetinaNet: foreground anchors), means an
        image."""
        if cfg.RETINANET.RETINANET_ON:
            return self._anchor_counts()
        with calls_of(model_builder, "sample_rois") as calls:
            self.steps(1)
        found = [sampled for _, sampled in calls]
        images = sum(len(sampled.valid) for sampled in found)
        if not images:  # an RPN alone
            return {}
        rois = sum(int(sampled.valid.sum()) for sampled in found)
        foreground = sum(int(sampled.foreground.sum()) for sampled in found)
        return {"RoIs": rois / images, "foreground": foreground / images}

    def _anchor_counts(self) -> dict[str, float]:
        with calls_of(self.model.RetinaNet_Outs, "losses") as calls:
            self.steps(1)
        labels = [image for (_, _, targets), _ in calls for image in targets.labels]
        return {"foreground anchors": statistics.mean(int((k > 0).sum()) for k in labels)}


class PeerTrainer(ABC):
    """Another project's model, trained as its own scripts do, without their wait for the loss;
    methods as OwnTrainer's.

    batches: in memory, of nested lists and dicts; their tensors are copied to the device each step.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[list], device: torch.device, amp: str
    ) -> None:
        self.device, self._amp = device, amp
        self.model = model.to(device).train()
        # torchvision's keypoint loss takes no other layout than NCHW.
        if amp != "off" and not cfg.MODEL.KEYPOINTS_ON:
            self.model = self.model.to(memory_format=torch.channels_last)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.SGD(trained, LEARNING_RATE, 0.9, weight_decay=1e-4)
        self._batches = [pinned(batch, device) for batch in batches]

    @abstractmethod
    def counts(self) -> dict[str, float]: ...

    @abstractmethod
    def losses(self, batch: list) -> dict[str, Tensor]:
        """Of a batch on the device."""

    def steps(self, count: int, warm_up: int = 0) -> list[float]:
        clock, losses, count = _Clock(self.device), [], count + warm_up
        for step in range(count):
            clock(step)
            losses.append(self._step(step))
        clock(count)
        if not torch.stack(losses).isfinite().all():
            raise RuntimeError(f"{type(self).__name__}: the losses are not finite")
        return clock.milliseconds()[warm_up:]

    def _step(self, step: int) -> Tensor:
        batch = move_to(self._batches[step % len(self._batches)], self.device)
        with precision(self.device, self._amp):
            losses = sum(self.losses(batch).values())
        self._optimizer.zero_grad()
        losses.backward()
        self._optimizer.step()
        return losses.detach()


class TorchvisionTrainer(PeerTrainer):
    """torchvision's model."""

    def __init__(
        self,
        batches: Sequence[Sequence[Scene]],
        device: torch.device,
        amp: str,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(cfg.RNG_SEED)
        packed = [_torchvision_batch(batch) for batch in batches]
        super().__init__(torchvision_model(*_sides()), packed, device, amp)
        if hasattr(self.model, "rpn"):
            self.model.rpn.register_forward_hook(self._with_near)
        if compiled:
            self.model.backbone = torch.compile(self.model.backbone)
        self._near: list[Tensor] = []

    def counts(self) -> dict[str, float]:
        if cfg.RETINANET.RETINANET_ON:
            return self._anchor_counts()
        with calls_of(self.model.roi_heads, "select_training_samples") as calls:
            self.steps(1)
        labels = [label for _, sampled in calls for label in sampled[2]]
        return {
            "RoIs": statistics.mean(len(label) for label in labels),
            "foreground": statistics.mean(int((label > 0).sum()) for label in labels),
        }

    def _anchor_counts(self) -> dict[str, float]:
        with calls_of(self.model.head, "compute_loss") as calls:
            self.steps(1)
        # The last argument: the objects that the anchors of each image are matched to.
        found = [matches for args, _ in calls for matches in args[-1]]
        return {"foreground anchors": statistics.mean(int((m >= 0).sum()) for m in found)}

    def losses(self, batch: list) -> dict[str, Tensor]:
        images, targets, self._near = batch
        return self.model([image / 255 for image in images], targets)

    def _with_near(self, module: nn.Module, args: Any, output: tuple) -> tuple:
        proposals, losses = output
        both = [torch.cat(pair) for pair in zip(self._near, proposals, strict=True)]
        return both, losses


@contextmanager
def calls_of(owner: Any, name: str) -> Iterator[list[tuple[tuple, Any]]]:
    """The arguments and results of the calls of a module's or object's function made inside."""
    original, own, calls = getattr(owner, name), name in vars(owner), []

    def watch(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, original(*args, **kwargs)))
        return calls[-1][1]

    setattr(owner, name, watch)
    try:
        yield calls
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


class _Clock:
    """The time between calls, on the device; as a learning rate it is constant."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._points = device, []

    def __call__(self, step: int) -> float:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._points.append(event)
        else:
            self._points.append(time.perf_counter())
        return LEARNING_RATE

    def milliseconds(self) -> list[float]:
        synchronize(self._device)
        pairs = zip(self._points, self._points[1:], strict=False)
        if self._device.type == "cuda":
            return [first.elapsed_time(second) for first, second in pairs]
        return [1e3 * (second - first) for first, second in pairs]


def _packed(scenes: Sequence[Scene], options: MinibatchOptions) -> dict[str, Any]:
    """The batch that the loader would make, with the boxes near the objects as `near`."""
    samples = []
    for scene in scenes:
        height, width = scene.image.shape[:2]
        scale = blob_utils.get_target_scale(height, width, options.scales[0], options.max_size)
        size = blob_utils.scaled_size(height, width, scale)
        samples.append(Sample(scene.image, scene.entry, scale, size, (0, 0)))
    near = [
        torch.from_numpy(scene.near * s.scale) for scene, s in zip(scenes, samples, strict=True)
    ]
    return pack_minibatch(samples, options) | {"near": torch.stack(near)}


def _torchvision_batch(scenes: Sequence[Scene]) -> list:
    """uint8 RGB images (3, H, W), targets, and boxes near the objects in the network's pixels."""
    images, targets, near = [], [], []
    first_class = int(cfg.RETINANET.RETINANET_ON)  # 0 is the background everywhere else
    for scene in scenes:
        height, width = scene.image.shape[:2]
        scale = blob_utils.get_target_scale(height, width, cfg.TRAIN.SCALES[0], cfg.TRAIN.MAX_SIZE)
        images.append(torch.from_numpy(scene.image[..., ::-1].transpose(2, 0, 1).copy()))
        target = {
            "boxes": torch.from_numpy(scene.entry["boxes"]),
            "labels": torch.from_numpy(scene.entry["gt_classes"]).long() - first_class,
        }
        if cfg.MODEL.MASK_ON:
            target["masks"] = torch.from_numpy(scene.masks)
        if cfg.MODEL.KEYPOINTS_ON:
            points = torch.from_numpy(scene.entry["gt_keypoints"]).transpose(1, 2)
            target["keypoints"] = points.float().contiguous()
        targets.append(target)
        near.append(torch.from_numpy(scene.near * scale).float())
    return [images, targets, near]


def _add_proposals(model: nn.Module, batch_size: int) -> None:
    """Let the RPN propose the batch's `near` boxes too, and as many for each image of any batch as
    for one alone, so that all RoI slots are filled."""
    current: list[Tensor] = []

    def take_near(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple:
        current[:] = [kwargs.pop("near").float()]
        return args, kwargs

    model.register_forward_pre_hook(take_near, with_kwargs=True)
    if not hasattr(model, "RPN"):
        return
    model.RPN.collect_scale = batch_size
    propose = model.RPN.propose

    def propose_near(*args: Any) -> Proposals:
        found, near = propose(*args), current[0]
        best = found.scores.new_ones(near.shape[:2])
        boxes = torch.cat([near, found.boxes], dim=1)
        return Proposals(boxes, torch.cat([best, found.scores], dim=1))

    model.RPN.propose = propose_near


@dataclass(frozen=True)
class TrainCases:
    """What is measured."""

    batch_sizes: tuple[int, ...] = (2, 8, 16)
    precisions: tuple[str, ...] = ("off", "bf16")  # as --amp
    compiled_peer: bool = False  # on batches of one size, for it is compiled for each
    steps: int = 40


def train_rates(
    device: torch.device, cases: TrainCases, others: Mapping[str, type[PeerTrainer]]
) -> Iterator[Rate]:
    """Measure every case, this project's, torchvision's and the others' in turn; yields each when
    it is there.

    others: more peers by name, called as OwnTrainer is; one that fails is left out. Raises
    NonFiniteLossError or RuntimeError if a loss of this project or torchvision is not finite.
    """
    prepare_device(device)
    who: dict[str, Callable[..., OwnTrainer | PeerTrainer]] = {"ours": OwnTrainer}
    if torchvision_model(*_sides()) is not None:
        who["torchvision"] = TorchvisionTrainer
        if cases.compiled_peer:
            who["torchvision, compiled"] = partial(TorchvisionTrainer, compiled=True)
    who |= others
    for batch_size in cases.batch_sizes:
        batches = draw_scenes(batch_size, alike=cases.compiled_peer)
        flops = flops_of_training(batches, device)
        for amp in cases.precisions:
            floor = flops / matrix_rate(device, AMP_DTYPES[amp] or torch.float32)
            for name, kind in who.items():
                fresh_memory(device)
                with left_out_if_it_fails(name, others):
                    trainer = kind(batches, device, amp)
                    counts = trainer.counts()
                    times = trainer.steps(cases.steps, WARM_UP)
                    memory = peak_gib(device), reserved_gib(device)
                    rate = timing_of(times), *memory, counts, 1e3 * floor
                    yield Rate(name, PRECISIONS[amp], batch_size, *rate)
                trainer = None


def warm_trainer(device: torch.device, cases: TrainCases) -> OwnTrainer:
    """This project's trainer of the last case (batch size, precision), after some steps."""
    prepare_device(device)
    batches = draw_scenes(cases.batch_sizes[-1], alike=cases.compiled_peer)
    trainer = OwnTrainer(batches, device, cases.precisions[-1])
    trainer.steps(2 * BATCHES)
    return trainer


def profile_steps(trainer: OwnTrainer, steps: int = 4) -> str:
    """A table of the operations that the step spends most time in, on the device."""
    cuda = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        trainer.steps(steps)
    key = f"self_{'cuda' if cuda else 'cpu'}_time_total"
    return found.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=70)


def _sides() -> tuple[int, int]:
    return cfg.TRAIN.SCALES[0], cfg.TRAIN.MAX_SIZE


def draw_scenes(batch_size: int, alike: bool = False) -> list[list[Scene]]:
    """Batches for the model of the config; alike: all images are of one size."""
    kinds = {"lying": LYING[:1], "standing": LYING[:1]} if alike else {}
    return draw_batches(
        BATCHES,
        batch_size,
        classes=cfg.MODEL.NUM_CLASSES - 1,
        keypoints=cfg.KRCNN.NUM_KEYPOINTS if cfg.MODEL.KEYPOINTS_ON else 0,
        near=NEAR,
        **kinds,
    )


def flops_of_training(batches: Sequence[Sequence[Scene]], device: torch.device) -> int:
    """Floating-point operations of the matrix products and convolutions of a step."""
    fresh_memory(device)
    trainer = OwnTrainer(batches, device, "off")
    with flop_counter() as counter:
        trainer.steps(0)
    return counter.get_total_flops()
