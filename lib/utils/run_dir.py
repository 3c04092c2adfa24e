"""Folders and files that scripts write to, and the record of a training's settings."""

from __future__ import annotations

import datetime
import os
import socket
import stat
from collections.abc import Iterable, Mapping
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


def write_text(path: str | Path, text: str) -> None:
    """Write a file that the user named, whole or not at all, in a folder that is made for it.

    Raises UserError if that is impossible, or if something else than a file stands there.
    """
    path = Path(path)
    if os.path.exists(path) and not path.is_file():  # pathlib's raises for a name too long
        raise UserError(f"cannot write {path}, which is no plain file: name one")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def refuse_overwriting(
    outputs: Iterable[str | Path], inputs: Iterable[str | Path], advice: str
) -> None:
    """Raise UserError if a file to be written is one that is read, by whatever path or link.

    advice: what the sentence ends with.
    """
    there = {key: path for path in outputs if (key := _identity(path)) is not None}
    for path in inputs if there else ():
        if (key := _identity(path)) in there:
            raise UserError(f"{there[key]} would overwrite {path}, which is read: {advice}")


def _identity(path: str | Path) -> tuple[int, int] | None:
    # One look at each file: cheap for tens of thousands, and links and other spellings are seen.
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None


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
