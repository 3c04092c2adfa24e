"""A roidb as a few large arrays: quick to write and read, and shared by loader processes.

Python objects (a dict, a list and an array for every polygon) would be copied into every process,
page by page, as their reference counts change; these arrays stay where they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

# One image of a roidb; datasets.entry says what is in it.
RoidbEntry = dict[str, Any]

_FIELDS = ("id", "image", "height", "width", "flipped", "need_crop")
_PER_OBJECT = ("boxes", "gt_classes", "is_crowd", "seg_areas")


class PackedRoidb:
    """What the annotations say of each image; `packed[i]` gives it back as a dict.

    The dict has a roidb entry's id, image, height, width, flipped, need_crop (if it was set),
    boxes, gt_classes, is_crowd, seg_areas, segms and (if all have them) gt_keypoints, of the
    ground-truth objects only; and, if the roidb has file proposals, `proposals` float32 (P, 4):
    those that the crowd filter left. Its arrays are views: not to be modified.
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        """arrays: the `arrays` of another instance, as they come from a file."""
        self.arrays = arrays

    @classmethod
    def pack(cls, roidb: Sequence[RoidbEntry]) -> PackedRoidb:
        counts = [len(entry["segms"]) for entry in roidb]  # proposals, if any, come after these
        keys = list(_PER_OBJECT)
        if all("gt_keypoints" in entry for entry in roidb):
            keys.append("gt_keypoints")
        arrays = {"object_ends": np.cumsum(counts, dtype=np.int64)}
        if roidb:
            for key in keys:
                rows = [entry[key][:n] for entry, n in zip(roidb, counts, strict=True)]
                arrays[key] = np.concatenate(rows)
        arrays.update(_pack_segms([segm for entry in roidb for segm in entry["segms"]]))
        if any(len(entry["boxes"]) > n for entry, n in zip(roidb, counts, strict=True)):
            arrays.update(_pack_proposals(roidb, counts))
        records = ([entry.get(field) for field in _FIELDS] for entry in roidb)
        arrays["records"], arrays["record_ends"] = _pack_json(records)
        return cls(arrays)

    def __len__(self) -> int:
        return len(self.arrays["object_ends"])

    def __getitem__(self, index: int) -> RoidbEntry:
        if not 0 <= index < len(self):
            raise IndexError(index)
        record = _unpack_json(self.arrays["records"], self.arrays["record_ends"], index)
        entry = {k: v for k, v in zip(_FIELDS, record, strict=True) if v is not None}
        begin, end = _span(self.arrays["object_ends"], index)
        for key in (*_PER_OBJECT, "gt_keypoints"):
            if key in self.arrays:
                entry[key] = self.arrays[key][begin:end]
        entry["segms"] = self._segms(begin, end)
        if "proposals" in self.arrays:
            begin, end = _span(self.arrays["proposal_ends"], index)
            entry["proposals"] = self.arrays["proposals"][begin:end]
        return entry

    def _segms(self, begin: int, end: int) -> list[list | dict]:
        """Masks of objects begin to end."""
        first = _span(self.arrays["polygon_ends"], begin)[0]
        polygon_ends = self.arrays["polygon_ends"][begin:end].tolist()
        last = polygon_ends[-1] if polygon_ends else first
        start = _span(self.arrays["coord_ends"], first)[0]
        polygons = []
        for stop in self.arrays["coord_ends"][first:last].tolist():
            polygons.append(self.arrays["coords"][start:stop])
            start = stop
        segms: list[list | dict] = []
        place = first
        rle_index = self.arrays["rle_index"][begin:end].tolist()
        for stop, rle in zip(polygon_ends, rle_index, strict=True):
            if rle >= 0:
                segms.append(_unpack_json(self.arrays["rles"], self.arrays["rle_ends"], rle))
            else:
                segms.append(polygons[place - first : stop - first])
            place = stop
        return segms


def _span(ends: np.ndarray, index: int) -> tuple[int, int]:
    """First and one-past-last place of item `index`, from the ends of all (index may be the one
    after the last, whose end is then that of the last)."""
    return (
        int(ends[index - 1]) if index else 0,
        int(ends[min(index, len(ends) - 1)]) if len(ends) else 0,
    )


def _pack_proposals(roidb: Sequence[RoidbEntry], counts: Sequence[int]) -> dict[str, np.ndarray]:
    """What comes after the `counts` objects of each entry, back to back, and the end of each."""
    rows = []
    for entry, n in zip(roidb, counts, strict=True):
        # Overlap -1: within a crowd, neither foreground nor background, so never drawn.
        rows.append(entry["boxes"][n:][entry["max_overlaps"][n:] >= 0])
    ends = np.cumsum([len(boxes) for boxes in rows], dtype=np.int64)
    return {"proposals": np.concatenate(rows), "proposal_ends": ends}


def _pack_segms(segms: Sequence[list | dict]) -> dict[str, np.ndarray]:
    """Polygons: coordinates back to back, with the end of each polygon's coordinates and of each
    object's polygons. RLEs: as JSON, with each object's number among them (-1: none)."""
    polygons: list[np.ndarray] = []
    polygon_ends, rles, rle_index = [], [], []
    for segm in segms:
        if isinstance(segm, dict):
            rle_index.append(len(rles))
            counts = segm["counts"]
            text = counts.decode("ascii") if isinstance(counts, bytes) else counts
            rles.append({"size": segm["size"], "counts": text})
        else:
            rle_index.append(-1)
            polygons.extend(segm)
        polygon_ends.append(len(polygons))
    arrays = {
        "polygon_ends": np.array(polygon_ends, dtype=np.int64),
        "coord_ends": np.cumsum([len(p) for p in polygons], dtype=np.int64),
        "coords": np.concatenate([np.zeros(0), *polygons]),
        "rle_index": np.array(rle_index, dtype=np.int64),
    }
    arrays["rles"], arrays["rle_ends"] = _pack_json(rles)
    return arrays


def _pack_json(values: Iterable) -> tuple[np.ndarray, np.ndarray]:
    """JSON values as bytes back to back (uint8) and the end of each."""
    texts = [json.dumps(value).encode() for value in values]
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return np.frombuffer(b"".join(texts), dtype=np.uint8), ends


def _unpack_json(data: np.ndarray, ends: np.ndarray, index: int):
    begin, end = _span(ends, index)
    return json.loads(data[begin:end].tobytes())
