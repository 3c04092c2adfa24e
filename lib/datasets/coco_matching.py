"""COCO's metrics on arrays: what pycocotools' COCOeval computes, number for number.

`match` compares the detections of some images with their objects, `accumulate` joins what it said
of all images, for all classes or for some. No image depends on another until then, and no class on
another at all: parts may be matched, and classes added up, anywhere and in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as mask_util
from pycocotools.cocoeval import Params

_NEARLY_ONE = 1 - 1e-10  # as IoU threshold in pycocotools, 1 is this
_COLUMNS = ("image", "category", "rank", "score", "matched", "ignored")  # of Matches

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shapes:
    """Objects or detections of some images.

    Within an image, those of a class are in the order of the file or list that they come from.
    """

    image: np.ndarray  # (n,) int64 position of the image in the order of the ids
    category: np.ndarray  # (n,) int64 position of the class in Params.catIds
    area: np.ndarray  # (n,) float64, square pixels
    # Boxes: float64 (n, 4) xywh; keypoints: float64 (n, 3K); masks: n RLEs, of objects their
    # annotations.
    shapes: np.ndarray | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Objects(Shapes):
    """Ground truth."""

    crowd: np.ndarray  # (n,) bool
    ignored: np.ndarray  # (n,) bool, crowds among them
    boxes: np.ndarray  # (n, 4) float64 xywh
    to_rle: Callable[[dict[str, Any]], dict[str, Any]]  # an annotation's mask


@dataclass(frozen=True)
class Found(Shapes):
    """Detections."""

    score: np.ndarray  # (n,) float64


@dataclass(frozen=True)
class Matches:
    """What became of the detections of some images, at each of A sizes of objects and T IoUs.

    The detections are in the order of their classes.
    """

    image: np.ndarray  # (n,) int64, as of Shapes
    category: np.ndarray  # (n,) int64
    rank: np.ndarray  # (n,) int64, 0 for the best of its class in its image
    score: np.ndarray  # (n,) float64
    matched: np.ndarray  # (n, ceil(A * T / 8)) uint8: bits in the order of (A, T)
    ignored: np.ndarray  # the same: counts neither as right nor as wrong
    objects: np.ndarray  # (A, K) integers: how many of each of the K classes there are to find

    def rows(self) -> np.ndarray:
        """(n,) of record_type(): all but `objects`."""
        rows = np.empty(len(self.score), record_type(self.matched.shape[1]))
        for name in _COLUMNS:
            rows[name] = getattr(self, name)
        return rows

    @staticmethod
    def of_rows(rows: np.ndarray, objects: np.ndarray) -> Matches:
        """Those of some rows, of any images, in which there are so many objects to find."""
        return Matches(**{name: rows[name] for name in _COLUMNS}, objects=objects)


def record_type(size: int) -> np.dtype:
    """A detection's row in Matches: its columns in few bytes, `size` of them for the bits each."""
    small = [(name, np.int32) for name in ("image", "category", "rank")]
    bits = [(name, np.uint8, (size,)) for name in ("matched", "ignored")]
    return np.dtype([*small, ("score", np.float64), *bits])


def class_borders(classes: int, groups: int) -> np.ndarray:
    """(groups + 1,) int64: classes [borders[i], borders[i + 1]) are a group, of about as many."""
    return np.linspace(0, classes, groups + 1).round().astype(np.int64)


