"""The gradients of the measured steps beside those of the plain path: fp32, eager, no TF32.

Speed that changes what is learned is worth nothing: `tools/benchmark.py train` looks once at each
precision before it measures any.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import modeling.model_builder as model_builder
from core.benchmark_models import PRECISIONS, fresh_memory
from core.benchmark_train import OwnTrainer, TrainCases, draw_scenes
from core.config import cfg
from core.errors import UserError
from core.train_engine import prepare_device

# bf16 rounds each activation to 8 bits: Mask R-CNN R-50-FPN with random weights was seen at 0.99998
# (300 pixels, CPU). Less than this is no rounding.
LEAST_COSINE = 0.98


@dataclass(frozen=True)
class GradientCheck:
    """All gradients of a step as one vector, beside those of the plain path."""

    name: str  # the precision
    norm_change: float  # of its length, relative
    distance: float  # of the two vectors, relative to the plain one's length
    cosine: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"gradients, {self.name} beside plain fp32: cosine {self.cosine:.5f}, "
            f"length {100 * self.norm_change:+.2f} %, distance {100 * self.distance:.2f} %"
        )


def gradient_checks(device: torch.device, cases: TrainCases) -> Iterator[GradientCheck]:
    """Compare every precision of the cases, on their smallest batch; yields each when it is there.

    Weights, batch and random draws are the same. So are the RoIs: those of the plain pass are given
    to all, because the order of proposals hangs on the last bits of their scores, and other
    samples would make other gradients, no worse ones. What is compared is therefore the whole step
    but for the choice of RoIs; of recorded steps (core.train_graphs) the first run, not a replay.
    fp16 is left out: its gradients carry a loss scale that the first steps have yet to find.

    Raises UserError if a cosine is below LEAST_COSINE.
    """
    compared = [
        amp for amp in cases.precisions if amp != "fp16" and (amp, device.type) != ("off", "cpu")
    ]
    if not compared:
        return
    prepare_device(device)
    batches = draw_scenes(min(cases.batch_sizes))[:1]

    def gradients(amp: str) -> list[Tensor]:
        fresh_memory(device)
        trainer = OwnTrainer(batches, device, amp)
        torch.manual_seed(cfg.RNG_SEED)
        return trainer.gradients()

    with _same_rois():
        with _without_tf32():
            plain = gradients("off")
        for amp in compared:
            check = compare(PRECISIONS[amp], gradients(amp), plain)
            if not check.cosine >= LEAST_COSINE:
                raise UserError(
                    f"{check}: that is less than {LEAST_COSINE}, more than rounding explains; "
                    "please report this model and this hardware"
                )
            yield check


def compare(name: str, found: Sequence[Tensor], plain: Sequence[Tensor]) -> GradientCheck:
    """The check of two lists of gradients in the same order."""

    def product(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
        return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))

    squares, reference = product(found, found), product(plain, plain)
    both = product(found, plain)
    distance = max(squares - 2 * both + reference, 0.0)
    return GradientCheck(
        name,
        (squares / reference) ** 0.5 - 1,
        (distance / reference) ** 0.5,
        both / (squares * reference) ** 0.5,
    )


@contextlib.contextmanager
def _same_rois() -> Iterator[None]:
    """The first step's proposals, matched to the objects, are those of all steps."""
    original, first = model_builder.roi_pool_of, []

    def pool_of(*args: Any) -> Any:
        if not first:
            first.append(original(*args))
        return first[0]

    model_builder.roi_pool_of = pool_of
    try:
        yield
    finally:
        model_builder.roi_pool_of = original


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
