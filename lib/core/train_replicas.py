"""One process that trains on several GPUs from recorded passes.

`nn.DataParallel` copies the model to the other GPUs in every step and runs the copies in threads,
which take turns at Python's lock. Here the copies stay, a pass on each GPU is replayed, and two
long vectors travel: gradients to the first GPU, weights back.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core.train_graphs import Names, RecordedCalls, StepValues, recordable
from nn.parallel import DataParallel

# (forward, share) -> names and values of a pass whose gradients are divided by `share`.
Pass = Callable[[Callable[[], Mapping[str, Any]], int], tuple[Names, Tensor]]


class Replicas:
    """The model on each of the devices; the optimizer's weights are the first one's.

    Args:
        model: on several GPUs.
        one_pass: forward and backward.
        update: names and values of losses and metrics -> their means, after the optimizer's step.
    """

    def __init__(
        self,
        model: DataParallel,
        one_pass: Pass,
        update: Callable[[Names, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._update = update
        first = [p for group in optimizer.param_groups for p in group["params"]]
        of_name = {id(p): name for name, p in model.module.named_parameters()}
        names = [of_name[id(p)] for p in first]
        modules = [model.module]
        modules += [copy.deepcopy(model.module).to(device).train() for device in model.devices[1:]]
        self._replicas = [
            _Replica(module, device, names, functools.partial(one_pass, share=len(modules)))
            for module, device in zip(modules, model.devices, strict=True)
        ]

    def __call__(self, inputs: list[tuple]) -> StepValues:
        """A step with the inputs that DataParallel.scatter gives for the devices."""
        main, *others = self._replicas
        parts = [
            replica.run(kwargs) for replica, (_, kwargs) in zip(self._replicas, inputs, strict=True)
        ]
        names = parts[0][0]
        values = torch.stack([own.to(main.device, non_blocking=True) for _, own in parts])
        for replica in others:
            main.vector += replica.vector.to(main.device, non_blocking=True)
        main.take_gradients()
        values = self._update(names, values.mean(dim=0))
        main.note_weights()
        for replica in others:
            replica.vector.copy_(main.vector, non_blocking=True)
            replica.take_weights()
        return names, values, values

    def forget(self) -> None:
        """Drop the recordings."""
        for replica in self._replicas:
            replica.forget()

    def __str__(self) -> str:
        return "; ".join(str(replica) for replica in self._replicas)


class _Replica:
    """A copy of the model, with a vector that holds its gradients or its weights."""

    def __init__(
        self, module: nn.Module, device: torch.device, names: list[str], one_pass: Pass
    ) -> None:
        self.device = device
        self._module, self._one_pass = module, one_pass
        parameters = dict(module.named_parameters())
        self._weights = [parameters[name] for name in names]
        sizes = [weight.numel() for weight in self._weights]
        self.vector = torch.zeros(sum(sizes), device=device)
        # In the weights' own memory format, as the optimizer wants the gradients.
        self._views = [
            part.as_strided(weight.shape, weight.stride())
            for part, weight in zip(self.vector.split(sizes), self._weights, strict=True)
        ]
        self._calls = RecordedCalls(self._pass, device, self._drop_gradients)

    def run(self, inputs: Mapping[str, Any]) -> tuple[Names, Tensor]:
        """A pass; the gradients are in `vector` then."""
        with torch.cuda.device(self.device):
            return self._calls(recordable(inputs))

    def _pass(self, **inputs: Any) -> tuple[Names, Tensor]:
        names, values = self._one_pass(lambda: self._module(**inputs))
        for weight in self._weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        torch._foreach_copy_(self._views, [weight.grad for weight in self._weights])
        self._drop_gradients()
        return names, values

    def _drop_gradients(self) -> None:
        for weight in self._weights:
            weight.grad = None

    def take_gradients(self) -> None:
        """Give the weights the gradients that are in `vector`."""
        for weight, view in zip(self._weights, self._views, strict=True):
            weight.grad = view

    @torch.no_grad()
    def note_weights(self) -> None:
        """Put the weights into `vector`."""
        torch._foreach_copy_(self._views, self._weights)

    @torch.no_grad()
    def take_weights(self) -> None:
        """Set the weights to what is in `vector`."""
        with torch.cuda.device(self.device):
            torch._foreach_copy_(self._weights, self._views)

    def forget(self) -> None:
        """Drop the recordings."""
        self._calls.forget()

    def __str__(self) -> str:
        return str(self._calls)
