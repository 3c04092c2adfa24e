"""Failures of a training that a user can mend, in a sentence each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from core.errors import UserError


def explained(
    error: BaseException,
    loader: Iterable[Any],
    batch_size: int,
    blob_sizes: Sequence[tuple[int, int]],
) -> UserError | None:
    """What a full GPU or a dead loader process means and what to do; None for anything else.

    Args:
        loader: if it can explain errors of its processes (roi_data.loader_workers), it is asked:
            torch raises them wherever the program is.
        batch_size: images of a pass over all GPUs.
        blob_sizes: height and width of the padded images on each of this process's devices.
    """
    if isinstance(error, torch.OutOfMemoryError):
        sizes = " and ".join(f"{width}x{height}" for height, width in blob_sizes) or "unknown size"
        return UserError(
            f"the GPU's memory is full with {batch_size} images a pass over all GPUs, padded to "
            f"{sizes}: lower --bs (--iter_size makes up for it), TRAIN.SCALES and TRAIN.MAX_SIZE "
            "or TRAIN.BATCH_SIZE_PER_IM, or train with --amp bf16"
        )
    explain = getattr(loader, "explained", None)
    if isinstance(error, RuntimeError) and explain is not None:
        told = explain(error)
        return told if isinstance(told, UserError) else None
    return None
