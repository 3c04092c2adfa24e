"""Which device a script runs on, and how many CPUs there are."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from core.errors import UserError


def pick_devices(device: str | None = None, no_cuda: bool = False) -> list[torch.device]:
    """Devices that the flags `--device` and `--no_cuda` ask for, the first of them first.

    Args:
        device: `cuda` (all visible GPUs), `cuda:1` (that one), `cpu`; None: `cuda` if there is one.
    Raises:
        UserError: there is no such device.
    """
    count = 0 if no_cuda else torch.cuda.device_count()
    name = device or ("cuda" if count else "cpu")
    try:
        wanted = torch.device(name)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cuda", "cpu"):
        raise UserError(f"--device {name} is not cuda, cuda:N or cpu")
    if wanted.type == "cpu":
        return [wanted]
    if no_cuda:
        raise UserError(f"--device {name} contradicts --no_cuda: leave one of them out")
    if (wanted.index or 0) >= count:
        raise UserError(f"--device {name}: torch sees {count} GPU(s) here; use --device cpu")
    if wanted.index is not None:
        return [wanted]
    return [torch.device("cuda", index) for index in range(count)]


def available_cpus() -> int:
    """CPUs that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def upload(
    values: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Numbers of the host as a tensor on the device, in one copy that nothing waits for."""
    pinned = torch.device(device).type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)