def match(objects: Objects, found: Found, kind: str, params: Params) -> Matches:
    """Match detections to objects, the best first, in each image and class.

    Args:
        objects, found: of the same images, whichever these are.
        kind: 'bbox', 'segm' or 'keypoints', which says what their shapes are.
        params: pycocotools', with classes and thresholds.
    """
    order = np.lexsort((-found.score, found.image, found.category))
    images = 1 + max(found.image.max(initial=0), objects.image.max(initial=0))
    pairs = (found.category * images + found.image)[order]  # an image's detections of a class
    rank = _counted(pairs)
    kept = rank < params.maxDets[-1]
    order, pairs, rank = order[kept], pairs[kept], rank[kept]

    areas = np.array(params.areaRng, dtype=np.float64)
    outside = _outside(objects.area, areas) | objects.ignored[:, None]
    matched, ignored = _greedy(
        *_overlapping(objects, found, kind, params, order, pairs, images),
        pairs,
        np.minimum(params.iouThrs, _NEARLY_ONE),
        outside,
        objects.crowd,
    )
    ignored |= ~matched & _outside(found.area[order], areas)[:, :, None]
    to_find = [
        np.bincount(objects.category[~column], minlength=len(params.catIds)) for column in outside.T
    ]
    lanes = len(order), areas.shape[0] * len(params.iouThrs)
    return Matches(
        image=found.image[order],
        category=found.category[order],
        rank=rank,
        score=found.score[order],
        matched=np.packbits(matched.reshape(lanes), axis=1),
        ignored=np.packbits(ignored.reshape(lanes), axis=1),
        objects=np.array(to_find),
    )


def _counted(groups: np.ndarray) -> np.ndarray:
    """For each of sorted numbers how many equal ones precede it."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups)


def _outside(area: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """(n, A) bool: whose area is in which of the ranges (A, 2) not."""
    return (area[:, None] < ranges[:, 0]) | (area[:, None] > ranges[:, 1])


def _overlapping(
    objects: Objects,
    found: Found,
    kind: str,
    params: Params,
    order: np.ndarray,
    pairs: np.ndarray,
    images: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detections and objects of one class and image that overlap enough to be matched at all.

    order: rows of found, grouped by `pairs` (numbers of an image and class).
    Returns: (m,) each: position in order, row of objects, overlap.
    """
    of_object = objects.category * images + objects.image
    rows = np.argsort(of_object, kind="stable")
    first = np.searchsorted(of_object[rows], pairs)
    counts = np.searchsorted(of_object[rows], pairs, side="right") - first
    detection = np.repeat(np.arange(len(order)), counts)
    begins = np.cumsum(counts) - counts
    column = np.arange(len(detection)) - begins[detection]
    objectives = rows[first[detection] + column]
    if kind == "bbox":
        overlap = _box_overlaps(
            found.shapes[order[detection]], objects.shapes[objectives], objects.crowd[objectives]
        )
    else:
        # An image's detections of a class, which follow each other, with all its objects of it.
        busy = np.flatnonzero(counts)
        starts = busy[np.flatnonzero(np.diff(pairs[busy], prepend=-1))]
        ends = np.searchsorted(pairs, pairs[starts], side="right")
        overlap = np.zeros(len(detection))
        function = _mask_overlaps if kind == "segm" else _keypoint_overlaps
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            theirs = rows[first[start] : first[start] + counts[start]]
            matrix = function(objects, found, theirs, order[start:end], params)
            overlap[begins[start] : begins[start] + matrix.size] = matrix.reshape(-1)
    enough = overlap >= min(params.iouThrs.min(), _NEARLY_ONE)
    return detection[enough], objectives[enough], overlap[enough]


