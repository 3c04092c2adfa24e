"""The global config `cfg`: merging values into it, inferring the rest, freezing it.

Order of use: merge (file, then command line), set MODEL.NUM_CLASSES from the data set, then
`assert_and_infer_cfg()`, then build the model. Keys and defaults are in `core.defaults`, the
checks in `core.config_checks`.
"""

from __future__ import annotations

import ast
import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from core.attr_dict import AttrDict
from core.config_checks import config_problems
from core.defaults import DEFAULTS
from core.errors import UserError

# Their default is an int, but any number makes sense.
_REAL_KEYS = frozenset({"TRAIN.ASPECT_HI"})


class ConfigError(UserError, ValueError):
    """The config, or a change to it, cannot work."""


class UnknownKeyError(ConfigError, KeyError):
    """A config (file or dict) names a key that does not exist."""


class UnknownOptionError(ConfigError, AssertionError):
    """A list of options (command line) names a key that does not exist."""


cfg: AttrDict = copy.deepcopy(DEFAULTS)


def reset_cfg() -> None:
    """Put `cfg` back to the defaults, not frozen."""
    cfg.freeze(False)
    cfg.clear()
    cfg.update(copy.deepcopy(DEFAULTS))


def merge_cfg_from_file(path: str | Path) -> None:
    """Merge a YAML file into `cfg`.

    Raises:
        ConfigError: the file is missing, is not YAML, or has a value of the wrong type.
        UnknownKeyError: it has a key that does not exist (also a KeyError).
    """
    _merge(_read_yaml(path), source=f"{path}: ")


def merge_cfg_from_cfg(other: Mapping[str, Any]) -> None:
    """Merge a nested mapping (e.g. another AttrDict) into `cfg`; errors as for a file."""
    _merge(other, source="")


def merge_cfg_from_list(options: Sequence[Any]) -> None:
    """Merge `[key, value, key, value, ...]`, e.g. `['TRAIN.SCALES', '(800,)']`, into `cfg`.

    Raises:
        ConfigError: a value is missing or of the wrong type.
        UnknownOptionError: a key does not exist (also an AssertionError).
    """
    if len(options) % 2:
        raise ConfigError(
            f"config options are pairs of a key and a value, but {options[-1]} has no value"
        )
    changes = []
    for key, value in zip(options[::2], options[1::2], strict=True):
        if key not in _known_keys():
            raise UnknownOptionError(_unknown_key_message(key, source=""))
        parent, name = _locate(key)
        changes.append((parent, name, _coerce(_decode(value), parent[name], key, source="")))
    _apply(changes)


cfg_from_file = merge_cfg_from_file
cfg_from_cfg = merge_cfg_from_cfg
cfg_from_list = merge_cfg_from_list


def assert_and_infer_cfg(make_immutable: bool = True) -> None:
    """Fill in the keys that follow from others, check combinations, and freeze `cfg`.

    Args:
        make_immutable: freeze; False leaves `cfg` open (and MODEL.NUM_CLASSES may come later).
    Raises:
        ConfigError: keys contradict each other; the message names them.
    """
    if cfg.MODEL.RPN_ONLY or cfg.MODEL.FASTER_RCNN:
        cfg.RPN.RPN_ON = True
    if cfg.RPN.RPN_ON or cfg.RETINANET.RETINANET_ON:
        cfg.TEST.PRECOMPUTED_PROPOSALS = False
    if cfg.MODEL.MASK_ON and cfg.MRCNN.ROI_MASK_HEAD.endswith("v0upshare"):
        cfg.MODEL.SHARE_RES5 = True
    for problem in config_problems(cfg, complete=make_immutable):
        raise ConfigError(problem)
    if make_immutable:
        cfg.freeze()


def _read_yaml(path: str | Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path} is not a text file (UTF-8)") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"config {path} is not valid YAML{where}: {what}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"config {path} must hold `KEY: value` entries, such as `TRAIN: ...`")
    return content


def _merge(new: Mapping[str, Any], source: str) -> None:
    _apply(list(_changes(new, cfg, prefix="", source=source)))


def _apply(changes: list[tuple[AttrDict, str, Any]]) -> None:
    # All values are checked before the first is set: a bad config changes nothing.
    for parent, name, value in changes:
        parent[name] = value


def _changes(
    new: Mapping[str, Any], old: AttrDict, prefix: str, source: str
) -> Iterator[tuple[AttrDict, str, Any]]:
    for name, value in new.items():
        key = f"{prefix}{name}"
        if name not in old:
            raise UnknownKeyError(_unknown_key_message(key, source))
        if isinstance(old[name], AttrDict) and isinstance(value, Mapping):
            yield from _changes(value, old[name], f"{key}.", source)
        else:
            yield old, name, _coerce(_decode(value), old[name], key, source)


def _locate(key: str) -> tuple[AttrDict, str]:
    *groups, name = key.split(".")
    parent = cfg
    for group in groups:
        parent = parent[group]
    return parent, name


def _decode(value: Any) -> Any:
    """Read a string as a Python literal ('(800,)', '1e-3', 'False') if it is one."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _coerce(new: Any, old: Any, key: str, source: str) -> Any:
    """`new` converted to the type of `old` where that loses nothing, else a ConfigError."""
    if isinstance(old, AttrDict):
        raise ConfigError(
            f"{source}{key} is a group of keys ({', '.join(old)}) and cannot be {_shown(new)}"
        )
    if isinstance(old, np.ndarray):
        try:
            return np.array(new, dtype=old.dtype)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{source}{key} must be numbers, not {_shown(new)}") from error
    if type(new) is type(old):
        return new
    if isinstance(old, str):
        return str(new)
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        return type(old)(new)
    is_number = isinstance(new, (int, float)) and not isinstance(new, bool)
    if is_number and (isinstance(old, float) or key in _REAL_KEYS):
        return type(old)(new) if isinstance(old, float) else new
    raise ConfigError(
        f"{source}{key} must be {_type_name(old)} like {old!s}, not {_shown(new)} "
        f"({_type_name(new)})"
    )


def _type_name(value: Any) -> str:
    name = "float" if isinstance(value, float) else type(value).__name__
    return f"an {name}" if name == "int" else f"a {name}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _known_keys(group: AttrDict = DEFAULTS, prefix: str = "") -> list[str]:
    keys = []
    for name, value in group.items():
        keys.append(f"{prefix}{name}")
        if isinstance(value, AttrDict):
            keys.extend(_known_keys(value, f"{prefix}{name}."))
    return keys


def _unknown_key_message(key: object, source: str) -> str:
    def similarity(known: str) -> tuple[bool, float]:
        same_name = known.rpartition(".")[2] == str(key).rpartition(".")[2]
        return same_name, difflib.SequenceMatcher(None, str(key), known).ratio()

    nearest = max(_known_keys(), key=similarity)
    return f"{source}unknown config key {key}; the nearest known key is {nearest}"
