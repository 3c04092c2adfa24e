"""Detections of some images as COCO's result file lists them, and matched with their objects.

What is said of an image depends on no other image: parts of a data set are made anywhere, in any
order, and joined at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
from pycocotools.cocoeval import COCOeval

import utils.boxes as box_utils
import utils.segms as segm_utils
from datasets import coco_scoring
from datasets.coco_matching import Found, Matches, match
from datasets.json_dataset import JsonDataset

_GROUPS_AT_ONCE = 10_000  # of which a file's text is joined, so that it is never all there twice


class ImageFound(NamedTuple):
    """What was found in one image, class by class; small enough to be sent to another process."""

    position: int  # in JsonDataset.image_ids
    labels: np.ndarray  # (n,) int64, ascending
    boxes: np.ndarray  # (n, 5) x1, y1, x2, y2, score
    sizes: list[Sequence[int]] | None  # [height, width] of each mask
    lengths: list[int] | None  # characters of its run lengths
    counts: str | None  # these, as COCO compresses them, one mask's after the other's
    points: list[np.ndarray] | None  # n of (4, K) x, y, logit, probability

    def masks(self) -> Iterator[dict[str, Any]]:
        """The RLE of each mask."""
        ends = accumulate(self.lengths)
        for size, length, end in zip(self.sizes, self.lengths, ends, strict=True):
            yield {"size": size, "counts": self.counts[end - length : end]}


class Part(NamedTuple):
    """Some images' share of a result file and of its scores."""

    matches: Matches | None  # None: there is nothing to score by
    groups: np.ndarray  # (g, 3) int64: label, position of the image, bytes of text
    text: bytes | memoryview  # the results of each group in JSON, one group after the other


def image_found(
    position: int,
    cls_boxes: Sequence,
    cls_segms: Sequence | None = None,
    cls_keyps: Sequence | None = None,
) -> ImageFound:
    """Of the detections of an image by label, as datasets.json_dataset_evaluator says."""
    numbers = [len(boxes) for boxes in cls_boxes]
    there = [boxes for boxes in cls_boxes if len(boxes)]
    sizes = lengths = counts = points = None
    if cls_segms is not None:
        rles = _in_order(cls_segms, numbers)
        sizes = [rle["size"] for rle in rles]
        texts = [
            c if isinstance(c := rle["counts"], str) else _compressed_text(rle) for rle in rles
        ]
        lengths, counts = [len(text) for text in texts], "".join(texts)
    if cls_keyps is not None:
        points = _in_order(cls_keyps, numbers)
    return ImageFound(
        position,
        np.repeat(np.arange(len(numbers)), numbers),
        np.concatenate(there) if there else np.zeros((0, 5), dtype=np.float32),
        sizes,
        lengths,
        counts,
        points,
    )


def _in_order(by_label: Sequence[Sequence], numbers: Sequence[int]) -> list[Any]:
    if [len(of_label) for of_label in by_label] != numbers:
        raise ValueError("there are more or fewer masks or keypoints than boxes")
    return list(chain.from_iterable(by_label))


def _compressed_text(rle: dict[str, Any]) -> str:
    return segm_utils.compress_rle(rle)["counts"].decode("ascii")


