"""Pascal VOC's layout (Annotations/*.xml, ImageSets/Main/*.txt, JPEGImages/) as COCO's format.

A split is named by its file in ImageSets/Main. Classes are the names of all XML files of the
folder, sorted: the same in every split, and for VOC itself its usual order.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring
from PIL import Image

from core.errors import UserError

logger = logging.getLogger(__name__)

_SPLITS = Path("ImageSets", "Main")
_PARTS = ("Annotations", str(_SPLITS), "JPEGImages")
_MANY_FILES = 2000  # parsing more takes seconds and is worth a log line


@dataclass(frozen=True)
class VocObject:
    """An object of an XML file; the box is xyxy, counted from 1, both ends inside."""

    name: str
    box: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class VocImage:
    """What an XML file says; the size is (0, 0) where it says none."""

    height: int
    width: int
    objects: tuple[VocObject, ...]


def is_voc_folder(folder: Path) -> bool:
    """Whether a folder has VOC's layout."""
    return all((folder / part).is_dir() for part in _PARTS)


def is_split_file(path: Path) -> bool:
    """Whether an annotation file is a split of VOC's layout (and not COCO's JSON)."""
    return path.suffix == ".txt" and path.parts[-3:-1] == _SPLITS.parts


def split_file(folder: Path, split: str) -> Path:
    """The file of a split. Raises UserError, with the splits there are, if there is none."""
    path = folder / _SPLITS / f"{split}.txt"
    if not path.is_file():
        there = ", ".join(split_names(folder)) or "none"
        raise UserError(f"{folder} has no split {split!r}: there is no {path} (splits: {there})")
    return path


def split_names(folder: Path) -> list[str]:
    """The splits of a folder of VOC's layout, without its files of single classes."""
    names = sorted(path.stem for path in (folder / _SPLITS).glob("*.txt"))
    return [n for n in names if not n.endswith(("_train", "_val", "_trainval", "_test"))]


