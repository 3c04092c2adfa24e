"""The endless stream of a training's batches, each on its devices before it is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from core.errors import UserError
from nn.parallel import DataParallel
from nn.parallel.scatter import tensors_in
from utils.streams import stream_for


def batches_on_devices(
    loader: Iterable[Mapping[str, Any]], model: DataParallel
) -> Iterator[tuple[list[tuple], Mapping[str, Any]]]:
    """Each batch's inputs, scattered to the devices, and the batch as the loader gave it.

    A batch is fetched when the kernels of the step before are queued: its copy, on a stream of
    its own, runs beside them.
    """
    streams = [stream_for("loading", d) for d in model.devices if d.type == "cuda"]
    for batch in _endless(loader):
        with contextlib.ExitStack() as stack:
            for stream in streams:
                stack.enter_context(torch.cuda.stream(stream))
            inputs = model.scatter((), batch)
        for stream, (_, kwargs) in zip(streams, inputs, strict=False):
            current = torch.cuda.current_stream(stream.device)
            current.wait_stream(stream)
            for tensor in tensors_in(kwargs):
                if tensor.is_cuda:
                    tensor.record_stream(current)
        yield inputs, batch


def _endless(loader: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    while True:
        batches = iter(loader)
        # torch's DataLoader draws a number when an epoch begins. The model's draws must not depend
        # on where epochs begin, or a resumed training would differ from an uninterrupted one.
        with torch.random.fork_rng(devices=[]):
            first = next(batches, None)
        if first is None:
            raise UserError(
                "the training set has fewer images than a batch: lower --bs or "
                "TRAIN.IMS_PER_BATCH, or use more images"
            )
        yield first
        yield from batches