def _box_overlaps(found: np.ndarray, objects: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(m,) IoU of m pairs of boxes xywh (m, 4); of a crowd the share of the detection."""
    low, high = (
        np.maximum(found, objects),
        np.minimum(found[:, :2] + found[:, 2:], objects[:, :2] + objects[:, 2:]),
    )
    sides = high - low[:, :2]
    both = np.where((sides > 0).all(axis=1), sides[:, 0] * sides[:, 1], 0.0)
    area, theirs = found[:, 2] * found[:, 3], objects[:, 2] * objects[:, 3]
    union = np.where(crowd, area, area + theirs - both)
    return np.divide(both, union, out=np.zeros_like(both), where=both > 0)


def _mask_overlaps(
    objects: Objects, found: Found, theirs: np.ndarray, ours: np.ndarray, params: Params
) -> np.ndarray:
    """(detections, objects) IoU of the masks of these rows."""
    return mask_util.iou(
        [found.shapes[i] for i in ours.tolist()],
        [objects.to_rle(objects.shapes[i]) for i in theirs.tolist()],
        objects.crowd[theirs].astype(int).tolist(),
    )


def _keypoint_overlaps(
    objects: Objects, found: Found, theirs: np.ndarray, ours: np.ndarray, params: Params
) -> np.ndarray:
    """(detections, objects) similarity of the keypoints of these rows, as COCOeval.computeOks."""
    variances = (2 * params.kpt_oks_sigmas) ** 2
    points = found.shapes[ours].reshape(len(ours), -1, 3)
    columns = []
    for i in theirs.tolist():
        x, y, visible = objects.shapes[i].reshape(-1, 3).T
        labelled = visible > 0
        if labelled.any():
            dx, dy = points[:, :, 0] - x, points[:, :, 1] - y
        else:  # how far they are from the box made twice as large
            left, top, width, height = objects.boxes[i]
            dx = _beyond(points[:, :, 0], left - width, left + width * 2)
            dy = _beyond(points[:, :, 1], top - height, top + height * 2)
            labelled[:] = True
        error = (dx**2 + dy**2) / variances / (objects.area[i] + np.spacing(1)) / 2
        likeness = np.exp(-np.ascontiguousarray(error[:, labelled]))
        columns.append(likeness.sum(axis=1) / likeness.shape[1])
    return np.stack(columns, axis=1)


def _beyond(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.maximum(0, low - values) + np.maximum(0, values - high)


def _greedy(
    detection: np.ndarray,
    objectives: np.ndarray,
    overlap: np.ndarray,
    pairs: np.ndarray,
    thresholds: np.ndarray,
    outside: np.ndarray,
    crowd: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Let each detection in turn take the free object that it overlaps most.

    Objects that count come before those that are ignored; a crowd is always free; of equal ones
    the last is taken. Detections of different pairs take theirs at the same time.

    Args:
        detection, objectives, overlap: (m,) as of _overlapping; pairs: (n,) of all detections.
        thresholds: (T,) lowest overlaps; outside: (objects, A) who is ignored; crowd: (objects,).

    Returns:
        matched, ignored: (n, A, T) bool; ignored: it took an object that is.
    """
    shape = outside.shape[1], len(thresholds)
    matched = np.zeros((len(pairs), *shape), dtype=bool)
    ignored = np.zeros_like(matched)
    taken = np.zeros((len(outside), *shape), dtype=bool)
    order = np.lexsort((-objectives, -overlap, detection))
    detection, objectives, overlap = detection[order], objectives[order], overlap[order]
    choice = _counted(detection)
    heads = np.flatnonzero(choice == 0)
    counts = np.diff(np.append(heads, len(detection)))
    turns = _counted(pairs[detection[heads]])
    for turn in range(turns.max(initial=-1) + 1):
        now = turns == turn
        begins, lengths = heads[now], counts[now]
        for second_best in (False, True):
            for position in range(lengths.max()):
                rows = begins[lengths > position] + position
                who, what = detection[rows], objectives[rows]
                takes = overlap[rows, None] >= thresholds
                takes = takes[:, None] & (outside[what] == second_best)[:, :, None]
                takes &= ~matched[who] & ~taken[what]
                matched[who] |= takes
                taken[what] |= takes & ~crowd[what, None, None]
                if second_best:
                    ignored[who] |= takes
    return matched, ignored


def blank_sums(params: Params, make: Callable[[tuple[int, ...]], np.ndarray] = np.empty) -> Arrays:
    """The numbers of COCOeval.eval as they are of classes without objects: -1.

    make: an array of that shape, float64.

    Returns:
        precision and scores: (IoU, recall, class, area, number of detections) float64;
        recall: (IoU, class, area, number of detections).
    """
    axes = len(params.iouThrs), len(params.catIds), len(params.areaRng), len(params.maxDets)
    each = axes[0], len(params.recThrs), *axes[1:]
    whole = {"precision": make(each), "recall": make(axes), "scores": make(each)}
    for values in whole.values():
        values.fill(-1)
    return whole


def accumulate(parts: Sequence[Matches], params: Params, whole: Arrays) -> None:
    """Put the numbers of the images of all parts, each in one of them, into `whole`, which is of
    blank_sums. Classes that have no objects in these parts stay as they are there."""
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS}
    rank, image, category = (_narrow(columns[name]) for name in ("rank", "image", "category"))
    order = np.lexsort((rank, image, -columns["score"], category))
    columns = {name: values[order] for name, values in columns.items()}
    objects = sum(part.objects.astype(np.int64) for part in parts)
    axes = len(params.iouThrs), len(params.catIds), len(params.areaRng), len(params.maxDets)
    borders = np.searchsorted(columns["category"], np.arange(axes[1] + 1)).tolist()
    for k in np.flatnonzero(objects.any(axis=0)).tolist():
        rows = slice(borders[k], borders[k + 1])
        ignored = columns["ignored"][rows]
        right = columns["matched"][rows] & ~ignored
        to_find = objects[:, k]
        needed = np.array([_hits_needed(count, params.recThrs) for count in to_find])
        needed = needed.repeat(axes[0], axis=0)
        there = to_find > 0
        for m, limit in enumerate(params.maxDets):
            best = np.flatnonzero(columns["rank"][rows] < limit)
            *curves, hits = _curves(
                right[best], ignored[best], columns["score"][rows][best], needed, params.recThrs
            )
            for name, values in zip(("precision", "scores"), curves, strict=True):
                values = values.reshape(axes[2], axes[0], -1)[there]
                whole[name][:, :, k, there, m] = values.transpose(1, 2, 0)
            hits = hits.reshape(axes[2], axes[0])[there]
            whole["recall"][:, k, there, m] = (hits / to_find[there, None]).T


