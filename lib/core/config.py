"""The global config `cfg`: merging values into it, inferring the rest, freezing it.

Order of use: merge (file, then command line), set MODEL.NUM_CLASSES from the data set, then
`assert_and_infer_cfg()`, then build the model. Keys and defaults are in `core.defaults`, the
checks in `core.config_checks`.
"""

from __future__ import annotations

import ast
import copy
import difflib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from core.attr_dict import AttrDict
from core.config_checks import config_problems
from core.config_yaml import load_yaml
from core.defaults import DEFAULTS
from core.detectron_config import translate
from core.errors import UserError

logger = logging.getLogger(__name__)

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
    _log_once.cache_clear()


def merge_cfg_from_file(path: str | Path) -> None:
    """Merge a YAML file, of this family or Detectron's own, into `cfg`.

    Raises:
        ConfigError: the file is missing, is not YAML, or has a value of the wrong type.
        UnknownKeyError: it has a key that does not exist (also a KeyError).
    """
    _apply(list(_changes(read_config(path), source=f"{path}: ")))


def merge_cfg_from_cfg(other: Mapping[str, Any]) -> None:
    """Merge a nested mapping (e.g. another AttrDict) into `cfg`; errors as for a file."""
    _apply(list(_changes(_translated(_flat(other), source="", whole=True), source="")))


def read_config(path: str | Path) -> dict[str, Any]:
    """What a YAML file sets, in this family's words: full key -> value, not yet checked.

    Raises:
        ConfigError: the file is missing or is not YAML.
    """
    return _translated(_flat(_read_yaml(path)), source=f"{path}: ", whole=True)


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
        try:
            changes += _changes(_translated({key: value}, source="", whole=False), source="")
        except UnknownKeyError as error:
            raise UnknownOptionError(str(error)) from None
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
        content = load_yaml(Path(path).read_text(encoding="utf-8"))
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


def _apply(changes: list[tuple[AttrDict, str, Any]]) -> None:
    # All values are checked before the first is set: a bad config changes nothing.
    for parent, name, value in changes:
        parent[name] = value


def _flat(group: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Full key -> value; an empty mapping is a value."""
    values: dict[str, Any] = {}
    for name, value in group.items():
        if isinstance(value, Mapping) and value:
            values.update(_flat(value, f"{prefix}{name}."))
        else:
            values[f"{prefix}{name}"] = value
    return values


def _translated(values: Mapping[str, Any], source: str, whole: bool) -> dict[str, Any]:
    """Detectron's keys and names in this family's words; each change is logged."""
    translated, notes = translate(values, lambda key: _find(key) is not None, whole=whole)
    for note in notes:
        _log_once(f"{source}{note}")
    return translated


@functools.cache
def _log_once(message: str) -> None:
    logger.info("%s", message)


def _changes(values: Mapping[str, Any], source: str) -> Iterator[tuple[AttrDict, str, Any]]:
    for key, value in values.items():
        place = _find(key)
        if place is None:
            raise UnknownKeyError(_unknown_key_message(_first_unknown(key), source))
        parent, name = place
        is_nothing = isinstance(parent[name], AttrDict) and value == {}
        if not is_nothing:
            yield parent, name, _coerce(_decode(value), parent[name], key, source)


def _find(key: str) -> tuple[AttrDict, str] | None:
    """The group that holds a full key and its last part; None if there is no such key."""
    *groups, name = key.split(".")
    parent: Any = cfg
    for group in groups:
        parent = parent.get(group)
        if not isinstance(parent, AttrDict):
            return None
    return (parent, name) if name in parent else None


def _first_unknown(key: str) -> str:
    """`FOO` of `FOO.BAR` where there is no group FOO."""
    parts = key.split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return next(prefix for prefix in prefixes if _find(prefix) is None)


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
