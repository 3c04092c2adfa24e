"""Whole training steps as CUDA graphs: recorded once for every shape of batch, then replayed.

A detector's step launches some two thousand kernels. Where they are short the host needs longer to
launch them than the GPU to run them; replaying a recorded step costs the host next to nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.errors import UserError
from roi_data.minibatch import GROWING_INPUTS
from utils.cuda_graphs import end_broken_recording
from utils.streams import stream_for

logger = logging.getLogger(__name__)

# Names of the losses and of the metrics; with their values: this rank's, the means over the ranks.
Names = tuple[tuple[str, ...], tuple[str, ...]]
StepValues = tuple[Names, Tensor, Tensor]

# Shapes that are recorded. The frequent ones come first; were others to take their places, a data
# set of more shapes would be recorded over and over, which takes longer than a step does.
MOST_GRAPHS = 128


def training_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that all work of a training on this GPU is queued on: recording does not work on
    the default one, and gradients must be accumulated on the stream they are recorded on."""
    return stream_for("training", device)


@contextlib.contextmanager
def on_training_stream(*devices: torch.device) -> Iterator[None]:
    """Queue the block's work on the devices' `training_stream`, between what was queued before and
    after it; nothing on the CPU. The first device is the current one inside."""
    gpus = [device for device in devices if device.type == "cuda"]
    outside = [torch.cuda.current_stream(device) for device in gpus]
    with contextlib.ExitStack() as stack:
        for device, before in zip(gpus[::-1], outside[::-1], strict=True):
            training_stream(device).wait_stream(before)
            stack.enter_context(torch.cuda.stream(training_stream(device)))
        try:
            yield
        finally:  # also who catches an error finds the block's work done
            for device, after in zip(gpus, outside, strict=True):
                after.wait_stream(training_stream(device))


