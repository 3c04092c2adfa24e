"""Writing weights for others: Detectron's `.pkl`, safetensors, and plain state dicts."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from core.config_yaml import ATTR_DICTS
from core.errors import UserError
from utils.run_dir import plain
from utils.weights import SAFETENSORS, atomic_write, save_torch_file

FORMATS = (".pkl", SAFETENSORS, ".pth")

_RECONSTRUCT = np.zeros(0).__reduce__()[0]


def detectron_blobs(model: nn.Module) -> dict[str, np.ndarray]:
    """The model's parameters as float32 arrays by Detectron's blob names.

    Constants (the bilinear upsampling) and copies of shared layers have no blob.
    """
    mapping, _ = model.detectron_weight_mapping
    state = model.state_dict()
    return {
        blob: np.ascontiguousarray(state[name].detach().cpu().float().numpy())
        for name, blob in mapping.items()
        if blob is not None
    }


def export_weights(model: nn.Module, path: str | Path, config: Mapping[str, Any]) -> None:
    """Write a model's weights in the format that the file's name asks for.

    Args:
        path: `.pkl`: a Detectron model (blobs, and the config as its YAML); `.safetensors` or
            `.pth`: the state dict alone, which --load_ckpt takes.
        config: the config of the model.
    Raises:
        UserError: the name has another ending.
    """
    path = Path(path)
    if path.suffix == ".pkl":
        content = {"blobs": detectron_blobs(model), "cfg": _detectron_yaml(config)}
        with atomic_write(path) as file:
            _DetectronPickler(file, protocol=2).dump(content)
    elif path.suffix == SAFETENSORS:
        with atomic_write(path) as file:
            file.write(safetensors.torch.save(_state(model), metadata={"format": "pt"}))
    elif path.suffix == ".pth":
        save_torch_file(_state(model), path)
    else:
        raise UserError(f"{path} must end in one of {', '.join(FORMATS)}, which says the format")


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict in plain memory; safetensors refuses what two heads share."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }


class _DetectronPickler(pickle._Pickler):
    """Pickles arrays as python 2 with numpy 1 did, which is what Detectron reads.

    Bytes are python 2's strings (read with encoding latin1), and numpy's function has the name by
    which every numpy knows it.
    """

    dispatch = dict(pickle._Pickler.dispatch)

    def __init__(self, file: BinaryIO, protocol: int) -> None:
        super().__init__(file, protocol=protocol, fix_imports=True)

    def save_bytes(self, obj: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(obj)) + obj)
        self.memoize(obj)

    dispatch[bytes] = save_bytes

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj is _RECONSTRUCT:
            self.write(pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n")
            self.memoize(obj)
        else:
            super().save_global(obj, name)


class _AttrDictDumper(yaml.SafeDumper):
    """Dicts become Detectron's, which its reader asks for attributes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def attr_dict(self, value: dict) -> yaml.Node:
        return self.represent_mapping(
            f"tag:yaml.org,2002:python/object/new:{ATTR_DICTS[0]}",
            {"dictitems": _Items(value), "state": _Items({"__immutable__": True})},
        )


class _Items(dict):
    """A dict that stays one in YAML."""


_AttrDictDumper.add_representer(dict, _AttrDictDumper.attr_dict)
_AttrDictDumper.add_representer(_Items, _AttrDictDumper.represent_dict)


def _detectron_yaml(config: Mapping[str, Any]) -> str:
    return yaml.dump(plain(config), Dumper=_AttrDictDumper, sort_keys=False)
