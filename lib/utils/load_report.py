"""What loading a weight file did to a model, by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)


@dataclass
class LoadReport:
    """Names of parameters (with their blob where they have one) and of entries of the file.

    loaded: parameters that have the file's values. skipped: predictors made for another number of
    classes, left as initialised. missing: parameters that the file lacks. mismatched: parameters
    of another shape. without_blob: constants that no file needs to hold. unused: entries of the
    file that the model has no place for. config: the config inside the file, if it has one.
    """

    loaded: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    without_blob: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    config: Mapping[str, Any] | None = None

    def log(self, source: object) -> None:
        """A line of numbers; the names of what was loaded at level DEBUG, all others at once."""
        logger.info(
            "%s: %d parameters loaded, %d skipped, %d missing, %d mismatched; %d entries unused",
            source,
            len(self.loaded),
            len(self.skipped),
            len(self.missing),
            len(self.mismatched),
            len(self.unused),
        )
        for level, what, names in (
            (logging.DEBUG, "loaded", self.loaded),
            (logging.DEBUG, "constant, not loaded", self.without_blob),
            (logging.WARNING, "skipped, made for another number of classes", self.skipped),
            (logging.WARNING, "missing, left as initialised", self.missing),
            (logging.WARNING, "mismatched, left as initialised", self.mismatched),
            (logging.INFO, "unused", self.unused),
        ):
            if names:
                logger.log(level, "%s: %s: %s", source, what, ", ".join(names))


def first_names(names: Sequence[str], shown: int = 3) -> str:
    """`a, b, c and 5 more`, for messages."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