@dataclass(frozen=True)
class KindOfResults:
    """Boxes, masks or keypoints of a data set's images: how they are written down and matched."""

    kind: str  # 'bbox', 'segm' or 'keypoints'
    dataset: JsonDataset
    unscored: COCOeval | None  # as of coco_scoring.unscored; None: they are not matched
    written: bool  # whether there will be a result file
    confidence: str  # KRCNN.KEYPOINT_CONFIDENCE

    def part(self, images: Sequence[ImageFound]) -> Part:
        """The results of these images."""
        images = sorted(images, key=lambda image: image.position)
        labels = np.concatenate([image.labels for image in images])
        positions = np.repeat([i.position for i in images], [len(i.labels) for i in images])
        order = np.lexsort((positions, labels))
        labels, positions = labels[order], positions[order]
        boxes = np.concatenate([image.boxes for image in images])[order].astype(np.float64)
        scores = boxes[:, 4]
        if self.kind == "bbox":
            shapes: Any = box_utils.xyxy_to_xywh(boxes[:, :4])
        elif self.kind == "segm":
            rles = list(chain.from_iterable(image.masks() for image in images))
            shapes = [rles[i] for i in order.tolist()]
        else:
            every = list(chain.from_iterable(image.points for image in images))
            shapes, scores = self._keypoints([every[i] for i in order.tolist()], scores)
        groups, text = np.zeros((0, 3), dtype=np.int64), b""
        if self.written and len(labels):
            groups, text = self._written(labels, positions, shapes, scores)
        matches = None
        if self.unscored is not None:
            there = [image.position for image in images]
            matches = self._matches(there, labels, positions, shapes, scores)
        return Part(matches, groups, text)

    def _keypoints(
        self, every: list[np.ndarray], scores: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(n, 3K) x, y, 1 ... and (n,) scores."""
        if not every:
            return np.zeros((0, 0)), scores
        points = np.stack(every)
        triples = np.ones((len(points), points.shape[2], 3))
        triples[:, :, 0], triples[:, :, 1] = points[:, 0], points[:, 1]
        if self.confidence != "bbox":
            row = {"logit": 2, "prob": 3}[self.confidence]
            scores = np.ascontiguousarray(points[:, row]).mean(axis=1).astype(np.float64)
        return triples.reshape(len(points), -1), scores

    def _written(
        self, labels: np.ndarray, positions: np.ndarray, shapes: Any, scores: np.ndarray
    ) -> tuple[np.ndarray, bytes]:
        """groups and text of a Part."""
        if self.kind == "segm":
            texts = []
            for rle in shapes:
                (height, width), counts = rle["size"], json.dumps(rle["counts"])
                texts.append(f'{{"size": [{height}, {width}], "counts": {counts}}}')
        else:
            texts = [f"[{row}]" for row in json.dumps(shapes.tolist())[2:-2].split("], [")]
        key = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[self.kind]
        texts = [
            f'{{"{key}": {text}, "score": {score}'
            for text, score in zip(
                texts, json.dumps(scores.tolist())[1:-1].split(", "), strict=True
            )
        ]
        new = (np.diff(labels, prepend=-1) != 0) | (np.diff(positions, prepend=-1) != 0)
        starts = np.flatnonzero(new)
        ends = np.append(starts[1:], len(labels)).tolist()
        category_ids, image_ids = self.dataset.contiguous_category_id_to_json_id, {}
        pieces = []
        for start, end, label, position in zip(
            starts.tolist(), ends, labels[starts].tolist(), positions[starts].tolist(), strict=True
        ):
            if position not in image_ids:
                image_ids[position] = json.dumps(self.dataset.image_ids[position])
            ids = f', "image_id": {image_ids[position]}, "category_id": {category_ids[label]}}}'
            pieces.append(f"{ids}, ".join(texts[start:end]) + ids)
        lengths = [len(piece) for piece in pieces]  # in bytes too: json writes ASCII
        groups = np.stack((labels[starts], positions[starts], lengths), axis=1)
        return groups, "".join(pieces).encode("ascii")

    def _matches(
        self,
        images: Sequence[int],
        labels: np.ndarray,
        positions: np.ndarray,
        shapes: Any,
        scores: np.ndarray,
    ) -> Matches:
        params = self.unscored.params
        number_of = {category: k for k, category in enumerate(params.catIds)}
        by_label = np.full(self.dataset.num_classes, -1)
        for label, category in self.dataset.contiguous_category_id_to_json_id.items():
            by_label[label] = number_of.get(category, -1)  # keypoints: not all are scored
        categories = by_label[labels]
        rows = np.flatnonzero(categories >= 0)
        if len(rows) < len(labels):
            shapes = shapes[rows]
        elif self.kind == "keypoints" and not len(labels):
            shapes = shapes.reshape(0, 3 * len(params.kpt_oks_sigmas))
        found = Found(
            image=positions[rows],
            category=categories[rows],
            area=coco_scoring.areas_of(shapes, self.kind),
            shapes=shapes,
            score=scores[rows],
        )
        objects = coco_scoring.objects_of(self.unscored.cocoGt, images, self.kind, params)
        return match(objects, found, self.kind, params)


def joined_text(parts: Sequence[Part]) -> Iterator[bytes]:
    """The bytes of the result file, in pieces: by class, then by image, as one JSON list."""
    groups = np.concatenate([part.groups for part in parts])
    source = np.repeat(np.arange(len(parts)), [len(part.groups) for part in parts])
    ends = np.concatenate([np.cumsum(part.groups[:, 2]) for part in parts])
    order = np.lexsort((groups[:, 1], groups[:, 0]))
    texts = [memoryview(part.text) for part in parts]
    between = b"["
    for begin in range(0, len(order), _GROUPS_AT_ONCE):
        rows = order[begin : begin + _GROUPS_AT_ONCE]
        places = zip(
            source[rows].tolist(),
            (ends[rows] - groups[rows, 2]).tolist(),
            ends[rows].tolist(),
            strict=True,
        )
        yield between + b", ".join([texts[i][start:end] for i, start, end in places])
        between = b", "
    yield b"]" if len(order) else b"[]"
