"""Where the time of a training step goes by stage, for `tools/benchmark.py train --profile`.

Ranges of torch.profiler are put around the functions and modules of a stage while it is measured.
What an operator of the backward pass takes is its forward operator's stage's: both carry the same
sequence number of autograd. CUDA graphs are off, since a replay is one event.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

import modeling.model_builder as model_builder
import utils.blob as blob_utils
from core.benchmark_train import OwnTrainer
from modeling import fast_rcnn_heads, keypoint_rcnn_heads, mask_rcnn_heads, retinanet_heads

BACKBONE, FPN, LOSSES = "backbone", "FPN", "losses"
RPN_HEAD, RPN_TARGETS, PROPOSALS = "RPN head", "RPN targets", "proposals"
RETINANET_HEAD, RETINANET_TARGETS = "RetinaNet head", "RetinaNet targets"
SAMPLING, BOX_HEAD = "RoI sampling", "box head"
MASK_TARGETS, MASK_HEAD = "mask targets", "mask head"
KEYPOINT_TARGETS, KEYPOINT_HEAD = "keypoint targets", "keypoint head"
IMAGES, OPTIMIZER, OTHER = "images", "optimizer", "everything else"
STAGES = (  # as they follow in a step
    *(IMAGES, BACKBONE, FPN, RPN_HEAD, RPN_TARGETS, PROPOSALS, RETINANET_HEAD, RETINANET_TARGETS),
    *(SAMPLING, BOX_HEAD, MASK_TARGETS, MASK_HEAD, KEYPOINT_TARGETS, KEYPOINT_HEAD, LOSSES),
    *(OPTIMIZER, OTHER),
)
FUNCTIONS = (
    (blob_utils, "images_to_blob", IMAGES),
    (model_builder, "rpn_targets", RPN_TARGETS),
    (model_builder, "roi_pool_of", SAMPLING),
    (model_builder, "sample_rois", SAMPLING),
    (model_builder, "mask_targets", MASK_TARGETS),
    (model_builder, "keypoint_targets", KEYPOINT_TARGETS),
    (retinanet_heads, "retinanet_targets", RETINANET_TARGETS),
    (fast_rcnn_heads, "fast_rcnn_losses", LOSSES),
    (mask_rcnn_heads, "mask_rcnn_loss", LOSSES),
    (keypoint_rcnn_heads, "keypoint_loss", LOSSES),
)
# Of the model and of its parts, as far as it has them. Within a stage's range lie those of others:
# the innermost counts.
METHODS = (
    ("RPN", "predict", RPN_HEAD),
    ("RPN", "predict_at", RPN_HEAD),
    ("RPN", "propose", PROPOSALS),
    ("RPN", "losses", LOSSES),
    ("RetinaNet_Outs", "predict", RETINANET_HEAD),
    ("RetinaNet_Outs", "losses", LOSSES),
    ("Box_Head", "forward", BOX_HEAD),
    ("Box_Outs", "forward", BOX_HEAD),
    ("", "_mask_loss", MASK_HEAD),
    ("", "_keypoint_loss", KEYPOINT_HEAD),
)
RANGE = "stage: "
OPTIMIZER_RANGES = ("Optimizer.step#", "Optimizer.zero_grad#")  # torch's own
NODE = "autograd::engine::evaluate_function: "  # a node of the backward pass


@dataclass(frozen=True)
class StageTime:
    """Of a step: the device's time in kernels that the stage launched, and how many these are; on
    a CPU the time it took and its operators, those called by operators too."""

    name: str
    forward_ms: float
    backward_ms: float
    forward_calls: float
    backward_calls: float
    share: float  # of the time of all stages


def stage_times(trainer: OwnTrainer, steps: int = 4) -> list[StageTime]:
    """Train `steps` steps; the stages that they have, in their order."""
    return summed(record(trainer, steps), steps, trainer.device)


def record(trainer: OwnTrainer, steps: int) -> Sequence[FunctionEvent]:
    """The profiler's events of `steps` training steps, within the ranges of their stages."""
    trainer.steps(1, cuda_graphs=False)
    activities = [ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with (
        ranges(trainer.model),
        profile(activities=activities) as found,
        record_function(RANGE + OTHER),
    ):
        trainer.steps(steps - 1, cuda_graphs=False)  # trains one more, to end the last's time
    return found.events()


@contextmanager
def ranges(model: nn.Module) -> Iterator[None]:
    """Put a range of the profiler around what each stage of a Generalized_RCNN calls.

    A compiled backbone's pyramid is part of it: inside there is nothing to be told apart.
    """
    with ExitStack() as stack:
        for owner, name, stage in FUNCTIONS:
            stack.enter_context(_range_around(owner, name, stage))
        for path, name, stage in METHODS:
            owner = getattr(model, path, None) if path else model
            if owner is not None:
                stack.enter_context(_range_around(owner, _called(owner, name), stage))
        body = model.Conv_Body
        call = _called(body, "forward")
        pyramid = hasattr(body, "conv_body") and call == "forward"
        stack.enter_context(_range_around(body, call, FPN if pyramid else BACKBONE))
        if pyramid:
            stack.enter_context(_range_around(body.conv_body, "stages", BACKBONE))
        yield


def _called(owner: nn.Module, name: str) -> str:
    """The method that runs when `name` is meant: a compiled module's forward() is only traced."""
    if name == "forward" and owner._compiled_call_impl is not None:
        return "_compiled_call_impl"
    return name


@contextmanager
def _range_around(owner: Any, name: str, stage: str) -> Iterator[None]:
    own, original = name in vars(owner), getattr(owner, name)

    @wraps(original)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(RANGE + stage):
            return original(*args, **kwargs)

    setattr(owner, name, inside)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def summed(events: Sequence[FunctionEvent], steps: int, device: torch.device) -> list[StageTime]:
    """Means of a step over the profiler's events of `steps` steps, as they began."""
    cuda = device.type == "cuda"
    on_host = [e for e in events if e.device_type == DeviceType.CPU and not e.is_async]
    on_device = [e for e in events if e.device_type == DeviceType.CUDA]
    # Ranges appear on the device as well, over the kernels of what they enclose.
    annotations = {e.name for e in on_device if e.is_user_annotation}
    microseconds: dict[tuple[str, bool], float] = defaultdict(float)
    calls: dict[tuple[str, bool], int] = defaultdict(int)
    for event, place in zip(on_host, _places(on_host), strict=True):
        if cuda:
            kernels = [k.duration for k in event.kernels if k.name not in annotations]
            microseconds[place] += sum(kernels)
            calls[place] += len(kernels)
        else:
            microseconds[place] += event.self_cpu_time_total
            calls[place] += "::" in event.name and not event.name.startswith("autograd::")
    if cuda:  # kernels that no operator is known to have launched
        kernels = [e.time_range.elapsed_us() for e in on_device if not e.is_user_annotation]
        microseconds[OTHER, False] += sum(kernels) - sum(microseconds.values())
        calls[OTHER, False] += len(kernels) - sum(calls.values())
    total = sum(microseconds.values())
    return [
        StageTime(
            stage,
            *(1e-3 * microseconds[stage, backward] / steps for backward in (False, True)),
            *(calls[stage, backward] / steps for backward in (False, True)),
            (microseconds[stage, False] + microseconds[stage, True]) / total,
        )
        for stage in STAGES
        if calls[stage, False] or calls[stage, True]
    ]


def _places(events: Sequence[FunctionEvent]) -> list[tuple[str, bool]]:
    """Stage of each event on the host, and whether it is of the backward pass."""
    places: list[tuple[str, bool]] = []
    place_of: dict[int, tuple[str, bool]] = {}
    # Of each thread the sequence numbers in its forward pass, ascending, and their events' stages.
    # A number shows the next node's: among the events with the same the last has made the node.
    made: dict[int, tuple[list[int], list[str]]] = defaultdict(lambda: ([], []))
    last_node: dict[int, str] = {}
    for event in events:  # parents come before their children
        stage, backward = place_of.get(id(event.cpu_parent), (OTHER, False))
        if event.name.startswith(RANGE):
            stage = event.name.removeprefix(RANGE)
        elif event.name.startswith(OPTIMIZER_RANGES):
            stage = OPTIMIZER
        elif event.name.startswith(NODE):
            backward = True
            if event.sequence_nr >= 0:
                numbers, stages = made[event.fwd_thread]
                at = bisect.bisect_right(numbers, event.sequence_nr) - 1
                stage = stages[at] if at >= 0 else OTHER
            else:  # a parameter's gradient, kept right after it was computed
                stage = last_node.get(event.thread, OTHER)
            last_node[event.thread] = stage
        elif event.sequence_nr >= 0 and not backward:
            numbers, stages = made[event.thread]
            numbers.append(event.sequence_nr)
            stages.append(stage)
        place_of[id(event)] = (stage, backward)
        places.append((stage, backward))
    return places


def table(stages: Sequence[StageTime], device: torch.device) -> str:
    """The stages and their sum as text."""
    what = "kernels" if device.type == "cuda" else "operators"
    head = ["", "forward ms", "backward ms", "together", "share", what, "backward"]
    rows = [head]
    columns: list[Callable[[StageTime], float]] = [
        lambda s: s.forward_ms,
        lambda s: s.backward_ms,
        lambda s: s.forward_ms + s.backward_ms,
        lambda s: 100 * s.share,
        lambda s: s.forward_calls,
        lambda s: s.backward_calls,
    ]
    formats = ("{:.2f}", "{:.2f}", "{:.2f}", "{:.1f} %", "{:.0f}", "{:.0f}")
    for name, members in [*((s.name, [s]) for s in stages), ("a step", list(stages))]:
        sums = [sum(column(s) for s in members) for column in columns]
        rows.append([name, *(f.format(v) for f, v in zip(formats, sums, strict=True))])
    return "\n".join(f"{row[0]:<18}" + "".join(f"{c:>13}" for c in row[1:]) for row in rows)
