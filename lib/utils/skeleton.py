"""Which keypoints a drawing joins by lines, and in which colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import matplotlib
import numpy as np

from utils.keypoints import PERSON_KEYPOINTS

Colour = tuple[int, int, int]

# Detectron's figure of a person: its lines by name, in the order of their colours. An end of
# several names is the middle between them.
_PERSON_LINES = (
    ("left_eye", "right_eye"),
    ("left_eye", "nose"),
    ("right_eye", "nose"),
    ("right_eye", "right_ear"),
    ("left_eye", "left_ear"),
    ("right_shoulder", "right_elbow"),
    ("right_elbow", "right_wrist"),
    ("left_shoulder", "left_elbow"),
    ("left_elbow", "left_wrist"),
    ("right_hip", "right_knee"),
    ("right_knee", "right_ankle"),
    ("left_hip", "left_knee"),
    ("left_knee", "left_ankle"),
    ("right_shoulder", "left_shoulder"),
    ("right_hip", "left_hip"),
    (("left_shoulder", "right_shoulder"), "nose"),
    (("left_shoulder", "right_shoulder"), ("left_hip", "right_hip")),
)


@dataclass(frozen=True)
class Skeleton:
    """Lines between keypoints; each end is the mean of the points with these indices."""

    lines: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    @cached_property
    def colours(self) -> tuple[Colour, ...]:
        """RGB of each line: a rainbow over all of them, as Detectron has it."""
        rainbow = matplotlib.colormaps["rainbow"](np.linspace(0, 1, len(self.lines)))
        return tuple(tuple(round(255 * float(v)) for v in rgba[:3]) for rgba in rainbow)

    @cached_property
    def point_colours(self) -> dict[int, Colour]:
        """RGB of each point that ends a line: that of the last such line."""
        ends = zip(self.lines, self.colours, strict=True)
        return {end[0]: colour for line, colour in ends for end in line if len(end) == 1}


def skeleton_of(names: Sequence[str], pairs: Sequence[Sequence[int]] = ()) -> Skeleton:
    """The skeleton of a category's keypoints.

    Args:
        names: as the category lists them. COCO's person is drawn as Detectron draws it.
        pairs: the category's `skeleton`: pairs of points, counted from 1. A pair that names
            a point that is not there is left out.
    """
    if set(PERSON_KEYPOINTS) <= set(names):
        index = {name: i for i, name in enumerate(names)}
        return Skeleton(
            tuple(
                tuple(
                    tuple(index[n] for n in ((end,) if isinstance(end, str) else end))
                    for end in line
                )
                for line in _PERSON_LINES
            )
        )
    known = range(1, len(names) + 1)
    return Skeleton(tuple(((a - 1,), (b - 1,)) for a, b in pairs if a in known and b in known))


PERSON_SKELETON = skeleton_of(PERSON_KEYPOINTS)
