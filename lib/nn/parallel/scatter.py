"""Inputs to devices and outputs back, through nested lists, tuples and dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def move_to(value: Any, device: torch.device) -> Any:
    """Every tensor inside `value` on `device`; asynchronous from pinned memory."""
    if torch.is_tensor(value):
        return value.to(device, non_blocking=True)
    return map_nested(lambda v: move_to(v, device), value)


def split_batch(value: tuple[Any, dict[str, Any]], count: int, minibatch: bool) -> list[tuple]:
    """`(args, kwargs)` cut into at most `count` of the same form.

    Args:
        minibatch: every input is a list, and its i-th entry goes to the i-th part; otherwise
            tensors are cut along dimension 0 and everything else is repeated.
    Raises:
        ValueError: with `minibatch`, an input is not a list of `count` entries.
    """
    args, kwargs = value
    if minibatch:
        named = [*((f"input {i}", v) for i, v in enumerate(args)), *kwargs.items()]
        for name, entry in named:
            if not isinstance(entry, (list, tuple)) or len(entry) != count:
                found = f"{len(entry)}" if isinstance(entry, (list, tuple)) else "no list"
                raise ValueError(
                    f"{name} must be a list with one entry for each of {count} device(s), "
                    f"but has {found}"
                )
        return [
            (tuple(v[i] for v in args), {k: v[i] for k, v in kwargs.items()}) for i in range(count)
        ]
    if count == 1:
        return [(args, kwargs)]
    sizes = [len(t) for t in tensors_in((args, kwargs)) if t.dim()]
    parts = min(count, max(sizes, default=1))
    return [_part((args, kwargs), i, parts) for i in range(parts)]


def gather(outputs: Sequence[Any], device: torch.device) -> Any:
    """The replicas' outputs as one on `device`.

    Tensors are concatenated along dimension 0, scalars stacked to `(len(outputs),)`; dicts, lists
    and tuples are gathered entry by entry; anything else becomes a list.
    """
    first = outputs[0]
    if torch.is_tensor(first):
        tensors = [t.to(device, non_blocking=True) for t in outputs]
        return torch.cat(tensors) if first.dim() else torch.stack(tensors)
    if isinstance(first, Mapping):
        return {k: gather([o[k] for o in outputs], device) for k in first}
    if isinstance(first, (list, tuple)):
        return type(first)(gather(entries, device) for entries in zip(*outputs, strict=True))
    return list(outputs)


def _part(value: Any, index: int, parts: int) -> Any:
    if torch.is_tensor(value):
        return value.tensor_split(parts)[index] if value.dim() else value
    return map_nested(lambda v: _part(v, index, parts), value)


def map_nested(function: Any, value: Any) -> Any:
    """`value` with `function` applied to the entries of a dict, list or tuple; others stay."""
    if isinstance(value, Mapping):
        return {k: function(v) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(function(v) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(function(v) for v in value)
    return value


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors inside nested lists, tuples and dicts."""
    if torch.is_tensor(value):
        return [value]
    entries = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, (Mapping, list, tuple)):
        return [tensor for entry in entries for tensor in tensors_in(entry)]
    return []