def load_voc(path: Path) -> dict[str, Any]:
    """A split as COCO's JSON: a dict of images, annotations and categories.

    Images are in the split's order, which is also that of their ids: VOC's own numbers (000005 is
    5, 2007_000027 is 2007000027) if all names are such and ascend, else 1, 2, ... Boxes become
    0-based [x, y, width, height], cut to the image. Objects marked difficult have `difficult` and
    `ignore` 1 (training leaves them out, as with Detectron's JSON files), others 0.
    Raises UserError naming the file that is missing or wrong.
    """
    folder = path.parents[len(_SPLITS.parts)]
    stems = split_stems(path)
    split = split_images(path)
    files = _annotations(folder, _state(folder / "Annotations"))
    names = sorted({obj.name for image in files.values() for obj in image.objects})
    label = {name: i + 1 for i, name in enumerate(names)}
    image_names = {Path(name).stem: name for name in sorted(os.listdir(folder / "JPEGImages"))}
    images, annotations = [], []
    for image_id, stem, image in zip(image_ids(stems), stems, split, strict=True):
        file_name = image_names.get(stem, f"{stem}.jpg")
        height, width = _size(image, folder / "JPEGImages" / file_name)
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for obj in image.objects:
            x, y, w, h = _coco_box(obj.box, height, width)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label[obj.name],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [],
                    "difficult": int(obj.difficult),
                    "ignore": int(obj.difficult),
                }
            )
    categories = [{"id": number, "name": name} for name, number in label.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def split_images(path: Path) -> list[VocImage]:
    """What the XML files of a split's images say, in its order. Raises UserError as load_voc."""
    folder = path.parents[len(_SPLITS.parts)]
    stems = split_stems(path)
    files = _annotations(folder, _state(folder / "Annotations"))
    missing = [stem for stem in stems if stem not in files]
    if missing:
        raise UserError(
            f"{folder / 'Annotations' / missing[0]}.xml, listed in {path}, does not exist "
            f"({len(missing)} of {len(stems)} are missing); complete the folder"
        )
    return [files[stem] for stem in stems]


def version(path: Path) -> tuple[int, ...]:
    """Changes when the split's file or a file of its annotations does."""
    stat = path.stat()
    folder = path.parents[len(_SPLITS.parts)] / "Annotations"
    return (stat.st_size, stat.st_mtime_ns, *_state(folder))


def split_stems(path: Path) -> list[str]:
    """The names (without suffix) of a split's images, in order. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"list of images {path} cannot be read ({error})") from error
    # Files of single classes have a second column.
    stems = [line.split()[0] for line in lines if line.strip()]
    repeated = len(stems) - len(set(stems))
    if repeated or not stems:
        what = f"lists {repeated} images twice" if stems else "lists no image"
        raise UserError(f"list of images {path} {what}; correct it")
    return stems


def image_ids(stems: Sequence[str]) -> list[int]:
    """Ascending ids of images by name, see `load_voc`."""
    if all(re.fullmatch(r"(\d{4}_)?\d{6}", stem) for stem in stems):
        ids = [int(stem.replace("_", "")) for stem in stems]
        if all(a < b for a, b in zip([0, *ids], ids, strict=False)):
            return ids
    return list(range(1, len(stems) + 1))


def parse_voc_file(path: Path) -> VocImage:
    """What an XML file says of its image. Raises UserError naming the file; entities and document
    types, which could make a small file huge, are refused."""
    try:
        root = fromstring(path.read_bytes(), forbid_dtd=True)
    except OSError as error:
        raise UserError(f"annotation file {path} cannot be read ({error.strerror})") from error
    except (ParseError, ValueError) as error:
        what = "has a document type" if isinstance(error, DefusedXmlException) else "is not XML"
        raise UserError(f"annotation file {path} {what} ({error})") from error
    height, width = (_number(root, f"size/{side}", path, 0) for side in ("height", "width"))
    objects = []
    for element in root.findall("object"):
        name = (element.findtext("name") or "").strip()
        if not name:
            raise UserError(f"annotation file {path}: an object has no name")
        xyxy = (_number(element, f"bndbox/{k}", path) for k in ("xmin", "ymin", "xmax", "ymax"))
        difficult = _number(element, "difficult", path, 0) == 1
        objects.append(VocObject(name, tuple(xyxy), difficult))
    return VocImage(int(height), int(width), tuple(objects))


def _number(element: Element, key: str, path: Path, default: float | None = None) -> float:
    text = element.findtext(key)
    if (text is None or not text.strip()) and default is not None:
        return default
    try:
        value = float(text or "")
    except ValueError as error:
        name = element.findtext("name") if element.tag == "object" else element.tag
        raise UserError(
            f"annotation file {path}: {key} of {name} is {text!r}, not a number"
        ) from error
    return int(value) if value.is_integer() else value


def _state(folder: Path) -> tuple[int, int, int]:
    """Number, bytes and last change of the XML files of a folder."""
    stats = [e.stat() for e in os.scandir(folder) if e.name.endswith(".xml")]
    return len(stats), sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)


@functools.lru_cache(maxsize=2)
def _annotations(folder: Path, state: tuple[int, int, int]) -> dict[str, VocImage]:
    """All XML files of a folder by name; those of no split too, as classes come from all."""
    start = time.perf_counter()
    if state[0] > _MANY_FILES:
        logger.info("Reading %d annotation files of %s", state[0], folder)
    paths = sorted((folder / "Annotations").glob("*.xml"))
    files = {path.stem: parse_voc_file(path) for path in paths}
    logger.debug("Read %d XML files in %.1f s", len(files), time.perf_counter() - start)
    return files


def _size(image: VocImage, path: Path) -> tuple[int, int]:
    """(height, width) as the XML says, or else the image file."""
    if image.height > 0 and image.width > 0:
        return image.height, image.width
    try:
        with Image.open(path) as file:
            width, height = file.size
    except OSError as error:
        raise UserError(
            f"the annotations of {path} state no size, and it cannot be read ({error})"
        ) from error
    return height, width


def _coco_box(box: tuple[float, float, float, float], height: int, width: int) -> list[float]:
    """[x, y, w, h] counted from 0, cut to the image unless it is wholly outside (an error that
    is reported where boxes are checked)."""
    x1, y1, x2, y2 = box[0] - 1, box[1] - 1, box[2], box[3]  # pixel edges
    if x1 < width and y1 < height and x2 > 0 and y2 > 0:
        x1, x2 = (min(max(x, 0), width) for x in (x1, x2))
        y1, y2 = (min(max(y, 0), height) for y in (y1, y2))
    return [x1, y1, x2 - x1, y2 - y1]
