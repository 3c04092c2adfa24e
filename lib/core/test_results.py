"""Detections of a data set, their files, and the part files from which a test goes on.

`detections.pkl` is Detectron's file. `detection_range_{a}_{b}.pkl` is the same for the images a to
b - 1, with two entries more: which of them are done, and a fingerprint of what they depend on.
Part files of proposals (core.rpn_generator) work alike.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from torch import nn

from core.config import cfg
from core.config_yaml import load_yaml
from core.errors import UserError
from core.test import ClassBoxes, ClassKeyps, ClassSegms
from datasets.entry import RoidbEntry
from datasets.json_dataset import JsonDataset
from utils.run_dir import plain
from utils.weights import NUMPY_FROM_BUFFER, atomic_write, unpickle_data

logger = logging.getLogger(__name__)

DETECTIONS_FILE = "detections.pkl"
SECONDS_BETWEEN_PARTS = 60.0
# What a detection does not depend on.
_NEUTRAL_KEYS = ("OUTPUT_DIR", "DATA_DIR", "DATA_LOADER", "NUM_GPUS")
_FOLDER_KEYS = ("ROOT_DIR", "DATA_DIR", "OUTPUT_DIR")
_NO_BOXES, _NOTHING = np.zeros((0, 5), dtype=np.float32), []
_KINDS = ("all_boxes", "all_segms", "all_keyps")


@dataclass
class DatasetResults:
    """Detections of a data set's images as Detectron nests them: `all_boxes[class][image]`."""

    part_stem: ClassVar[str] = "detection"

    all_boxes: list[list[np.ndarray | list]]
    all_segms: list[list[list[dict[str, Any]]]]
    all_keyps: list[list[list]]

    @classmethod
    def empty(cls, num_classes: int, num_images: int) -> DatasetResults:
        """Nothing detected yet: every entry is [], one for all; it is replaced, never filled."""
        return cls(*([[_NOTHING] * num_images for _ in range(num_classes)] for _ in range(3)))

    @classmethod
    def blank(cls, num_images: int) -> DatasetResults:
        """Nothing detected yet, by the model that the config describes."""
        return cls.empty(cfg.MODEL.NUM_CLASSES, num_images)

    @staticmethod
    def load(path: str | Path) -> tuple[DatasetResults, dict[str, Any]]:
        """load_detections()."""
        return load_detections(path)

    @property
    def num_images(self) -> int:
        return len(self.all_boxes[0])

    def extend(
        self,
        image: int,
        cls_boxes: ClassBoxes,
        cls_segms: ClassSegms | None,
        cls_keyps: ClassKeyps | None,
    ) -> None:
        """Put in what was detected in one image; class 0, the background, stays []."""
        for j in range(1, len(cls_boxes)):
            # Most classes are in few images: what is empty is one for all, so that the file is
            # small and soon written.
            self.all_boxes[j][image] = cls_boxes[j] if len(cls_boxes[j]) else _NO_BOXES
            if cls_segms is not None:
                self.all_segms[j][image] = cls_segms[j] or _NOTHING
            if cls_keyps is not None:
                self.all_keyps[j][image] = cls_keyps[j] or _NOTHING

    def of_image(self, image: int) -> tuple[ClassBoxes, ClassSegms, ClassKeyps]:
        """What was detected in one image, by class."""
        boxes, segms, keyps = (
            [of_class[image] for of_class in getattr(self, kind)] for kind in _KINDS
        )
        return boxes, segms, keyps

    def copy_images(self, other: DatasetResults, pairs: Sequence[tuple[int, int]]) -> None:
        """Take over images of `other`: pairs of (index here, index there)."""
        for kind in _KINDS:
            for mine, theirs in zip(getattr(self, kind), getattr(other, kind), strict=True):
                for here, there in pairs:
                    mine[here] = theirs[there]

    def save(self, path: Path, **extra: Any) -> None:
        """Write Detectron's detections file: whole, or not at all."""
        content = {kind: getattr(self, kind) for kind in _KINDS}
        content["cfg"] = config_text()
        with atomic_write(path) as file:
            pickler = pickle.Pickler(file, pickle.HIGHEST_PROTOCOL)
            pickler.dispatch_table = {np.ndarray: _reduced}
            pickler.dump(content | extra)


