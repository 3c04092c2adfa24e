"""A dict whose items are also attributes, and which can be frozen."""

from __future__ import annotations

import copy
from typing import Any


class AttrDict(dict):
    """`d.KEY` is `d["KEY"]`. A frozen one raises AttributeError on every write.

    Copies (`copy.copy`, `copy.deepcopy`) of a frozen AttrDict are not frozen.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no config key {name} (there are: {', '.join(self)})") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]

    def freeze(self, frozen: bool = True) -> None:
        """Forbid (or allow again) writes here and in every AttrDict below."""
        self.__dict__["_frozen"] = frozen
        for value in self.values():
            if isinstance(value, AttrDict):
                value.freeze(frozen)

    def is_frozen(self) -> bool:
        return self.__dict__.get("_frozen", False)

    def _check_writable(self, what: object) -> None:
        if self.is_frozen():
            raise AttributeError(
                f"cannot change {what}: the config is frozen by assert_and_infer_cfg(); "
                "set it before that call, or start again with reset_cfg()"
            )

    def __setitem__(self, key: str, value: Any) -> None:
        self._check_writable(key)
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self._check_writable(key)
        super().__delitem__(key)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> AttrDict:
        self.update(other)
        return self

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: str, *default: Any) -> Any:
        self._check_writable(key)
        return super().pop(key, *default)

    def popitem(self) -> tuple[str, Any]:
        self._check_writable("its last key")
        return super().popitem()

    def clear(self) -> None:
        self._check_writable("it")
        super().clear()

    def __copy__(self) -> AttrDict:
        return AttrDict(self)

    def __deepcopy__(self, memo: dict) -> AttrDict:
        return AttrDict({key: copy.deepcopy(value, memo) for key, value in self.items()})