def _narrow(numbers: np.ndarray) -> np.ndarray:
    """Numbers from 0 on in few bytes each, which are sorted sooner."""
    return numbers.astype(np.min_scalar_type(numbers.max(initial=0)))


def _hits_needed(objects: int, recalls: np.ndarray) -> np.ndarray:
    """How many objects must have been found before the one that brings each recall."""
    return np.searchsorted(np.arange(1, objects + 1) / max(objects, 1), recalls)


def _curves(
    right: np.ndarray,
    ignored: np.ndarray,
    scores: np.ndarray,
    needed: np.ndarray,
    recalls: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision at each recall, in L lanes.

    Args:
        right, ignored: (n, ceil(L / 8)) uint8, bits of the detections, best first; scores: (n,).
        needed: (L, R) of _hits_needed; recalls: (R,).

    Returns:
        (L, R) best precision from each recall on, (L, R) score there, both 0 where it is not
        reached, and (L,) how many detections are right.
    """
    lanes = len(needed)
    # Few detections are right. Of the others only the number between two of these matters.
    busy = np.flatnonzero(right.any(axis=1))
    right = np.unpackbits(right[busy], axis=1, count=lanes)
    hits = right.sum(axis=0, dtype=np.int64)
    lane, row = np.nonzero(np.ascontiguousarray(right.T))
    place = busy[row]
    number = np.arange(len(lane)) - (np.cumsum(hits) - hits)[lane]
    # Bits of eight detections a byte: the bytes up to that of a place, without what is behind it.
    of_eight = np.packbits(np.unpackbits(ignored, axis=1, count=lanes), axis=0)
    through = np.cumsum(np.bitwise_count(of_eight), axis=0, dtype=np.int32)
    behind = of_eight[place // 8, lane] & (0x7F >> place % 8).astype(np.uint8)
    unseen = through[place // 8, lane] - np.bitwise_count(behind)
    seen = place + 1 - unseen
    # Between two hits precision only falls: what it is at the hits is enough.
    precision = np.zeros((lanes, hits.max(initial=0) + 1))
    precision[lane, number] = (number + 1) / (seen + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    score = np.zeros_like(precision)
    score[lane, number] = scores[place]
    reached = needed < hits[:, None]
    index = np.arange(lanes)[:, None], np.where(reached, needed, hits[:, None])
    at_recall = np.where(reached, score[index], 0)
    if len(scores):
        at_recall[:, recalls <= 0] = scores[0]
    return np.where(reached, precision[index], 0), at_recall, hits
