"""Functions of tensors as CUDA graphs: hundreds of kernels started by one call of the host."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.streams import next_stream_for

logger = logging.getLogger(__name__)

_one_at_a_time = threading.Lock()  # a process can record one graph

PoolId = tuple[int, int]
Outputs = tuple[Tensor | None, ...]
Function = Callable[..., Outputs]


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Tensor | None]
    weights_at: list[int]  # addresses


class CudaGraphs:
    """Recordings of functions that depend on nothing but their tensors, a key, and weights.

    The first call of a key with inputs of certain shapes runs as it stands, so that libraries
    choose their kernels; the second records; later ones replay. A function that cannot be recorded
    goes on running as it stands, and a line in the log says why: where memory was full, with inputs
    of these shapes, else with all of its key.

    Recordings share one memory pool, one set of input and one of output buffers: what they all
    take is about what the largest takes. Replays therefore follow one another, whatever threads
    and streams they are asked for in; outputs are copies that belong to the caller.

    Weights may change in place between calls. Those that have moved are recorded anew.

    Args:
        weights: all that functions read besides their inputs; others put in their place later are
            not noticed.
        most: recordings that are kept; the one that has not been used for longest goes.
    """

    def __init__(self, weights: Iterable[Tensor], most: int = 64) -> None:
        self._weights, self._most = list(weights), most
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._seen: dict[Hashable, list[Tensor | None]] = {}  # outputs without values
        self._refused: set[Hashable] = set()
        self._buffers: dict[Hashable, Tensor] = {}
        self._lock = threading.Lock()
        self._pool = self._stream = self._done = None

    def __call__(self, function: Function, inputs: Sequence[Tensor], key: Hashable = ()) -> Outputs:
        """function(*inputs), a tuple of tensors (or None).

        Args:
            inputs: tensors on one CUDA device; `function` finds them contiguous.
            key: equal for equal functions: all besides inputs and weights that they depend on.
                Autocast and TF32 are counted in.
        """
        full_key = (key, _modes(), *((x.shape, x.dtype) for x in inputs))
        with self._lock:
            refused = full_key in self._refused or full_key[:2] in self._refused
            if full_key in self._seen and not refused:
                recording = self._recording(full_key, function, inputs)
                if recording is not None:
                    return self._replay(recording, inputs)
        try:
            outputs = self._as_it_stands(function, inputs)
        except torch.cuda.OutOfMemoryError:
            if not self._recordings:
                raise
            outputs = None
        if outputs is None:  # not in the handler: its traceback holds what the call had
            logger.warning("the GPU's memory is full: its CUDA graphs make room")
            with self._lock:
                self._recordings.clear()
            torch.cuda.empty_cache()
            outputs = self._as_it_stands(function, inputs)
        self._seen[full_key] = [
            y if y is None else torch.empty_like(y, device="meta") for y in outputs
        ]
        return outputs

    @staticmethod
    def _as_it_stands(function: Function, inputs: Sequence[Tensor]) -> Outputs:
        # Autocast as when it is recorded, for whoever compiles for that.
        with _autocast_without_cache():
            return function(*inputs)

    def __len__(self) -> int:
        return len(self._recordings)

    def _recording(
        self, key: Hashable, function: Function, inputs: Sequence[Tensor]
    ) -> _Recording | None:
        found = self._recordings.pop(key, None)
        if found is None or found.weights_at != [w.data_ptr() for w in self._weights]:
            found = None  # its memory is free for the new one
            while len(self._recordings) >= self._most:
                forgotten, _ = self._recordings.popitem(last=False)
                self._seen.pop(forgotten, None)
            if not self._recordings:
                self._pool = None  # it went with the last of them
            try:
                with _one_at_a_time:
                    found = self._record(function, inputs, self._seen[key])
            except RuntimeError as error:
                # Ending the recording fails too, and hides what went wrong in it.
                cause = error.__context__ or error
                full = isinstance(cause, torch.cuda.OutOfMemoryError)
                what = "inputs of this size" if full else "these calls"
                reason = str(cause).splitlines()[0]
                logger.warning("no CUDA graph for %s, slower: %s", what, reason)
                # Trying all sizes would leave a pool in use each time, with its memory.
                self._refused.add(key if full else key[:2])
                end_broken_recording(self._pool, inputs[0].device)
                self._pool = None
                return None
        self._recordings[key] = found
        return found

    def _record(
        self, function: Function, inputs: Sequence[Tensor], results: Sequence[Tensor | None]
    ) -> _Recording:
        device = inputs[0].device
        with torch.cuda.device(device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
                # cuBLAS has its workspace by stream: graphs that run at the same time need two.
                self._stream = next_stream_for("recording")
            static = [self._buffer(("in", i), x, device) for i, x in enumerate(inputs)]
            outputs = [
                None if y is None else self._buffer(("out", i), y, device)
                for i, y in enumerate(results)
            ]
            graph = torch.cuda.CUDAGraph()
            # Casts of weights that autocast keeps from call to call would be missing here. Other
            # threads may go on allocating and copying meanwhile. A recording that breaks off would
            # leave its stream the current one.
            with (
                _autocast_without_cache(),
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(
                    graph, self._pool, self._stream, capture_error_mode="thread_local"
                ),
            ):
                for buffer, y in zip(outputs, function(*static), strict=True):
                    if buffer is not None:
                        buffer.copy_(y)
        return _Recording(graph, static, outputs, [w.data_ptr() for w in self._weights])

    def _buffer(self, place: tuple[str, int], like: Tensor, device: torch.device) -> Tensor:
        """Contiguous memory for a tensor like this one, shared by all recordings (older ones may
        hold a smaller one of their own)."""
        key = place, like.dtype
        if key not in self._buffers or len(self._buffers[key]) < like.numel():
            size = 1 << (like.numel() - 1).bit_length()  # so that there are few of them
            with torch.inference_mode(False):  # whatever the mode that it is first needed in
                self._buffers[key] = torch.empty(size, dtype=like.dtype, device=device)
        return self._buffers[key][: like.numel()].view(like.shape)

    def _replay(self, recording: _Recording, inputs: Sequence[Tensor]) -> Outputs:
        device = inputs[0].device
        stream = torch.cuda.current_stream(device)
        if self._done is not None:
            stream.wait_event(self._done)  # the buffers are in use until then
        for buffer, x in zip(recording.inputs, inputs, strict=True):
            buffer.copy_(x)
        recording.graph.replay()
        try:
            return tuple(None if y is None else y.clone() for y in recording.outputs)
        finally:
            self._done = stream.record_event()


def end_broken_recording(pool: PoolId, device: torch.device) -> None:
    """Tell torch's allocator that nothing is recorded in the pool any more.

    torch before 2.12 forgets to when a recording fails (pytorch/pytorch#180395), gives no memory
    back after that, and ends the process as soon as a torch.cuda.MemPool goes.
    """
    with contextlib.suppress(RuntimeError):  # newer versions have done it
        torch._C._cuda_endAllocateToPool(device.index, pool)


def _autocast_without_cache() -> torch.autocast:
    return torch.autocast(
        "cuda",
        torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        cache_enabled=False,
    )


def _modes() -> tuple:
    """What changes the kernels that a function runs."""
    autocast = torch.is_autocast_enabled("cuda")
    return (
        autocast and torch.get_autocast_dtype("cuda"),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.is_inference_mode_enabled(),
    )
