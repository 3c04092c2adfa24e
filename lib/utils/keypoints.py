"""Names and left-right pairs of person keypoints, and how keypoints mirror with their image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

PERSON_KEYPOINTS = (
    "nose",
    "left_eye",
    "right_eye",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)


def get_keypoints() -> tuple[list[str], dict[str, str]]:
    """COCO's 17 person keypoints: (names in order, {left name: right name})."""
    names = list(PERSON_KEYPOINTS)
    return names, keypoint_flip_map(names)


def keypoint_flip_map(names: Sequence[str]) -> dict[str, str]:
    """{left name: right name} of the points that change places when an image is mirrored."""
    known = set(names)
    pairs = ((name, name.replace("left", "right")) for name in names if "left" in name)
    return {left: right for left, right in pairs if right in known}


def flip_keypoints(
    keypoints: Sequence[str], flip_map: Mapping[str, str], keypoint_coords: np.ndarray, width: int
) -> np.ndarray:
    """Keypoints of the mirrored image.

    keypoint_coords: (N, 3, K), rows x, y, visibility, in pixels of an image `width` wide. Left
    and right points swap, x' = width - x - 1, and a point without a label (visibility 0) has
    x = 0 afterwards.
    """
    flipped = keypoint_coords.copy()
    for left, right in flip_map.items():
        i, j = keypoints.index(left), keypoints.index(right)
        flipped[:, :, i] = keypoint_coords[:, :, j]
        flipped[:, :, j] = keypoint_coords[:, :, i]
    flipped[:, 0, :] = width - flipped[:, 0, :] - 1
    flipped[:, 0, :][flipped[:, 2, :] == 0] = 0
    return flipped
