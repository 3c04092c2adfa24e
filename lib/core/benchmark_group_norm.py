"""Group normalisation with its ReLU, beside torch's as autocast runs it, for `benchmark.py ops`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from core.benchmark import Row, measure

EPSILON, SETS = 1e-5, 2


def group_norm_rows(
    device: torch.device, shapes: Sequence[tuple[int, int, int, int]], dtype: torch.dtype
) -> Iterator[Row]:
    """Forward, and forward with backward, on channels_last maps of each shape (N, C, H, W)."""
    name = str(dtype).removeprefix("torch.")

    def groups(x: Tensor) -> int:
        return min(32, x.shape[1])

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            y = F.group_norm(x, groups(x), weight, bias, EPSILON).relu()
        return y.to(dtype)  # as the next convolution does

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.group_norm(x, groups(x), weight, bias, EPSILON, relu=True)

    for shape in shapes:
        maps, grads = (
            [
                torch.randn(shape, dtype=dtype, device=device).to(memory_format=torch.channels_last)
                for _ in range(SETS)
            ]
            for _ in range(2)
        )
        weight, bias = (torch.rand(shape[1], device=device) for _ in range(2))
        inputs = [(x.requires_grad_(), weight, bias) for x in maps]
        for parameter in (weight, bias):
            parameter.requires_grad_()

        def call(norm: Callable, backward: bool, inputs=inputs, grads=grads) -> Callable:
            def run(i: int) -> object:
                if backward:
                    y = norm(*inputs[i % SETS])
                    return torch.autograd.grad(y, inputs[i % SETS], grads[i % SETS])
                with torch.no_grad():
                    return norm(*inputs[i % SETS])

            return run

        # Forward reads x and writes y; backward reads x and y's gradient and writes x's.
        for kind, backward, moved in (("forward", False, 2), ("fwd+bwd", True, 5)):
            yield Row(
                f"group_norm {kind}",
                f"{tuple(shape)}, {name} channels_last, ReLU",
                measure(call(ours, backward), device),
                {"torch autocast": measure(call(theirs, backward), device)},
                floor_bytes=moved * maps[0].nbytes,
            )
