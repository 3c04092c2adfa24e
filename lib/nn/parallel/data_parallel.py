"""DataParallel of this family: separately padded mini-batches, CPU inputs, dict outputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import parallel_apply, replicate

from nn.parallel.scatter import gather, move_to, split_batch


class DataParallel(nn.Module):
    """Runs a module on one device (GPU or CPU) or its replicas on several GPUs, in threads.

    `state_dict` and `load_state_dict` use the names of the module itself; it is at `.module`.

    Args:
        module: is on the first device already.
        device_ids: CUDA devices. None: where the module is; if that is a GPU, all visible ones.
        cpu_keywords: keyword inputs that are handed on without being moved.
        minibatch: every input is a list with one entry per device, each with its own padding;
            otherwise tensors are cut along dimension 0.
        batch_outputs: gather the replicas' outputs (tensors along dimension 0, scalars as
            `(num_gpus,)`); False: a list with one output per device. With one device the output
            is handed on as it is, or in a list of one.
    Raises:
        ValueError: the module is not on the first device.
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: Sequence[int | torch.device] | None = None,
        cpu_keywords: Iterable[str] = (),
        minibatch: bool = False,
        batch_outputs: bool = True,
    ) -> None:
        super().__init__()
        self.module = module
        self.cpu_keywords = frozenset(cpu_keywords)
        self.minibatch = minibatch
        self.batch_outputs = batch_outputs
        self.devices = _devices(module, device_ids)
        self.device_ids = [d.index for d in self.devices if d.type == "cuda"]
        tensors = itertools.chain(module.named_parameters(), module.named_buffers())
        for name, tensor in tensors:
            if tensor.device != self.devices[0]:
                raise ValueError(
                    f"{name} is on {tensor.device}: move the module to {self.devices[0]} before "
                    "wrapping it in DataParallel"
                )

    def scatter(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple]:
        """The inputs of each device, moved there (asynchronously from pinned memory).

        Returns:
            one `(args, kwargs)` per device that has an input.
        Raises:
            ValueError: with `minibatch`, an input is not a list with an entry per device.
        """
        count = len(self.devices)
        parts = split_batch((args, dict(kwargs)), count, self.minibatch)
        return [
            (
                move_to(part_args, device),
                {
                    k: v if k in self.cpu_keywords else move_to(v, device)
                    for k, v in part_kwargs.items()
                },
            )
            for (part_args, part_kwargs), device in zip(parts, self.devices, strict=False)
        ]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_scattered(self.scatter(args, kwargs))

    def forward_scattered(self, inputs: list[tuple]) -> Any:
        """As calling it, for inputs that `scatter` has moved before (to overlap copy and work)."""
        if len(inputs) == 1:
            output = self.module(*inputs[0][0], **inputs[0][1])
            return output if self.batch_outputs else [output]
        devices = self.devices[: len(inputs)]
        replicas = replicate(self.module, devices, detach=not torch.is_grad_enabled())
        # An exception in a thread is raised here with "in replica N on device M" in its message.
        outputs = parallel_apply(replicas, *zip(*inputs, strict=True), devices)
        return gather(outputs, self.devices[0]) if self.batch_outputs else outputs

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.load_state_dict(*args, **kwargs)


def _devices(
    module: nn.Module, device_ids: Sequence[int | torch.device] | None
) -> list[torch.device]:
    if device_ids:
        return [torch.device("cuda", d) if isinstance(d, int) else d for d in device_ids]
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    device = tensor.device if tensor is not None else torch.device("cpu")
    if device.type != "cuda":
        return [device]
    others = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [device] + [d for d in others if d != device]