class RecordedCalls:
    """Calls a function as it is the first time that inputs of a shape come, and replays it later.

    All calls work in one pool of memory, which is as large as one of them needs: they follow each
    other on one stream, whether they are replayed or not.

    Args:
        function: keyword inputs -> (names, tensors...), on the device. Nothing in it waits for the
            device, and nothing that it leaves behind is new, apart from what it returns. What it
            leaves behind when it is called as it is (a cache for a new shape) costs the recordings
            made before, in whose memory it may lie.
        device: a GPU.
        abandon: called when the memory was full in the middle of a call, before it is done again
            outside the pool. What is to stay is better moved, for it keeps parts of the pool.
        warm_up: calls before the first recording.
    """

    def __init__(
        self,
        function: Callable[..., tuple],
        device: torch.device,
        abandon: Callable[[], None],
        warm_up: int = 0,
    ) -> None:
        self._function, self._device, self._abandon = function, device, abandon
        self._calls_to_warm_up = warm_up
        self._inputs = StaticInputs(device)
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, _Recorded] = {}
        with torch.cuda.device(device):
            self._pool: torch.cuda.MemPool | None = torch.cuda.MemPool()
        self._recording = True
        self._replays, self._seconds = 0, 0.0

    def __call__(self, inputs: Mapping[str, Any]) -> tuple:
        """What the function returns, until the next call. Raises UserError if it cannot be
        recorded."""
        try:
            return self._run(inputs)
        except torch.cuda.OutOfMemoryError:
            # Without the pool there is no memory to win; other ranks would wait for this step.
            if self._pool is None or dist.is_initialized():
                raise
        # Not in the handler: its traceback holds all that the call had on the device.
        self._give_up()
        return self._function(**inputs)

    def _run(self, inputs: Mapping[str, Any]) -> tuple:
        key = self._inputs.key(inputs)
        recorded = self._graphs.get(key)
        self._calls_to_warm_up -= 1
        if recorded is None and not self._may_record(key):
            return self._as_it_is(inputs)
        static = self._inputs.fill(inputs)
        if recorded is None:
            recorded = self._record(key, static)
        recorded.graph.replay()
        self._replays += 1
        return recorded.outputs

    def _as_it_is(self, inputs: Mapping[str, Any]) -> tuple:
        if self._pool is None:
            return self._function(**inputs)
        # Within a call that works in a pool, torch does not give back what it keeps outside of it.
        free, total = torch.cuda.mem_get_info(self._device)
        if free < total / 4:
            torch.cuda.empty_cache()
        before = self._blocks_in_use()
        # The pool is this thread's: another one's backward pass would have memory of its own.
        with (
            torch.cuda.use_mem_pool(self._pool, self._device),
            torch.autograd.set_multithreading_enabled(False),
        ):
            outputs = self._function(**inputs)
        outputs = tuple(x.clone() if torch.is_tensor(x) else x for x in outputs)
        if self._blocks_in_use() - before:
            self._graphs.clear()
        return outputs

    def _blocks_in_use(self) -> set[tuple[int, int]]:
        """Addresses and sizes of what lives in the pool; none if no recording can overwrite it."""
        if not self._graphs:
            return set()
        blocks = [block for segment in self._pool.snapshot() for block in segment["blocks"]]
        return {(b["address"], b["size"]) for b in blocks if b["state"] == "active_allocated"}

    def _may_record(self, key: Hashable) -> bool:
        known = key in self._seen
        self._seen.add(key)
        if not (known and self._recording and self._calls_to_warm_up < 0):
            return False
        if len(self._graphs) >= MOST_GRAPHS:
            self._graphs = {k: g for k, g in self._graphs.items() if not self._inputs.outdated(k)}
        return len(self._graphs) < MOST_GRAPHS

    def _record(self, key: Hashable, inputs: dict[str, Any]) -> _Recorded:
        begin = time.perf_counter()
        graph, stream = torch.cuda.CUDAGraph(), training_stream(self._device)
        try:
            # Threads that pin batches or write checkpoints may go on as they like.
            with torch.cuda.graph(graph, self._pool.id, stream, capture_error_mode="thread_local"):
                recorded = _Recorded(graph, self._function(**inputs))
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            end_broken_recording(self._pool.id, self._device)
            _keep_for_ever(self._pool)
            cause = error.__context__ or error
            if str(cause).startswith("DataLoader worker"):  # torch says so wherever the program is
                raise cause from None
            if isinstance(cause, torch.cuda.OutOfMemoryError):
                raise UserError(
                    "the GPU's memory is full while a step is recorded as a CUDA graph: train with "
                    "--set MODEL.CUDA_GRAPHS False or with smaller batches"
                ) from error
            raise UserError(
                f"a training step could not be recorded as a CUDA graph ({cause}): if something of "
                "yours in the model waits for the GPU, train with --set MODEL.CUDA_GRAPHS False"
            ) from error
        self._graphs[key] = recorded
        self._seconds += time.perf_counter() - begin
        return recorded

    def forget(self) -> None:
        """Drop the recordings: those of exchanges between processes keep the processes from
        parting."""
        with contextlib.suppress(RuntimeError):  # of a GPU that failed, as has been said already
            torch.cuda.synchronize(self._device)
        self._graphs.clear()
        self._recording, self._pool = False, None

    def __str__(self) -> str:
        return (
            f"{self._replays} of the steps on {self._device} replayed one of {len(self._graphs)} "
            f"recorded CUDA graphs; recording took {self._seconds:.1f} s"
        )

    def _give_up(self) -> None:
        """Leave the memory of the recordings to the calls themselves from here on."""
        logger.warning(
            "the memory of %s is full: going on without CUDA graphs (MODEL.CUDA_GRAPHS)",
            self._device,
        )
        self._recording = False
        self._graphs.clear()
        self._pool = None  # after the recordings; what is free of it can be used again
        torch.cuda.empty_cache()
        self._abandon()
        torch.cuda.empty_cache()


