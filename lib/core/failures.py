"""Failures of a training that a user can mend, in a sentence each."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from core.errors import UserError


def explained(
    error: BaseException, batch_size: int, blob_sizes: Sequence[tuple[int, int]]
) -> UserError | None:
    """What a full GPU or a dead loader process means and what to do; None for anything else.

    Args:
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
    # The cause knows the signal that ended the process.
    for message in (str(error.__cause__), str(error)):
        found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", message)
        if isinstance(error, RuntimeError) and found:
            return UserError(
                f"loader process {found[1]} died ({found[2].strip(' .')}): if the machine's memory "
                "or its shared memory (/dev/shm) was full, lower --nw (DATA_LOADER.NUM_THREADS) or "
                "--bs"
            )
    return None