def _reduced(array: np.ndarray) -> tuple:
    """What numpy tells pickle of an array, in half the time: there are 50,000 in 1,000 images."""
    if array.flags.c_contiguous and not array.dtype.hasobject:
        return NUMPY_FROM_BUFFER, (pickle.PickleBuffer(array), array.dtype, array.shape, "C")
    return array.__reduce_ex__(5)


def config_text() -> str:
    """The config as result files keep it."""
    # libyaml, where it is there, writes the same in a fifth of the time (it may break long lines
    # that are not ASCII elsewhere).
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return yaml.dump(plain(cfg), Dumper=dumper, sort_keys=False)


def load_detections(path: str | Path) -> tuple[DatasetResults, dict[str, Any]]:
    """A detections file of this project or of Detectron, and its other entries (`cfg`, as text).

    Nothing in the file is run.

    Raises:
        UserError: the file is missing, damaged, or no such file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = unpickle_data(file)
    except OSError as error:
        raise UserError(f"cannot read detections {path}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged or no detections file ({reason})") from error
    if not isinstance(content, dict) or not _is_nested(content.get("all_boxes")):
        raise UserError(f"{path} is no detections file: it has no all_boxes[class][image]")
    shape = [len(of_class) for of_class in content["all_boxes"]]
    kinds = []
    for kind in _KINDS:
        # Detectron leaves out what a model does not have, or writes None.
        values = content.get(kind) or [[[] for _ in range(n)] for n in shape]
        if not _is_nested(values) or [len(of_class) for of_class in values] != shape:
            raise UserError(f"{path} is damaged: {kind} has other images than all_boxes")
        kinds.append(values)
    rest = {key: value for key, value in content.items() if key not in _KINDS}
    return DatasetResults(*kinds), rest


def stored_config(path: str | Path) -> dict[str, Any]:
    """The config that a detections file was made under, without the folders of that machine.

    Raises:
        UserError: the file is unusable, or has no config.
    """
    _, rest = load_detections(path)
    try:
        config = load_yaml(rest.get("cfg") or "")
    except yaml.YAMLError as error:
        raise UserError(
            f"the config in {path} is not readable ({' '.join(str(error).split())}): name one "
            "with --cfg"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{path} has no config in it: name one with --cfg")
    return {key: value for key, value in config.items() if key not in _FOLDER_KEYS}


def _is_nested(values: Any) -> bool:
    if not isinstance(values, list) or not values:
        return False
    lists = all(isinstance(of_class, list) for of_class in values)
    return lists and len({len(of_class) for of_class in values}) == 1


class PartFile:
    """The results of a range of images while they come in, kept on disk now and then.

    What earlier tests of the same model, config and images have left in the folder, in whatever
    ranges, is taken over. kind: DatasetResults, or core.rpn_generator.ProposalResults.
    fingerprint: makes it; called only when a part file is read or written.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        end: int,
        fingerprint: Callable[[], str],
        kind: type = DatasetResults,
    ) -> None:
        self.start, self._make_fingerprint = start, fingerprint
        self.path = part_path(folder, start, end, kind)
        self._kind = kind
        self.done = np.zeros(end - start, dtype=bool)
        self._saved = time.monotonic()
        self._taken: list[Path] = []
        for path, first, last in part_files(folder, kind):
            if max(first, start) < min(last, end):
                self._take_over(path, first)

    @cached_property
    def results(self) -> Any:
        """Of all images of the range. Empty ones of many images take a moment to make: it is one in
        which the device works, if none have been taken over."""
        return self._kind.blank(len(self.done))

    @cached_property
    def fingerprint(self) -> str:
        """Of this test; it takes a moment to make."""
        return self._make_fingerprint()

    @property
    def remaining(self) -> list[int]:
        """Images, counted from the start of the range, that are still to be tested."""
        return np.flatnonzero(~self.done).tolist()

    def add(self, image: int, *found: Any) -> None:
        """Put in what was found in an image, as `extend` of the results takes it."""
        self.results.extend(image, *found)
        self.done[image] = True
        if time.monotonic() - self._saved >= SECONDS_BETWEEN_PARTS:
            self.save()

    def save(self) -> None:
        """Write the part file."""
        self.results.save(self.path, done=self.done, fingerprint=self.fingerprint)
        self._saved = time.monotonic()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What is done when the block is interrupted is written, for the next test to go on."""
        try:
            yield
        except BaseException:
            if self.done.any():
                self.save()
                logger.info("kept what is done in %s: the same command goes on", self.path)
            raise

    def finish(self, target: Path | None) -> None:
        """Everything is done: write the results to `target` and delete the part file and those it
        took over; None: it is to stay a part."""
        if target is None:
            self.save()
        else:
            self.results.save(target)
            for path in {self.path, *self._taken}:
                path.unlink(missing_ok=True)
        logger.info("wrote %s", (target or self.path).resolve())

    def _take_over(self, path: Path, first: int) -> None:
        try:
            other, rest = self._kind.load(path)
        except UserError as error:
            logger.warning("%s; it is ignored", error)
            return
        if rest.get("fingerprint") != self.fingerprint:
            logger.warning("%s is of another model, config or data set; it is ignored", path.name)
            return
        self._taken.append(path)
        theirs = np.flatnonzero(rest["done"]) + first - self.start
        theirs = theirs[(theirs >= 0) & (theirs < len(self.done))]
        self.results.copy_images(other, [(i, i - first + self.start) for i in theirs.tolist()])
        self.done[theirs] = True


def join_parts(folder: Path, ranges: Sequence[tuple[int, int]], kind: type = DatasetResults) -> Any:
    """The results (of that kind) of complete part files as one; the files of that test are deleted.

    ranges: of the files, one after the other from the first image to the last.

    Raises:
        UserError: a file is missing or incomplete, or they are not of one test.
    """
    files = [part_path(folder, *r, kind) for r in ranges]
    parts = [kind.load(file) for file in files]
    fingerprints = {rest.get("fingerprint") for _, rest in parts}
    if len(fingerprints) > 1 or not all(np.all(rest.get("done", False)) for _, rest in parts):
        raise UserError(f"the part files in {folder} are not of one test: delete them, test again")
    joined = kind.blank(ranges[-1][1])
    for (part, _), (start, end) in zip(parts, ranges, strict=True):
        joined.copy_images(part, [(i, i - start) for i in range(start, end)])
    for path, _, _ in part_files(folder, kind):
        if path in files or _fingerprint_of(path, kind) in fingerprints:
            path.unlink()
    return joined


def _fingerprint_of(path: Path, kind: type) -> str | None:
    try:
        return kind.load(path)[1].get("fingerprint")
    except UserError:  # a damaged file
        return None


def check_range(dataset: JsonDataset, start: int, end: int) -> None:
    """Raise UserError unless start .. end - 1 are images of the data set."""
    count = len(dataset.image_ids)
    if not 0 <= start < end <= count:
        raise UserError(
            f"--range {start} {end} is not part of {dataset.name}: it has {count} images, "
            f"so START may be 0 to {count - 1} and END at most {count}."
        )


def split_range(count: int, parts: int) -> list[tuple[int, int]]:
    """0 .. count - 1 as contiguous ranges (first, one past the last), at most `parts`, none
    empty."""
    pieces = np.array_split(np.arange(count), parts)
    return [(int(piece[0]), int(piece[-1]) + 1) for piece in pieces if len(piece)]


def part_path(folder: Path, start: int, end: int, kind: type = DatasetResults) -> Path:
    """Where the results of the images start .. end - 1 of a data set go."""
    return folder / f"{kind.part_stem}_range_{start}_{end}.pkl"


def part_files(folder: Path, kind: type = DatasetResults) -> list[tuple[Path, int, int]]:
    """The part files in a folder, each with its range."""
    found = []
    for path in sorted(folder.glob(f"{kind.part_stem}_range_*.pkl")):
        match = re.fullmatch(rf"{kind.part_stem}_range_(\d+)_(\d+)\.pkl", path.name)
        if match:
            found.append((path, int(match[1]), int(match[2])))
    return found


def test_fingerprint(model: nn.Module, roidb: Sequence[RoidbEntry], **options: Any) -> str:
    """A text that differs between tests that may give different detections.

    It covers the weights, the config, the images' ids and sizes, given proposals, and `options`.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(values.numpy())
    settings = {key: value for key, value in plain(cfg).items() if key not in _NEUTRAL_KEYS}
    images = [(entry["id"], entry["height"], entry["width"]) for entry in roidb]
    digest.update(repr((settings, images, sorted(options.items()))).encode())
    for entry in roidb:
        digest.update(entry["boxes"].tobytes())
    return digest.hexdigest()


test_fingerprint.__test__ = False  # nor is this a test