class StepGraphs:
    """Recorded steps of one GPU, with forward, backward and update.

    Args:
        step: keyword inputs -> what the step reports.
        warm_up: steps before the first recording.
    """

    def __init__(
        self,
        step: Callable[..., StepValues],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        warm_up: int = 0,
    ) -> None:
        self._optimizer = optimizer
        self._calls = RecordedCalls(step, device, self._abandon, warm_up)
        self._rates = DeviceRates(optimizer, device)
        for group in optimizer.param_groups:
            if "capturable" in group:  # Adam counts its steps on the device then
                group["capturable"] = True

    def __call__(self, inputs: list[tuple]) -> StepValues:
        """A step with the inputs that DataParallel.scatter gives for one device."""
        ((_, kwargs),) = inputs
        with self._rates:
            names, own, means = self._calls(recordable(kwargs))
        return names, own.clone(), means.clone()

    def forget(self) -> None:
        """Drop the recordings."""
        self._calls.forget()

    def _abandon(self) -> None:
        self._optimizer.zero_grad()
        for state in self._optimizer.state.values():
            for name, value in state.items():
                if torch.is_tensor(value):
                    state[name] = value.clone()

    def __str__(self) -> str:
        return str(self._calls)


def _keep_for_ever(pool: torch.cuda.MemPool) -> None:
    """A recording that broke off leaves its pool in use; older versions of torch end the process
    when such a pool goes, were it at the end of the program."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))


def recordable(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without what differs in every batch and the model does not look at."""
    return {name: value for name, value in inputs.items() if name != "image_ids"}


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    outputs: tuple  # their tensors are overwritten by each replay, of other graphs too


class DeviceRates:
    """In this context the optimizer's rates are tensors on the device, so that a recorded step
    follows them; outside they are numbers, as they were."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._optimizer = optimizer
        groups = optimizer.param_groups
        self._tensors = [torch.zeros((), device=device) for _ in groups]
        self._numbers: list[float] = [0.0] * len(groups)

    def __enter__(self) -> None:
        for i, (group, tensor) in enumerate(
            zip(self._optimizer.param_groups, self._tensors, strict=True)
        ):
            if group["lr"] != self._numbers[i]:
                self._numbers[i] = group["lr"]
                tensor.fill_(group["lr"])
            group["lr"] = tensor

    def __exit__(self, *_: Any) -> None:
        for group, number in zip(self._optimizer.param_groups, self._numbers, strict=True):
            group["lr"] = number


class StaticInputs:
    """Batches where a recorded step finds them: always at the same place.

    The inputs named in GROWING_INPUTS get places for more than a batch has, so that batches come
    in few shapes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._longest: dict[str, tuple[int, ...]] = {}
        self._buffers: dict[tuple, Tensor] = {}

    def key(self, inputs: Mapping[str, Any]) -> Hashable:
        """What is equal for batches that one recorded step fits."""
        return tuple(
            (name, self._shape(name, value), value.dtype) if torch.is_tensor(value) else value
            for name, value in inputs.items()
        )

    def outdated(self, key: Hashable) -> bool:
        """Whether a place has grown since, so that no batch has this key any more."""
        return any(
            isinstance(entry, tuple)
            and entry[0] in GROWING_INPUTS
            and entry[1][0] > 0
            and entry[1] != self._longest[entry[0]]
            for entry in key
        )

    def fill(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The batch at its place; `key` has been asked before."""
        return {
            name: self._filled(name, value) if torch.is_tensor(value) else value
            for name, value in inputs.items()
        }

    def _shape(self, name: str, value: Tensor) -> tuple[int, ...]:
        shape = tuple(value.shape)
        if name not in GROWING_INPUTS or shape[0] == 0:
            return shape
        rounded = tuple(1 << (size - 1).bit_length() for size in shape)
        before = self._longest.get(name, rounded)
        self._longest[name] = tuple(max(pair) for pair in zip(rounded, before, strict=True))
        return self._longest[name]

    def _filled(self, name: str, value: Tensor) -> Tensor:
        shape = self._shape(name, value)
        place = (name, shape, value.dtype)
        if place not in self._buffers:
            self._buffers[place] = torch.zeros(shape, dtype=value.dtype, device=self._device)
        buffer = self._buffers[place]
        if buffer.dim() > 2 and shape != value.shape:
            buffer.zero_()  # planes have no end mark but zeros
        buffer[tuple(slice(size) for size in value.shape)].copy_(value)
        return buffer
