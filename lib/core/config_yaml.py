"""Config files as YAML: read without running what they name, written as this family writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

_TAG = "tag:yaml.org,2002:python/"
# Detectron dumps its config with python's tags; its AttrDict has moved once.
ATTR_DICTS = ("utils.collections.AttrDict", "detectron.utils.collections.AttrDict")
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMBER_TYPE = re.compile(r"[fiu][1248]|b1")


def load_yaml(text: str) -> Any:
    """Content of a config, also of one that Detectron dumped with python's object tags.

    AttrDicts become dicts; tuples and numpy numbers and arrays keep their type. No other object
    is made, and nothing that the text names is looked up or called.

    Raises:
        yaml.YAMLError: the text is no YAML, or has another tag.
    """
    return yaml.load(text, _ConfigLoader)


def dump_yaml(config: Mapping[str, Any]) -> str:
    """A nested config as readable YAML: a key a line, tuples as `(800,)`."""
    return yaml.dump(config, Dumper=_ConfigDumper, sort_keys=False, width=100)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"TRAIN.SCALES": ...}` as `{"TRAIN": {"SCALES": ...}}`."""
    groups: dict[str, Any] = {}
    for key, value in values.items():
        *path, name = key.split(".")
        group = groups
        for part in path:
            group = group.setdefault(part, {})
        group[name] = value
    return groups


class _ConfigLoader(yaml.SafeLoader):
    """Builds python's tags from plain data alone."""

    def tagged_tuple(self, node: yaml.Node) -> tuple:
        return tuple(self.construct_sequence(node, deep=True))

    def tagged_dict(self, node: yaml.Node) -> dict:
        return self.construct_mapping(node, deep=True).get("dictitems") or {}

    def tagged_type(self, node: yaml.Node) -> np.dtype:
        args, _ = self._call(node)
        if not args or not _NUMBER_TYPE.fullmatch(str(args[0])):
            raise self._refusal(node, "is not the type of a number")
        return np.dtype(str(args[0])).newbyteorder("<")

    def tagged_scalar(self, node: yaml.Node) -> np.generic:
        args, _ = self._call(node)
        if len(args) != 2:
            raise self._refusal(node, "is not a number")
        return self._array(node, args[0], (), args[1])[()]

    def tagged_array(self, node: yaml.Node) -> np.ndarray:
        _, state = self._call(node)
        if len(state) != 5:
            raise self._refusal(node, "is not an array")
        _, shape, kind, _, content = state
        return self._array(node, kind, shape, content)

    def tagged_name(self, node: yaml.Node) -> None:
        """A numpy class among an array's arguments; its name is all that is known of it."""

    def _call(self, node: yaml.Node) -> tuple[list, tuple]:
        """(args, state) of an object that python would make by a call."""
        if isinstance(node, yaml.SequenceNode):
            return self.construct_sequence(node, deep=True), ()
        if not isinstance(node, yaml.MappingNode):
            raise self._refusal(node, "has no arguments")
        fields = self.construct_mapping(node, deep=True)
        return list(fields.get("args") or ()), tuple(fields.get("state") or ())

    def _array(self, node: yaml.Node, kind: Any, shape: Any, content: Any) -> np.ndarray:
        # Python 2 dumps bytes that happen to be ASCII as text.
        raw = content.encode("latin1") if isinstance(content, str) else content
        try:
            return np.frombuffer(raw, kind).reshape(shape).copy()
        except (TypeError, ValueError) as error:
            raise self._refusal(node, "is not an array of numbers") from error

    @staticmethod
    def _refusal(node: yaml.Node, what: str) -> yaml.constructor.ConstructorError:
        return yaml.constructor.ConstructorError(None, None, f"{node.tag} {what}", node.start_mark)


def _add_constructors() -> None:
    loader = _ConfigLoader
    plain = {
        "tuple": loader.tagged_tuple,
        "str": loader.construct_yaml_str,
        "unicode": loader.construct_yaml_str,
        "int": loader.construct_yaml_int,
        "long": loader.construct_yaml_int,
        "bytes": loader.construct_yaml_binary,
        "object/apply:numpy.dtype": loader.tagged_type,
        "name:numpy.ndarray": loader.tagged_name,
        **{f"object/apply:{module}.scalar": loader.tagged_scalar for module in _MULTIARRAY},
        **{f"object/apply:{module}._reconstruct": loader.tagged_array for module in _MULTIARRAY},
        **{f"object/new:{name}": loader.tagged_dict for name in ATTR_DICTS},
    }
    for tag, constructor in plain.items():
        loader.add_constructor(_TAG + tag, constructor)


class _ConfigDumper(yaml.SafeDumper):
    """Short sequences on one line, tuples as strings that a config reads as tuples again."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def tuple_as_text(self, value: tuple) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:str", str(value))

    def list_in_line(self, value: list) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)

    def bool_as_python(self, value: bool) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:bool", str(value))

    def array_in_line(self, value: np.ndarray) -> yaml.Node:
        return self.list_in_line(value.tolist())


_add_constructors()
_ConfigDumper.add_representer(tuple, _ConfigDumper.tuple_as_text)
_ConfigDumper.add_representer(list, _ConfigDumper.list_in_line)
_ConfigDumper.add_representer(bool, _ConfigDumper.bool_as_python)
_ConfigDumper.add_representer(np.ndarray, _ConfigDumper.array_in_line)
_ConfigDumper.add_multi_representer(np.generic, lambda dumper, v: dumper.represent_data(v.item()))
