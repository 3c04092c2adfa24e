"""Weight files: writing them whole or not at all, reading them without running their code."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
import yaml

from core.config_yaml import load_yaml
from core.errors import UserError

SAFETENSORS = ".safetensors"

# Everything that a pickled dict of numpy arrays names, in both of python's pickle eras and before
# and after numpy moved its core. Nothing here runs code chosen by the file.
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_BUILTINS = ("builtins", "__builtin__")
_NUMPY_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
NUMPY_FROM_BUFFER = np.zeros(1).__reduce_ex__(5)[0]  # makes an array of a pickle's bytes


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Stands for `_codecs.encode`, by which python 3 writes bytes in old protocols."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding} is not expected in a weight file")
    return text.encode("latin1")


def _number(kind: np.dtype, content: bytes | str) -> np.generic:
    """Stands for numpy's `scalar`, without the types whose content is a pickle again."""
    if kind.hasobject:
        raise pickle.UnpicklingError("it holds an object as a number")
    return _NUMPY_SCALAR(kind, content)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): dict,
    ("_codecs", "encode"): _encode_latin1,
    **{(module, "_reconstruct"): _NUMPY_RECONSTRUCT for module in _MULTIARRAY},
    **{(module, "scalar"): _number for module in _MULTIARRAY},
    **{(f"numpy.{core}.numeric", "_frombuffer"): NUMPY_FROM_BUFFER for core in ("core", "_core")},
    **{
        (module, kind.__name__): kind
        for module in _BUILTINS
        for kind in (int, float, complex, bool, str, bytes, list, tuple, dict, set)
    },
    **{(module, "long"): int for module in _BUILTINS},
    **{(module, "unicode"): str for module in _BUILTINS},
}


class _WeightUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it refers to {module}.{name}, which is not data and will not be loaded"
            ) from None


def unpickle_data(file: BinaryIO) -> Any:
    """A pickle of plain data and numpy arrays, written by python 2 or 3; it can not run code.

    Raises:
        pickle.UnpicklingError: it holds more than data. A damaged file may raise anything.
    """
    return _WeightUnpickler(file, encoding="latin1").load()


@dataclass
class DetectronFile:
    """Content of a Detectron `.pkl`.

    blobs: name -> array. config: the config of the training, None in ImageNet and older files.
    """

    blobs: dict[str, np.ndarray]
    config: Mapping[str, Any] | None


def read_detectron_file(path: str | Path) -> DetectronFile:
    """A Detectron `.pkl` (`{'blobs': ..., 'cfg': ...}` or a bare dict of blobs).

    The file may be written by python 2 or 3; neither it nor the config in it can run code.

    Raises:
        UserError: the file is missing, damaged, no such file at all, or holds more than data.
    """
    path = _existing(path)
    try:
        with path.open("rb") as file:
            content = unpickle_data(file)
    # A damaged pickle can raise nearly anything.
    except Exception as error:
        raise UserError(_cannot_read(path, error, "Detectron .pkl weights")) from error
    config = None
    if isinstance(content, dict) and isinstance(content.get("blobs"), dict):
        config = _embedded_config(path, content.get("cfg"))
        content = content["blobs"]
    blobs = {}
    if isinstance(content, dict):
        blobs = {
            name: value
            for name, value in content.items()
            if isinstance(value, np.ndarray) and value.dtype.kind in "fiu"
        }
    if not blobs:
        raise UserError(f"{path} holds no weights: a Detectron .pkl is a dict of named arrays")
    return DetectronFile(blobs, config)


def read_detectron_blobs(path: str | Path) -> dict[str, np.ndarray]:
    """The blobs of a Detectron `.pkl` by name; errors as `read_detectron_file`."""
    return read_detectron_file(path).blobs


def _embedded_config(path: Path, text: Any) -> Mapping[str, Any] | None:
    if not isinstance(text, str):
        return None
    try:
        config = load_yaml(text)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or "it is not YAML"
        raise UserError(f"the config inside {path} cannot be read safely ({reason})") from error
    return config if isinstance(config, Mapping) else None


def read_torch_file(path: str | Path) -> Any:
    """Content of a `.pth` file, on the CPU, through torch's loader that runs no code.

    Raises:
        UserError: the file is missing, damaged, no torch file, or holds more than data.
    """
    path = _existing(path)
    # Checkpoints of old trainings may hold a learning rate as a numpy number.
    numpy_numbers = [
        (_NUMPY_SCALAR, f"{_MULTIARRAY[0]}.scalar"),
        (_NUMPY_SCALAR, f"{_MULTIARRAY[1]}.scalar"),
        np.dtype,
        type(np.dtype(np.float64)),
        type(np.dtype(np.float32)),
        type(np.dtype(np.int64)),
    ]
    try:
        with torch.serialization.safe_globals(numpy_numbers):
            return torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file can raise nearly anything.
    except Exception as error:
        raise UserError(_cannot_read(path, error, "a PyTorch .pth file")) from error


def read_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a `.safetensors` file by name, on the CPU.

    Raises:
        UserError: the file is missing, damaged, or another kind of file.
    """
    path = _existing(path)
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(_cannot_read(path, error, "a safetensors file")) from error


def save_torch_file(content: Any, path: str | Path) -> None:
    """Write a `.pth` file that is either whole or not there."""
    with atomic_write(path) as file:
        torch.save(content, file)


@contextlib.contextmanager
def atomic_write(path: str | Path, synced: bool = True) -> Iterator[BinaryIO]:
    """A binary file that takes its name only once it is complete and on the disk.

    A failure inside the `with` block leaves what stood under that name before. An OSError, of a
    full disk for example, names the file. synced: whether it must survive a power cut too, which
    waits for the disk.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            if synced:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if synced:
        _fsync_folder(path.parent)


def _fsync_folder(folder: Path) -> None:
    # The new name itself must survive a power cut; not every platform can open a folder.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no weight file {path}: check the path")
    return path


def _cannot_read(path: Path, error: Exception, kind: str) -> str:
    if path.stat().st_size == 0:
        return f"{path} is empty: copy or download it again"
    if _is_other_kind(path, kind):
        return f"{path} is not {kind}"
    if path.suffix == ".pkl" and "pkl" not in kind:
        return f"{path} is not {kind}: Detectron's weights are for --load_detectron"
    reason = " ".join(str(error).split()) or type(error).__name__
    # Around it torch advises how to load without the protection, which nobody should.
    for advice in ("trusted source.", "WeightsUnpickler error:"):
        reason = reason.rpartition(advice)[2].strip()
    for advice in (" Check the documentation", " Please use"):
        reason = reason.partition(advice)[0]
    reason = reason if len(reason) <= 160 else f"{reason[:157]}..."
    return f"{path} is damaged or not {kind} ({reason}): copy or download it again"


def _is_other_kind(path: Path, kind: str) -> bool:
    with path.open("rb") as file:
        start = file.read(16).lstrip().lower()
    return start.startswith((b"<!doctype", b"<html")) or (start[:2] == b"pk" and "pkl" in kind)
