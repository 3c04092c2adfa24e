"""Folders that scripts write to, and the record of a training's settings."""

from __future__ import annotations

import datetime
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from core.errors import UserError
from utils.weights import atomic_write


def run_dir(output_dir: str | Path, cfg_file: str | Path) -> Path:
    """`OUTPUT_DIR/<config's name>/<time and host>`; nothing is created."""
    time = datetime.datetime.now().strftime("%b%d-%H-%M-%S")
    return Path(output_dir) / Path(cfg_file).stem / f"{time}_{socket.gethostname()}_step"


def make_folder(folder: str | Path) -> Path:
    """The folder, made if it does not exist. Raises UserError if that is impossible."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {folder} ({error.strerror}): choose another with --output_dir."
        ) from error
    return folder


def save_config_and_args(folder: Path, cfg: Mapping[str, Any], args: Mapping[str, Any]) -> Path:
    """Write `config_and_args.yaml`: the merged config under `cfg`, the flags under `args`."""
    path = folder / "config_and_args.yaml"
    content = {"cfg": plain(cfg), "args": plain(args)}
    with atomic_write(path) as file:
        file.write(yaml.safe_dump(content, sort_keys=False).encode())
    return path


def plain(value: Any) -> Any:
    """Config values as YAML and JSON know them: tuples and arrays are lists, paths are strings."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
