"""Loading COCO-format annotation files: quietly, checked, with optional fields filled in."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import time
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from core.errors import UserError
from datasets import voc_xml

logger = logging.getLogger(__name__)

_SIDES = ("height", "width")
_LARGE_FILE = 50 * 2**20  # bytes; parsing a larger file takes seconds and is worth a log line
_BLOCK = 2**24  # bytes read at a time


def load_annotations(path: Path) -> COCO:
    """The annotations of a COCO-format JSON file, parsed once per process and state of the file;
    or of a split of Pascal VOC's layout (datasets.voc_xml), in the same form.

    Missing `iscrowd` (0), `area` (of the box), `segmentation` ([]) are filled in. Annotation ids
    are renumbered from 1 if they are missing, repeated, or zero (pycocotools' evaluation takes a
    match with id 0 for no match). A file without `annotations` (COCO's image_info files) is fine.
    Raises UserError naming the file if it is missing, not JSON, or not in COCO's format.
    """
    path = path.resolve()
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"annotation file {path} cannot be read ({error.strerror})") from error
    if voc_xml.is_split_file(path):
        return _load(path, voc_xml.version(path))
    # The change time moves even where a tool sets the modification time back.
    return _load(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))


@functools.lru_cache(maxsize=4)
def _load(path: Path, version: tuple[int, ...]) -> COCO:
    start = time.perf_counter()
    data = voc_xml.load_voc(path) if voc_xml.is_split_file(path) else read_json(path)
    _check(data, path)
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco.createIndex()
    logger.debug("Loaded %s in %.1f s", path, time.perf_counter() - start)
    return coco


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError naming it if that is impossible."""
    size = path.stat().st_size if path.is_file() else 0
    if size > _LARGE_FILE:
        logger.info("Loading annotations %s (%d MB)", path, size // 2**20)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"annotation file {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"annotation file {path} is not valid JSON ({error})") from error


def content_blocks(path: Path) -> Iterator[bytes]:
    """All that an annotation file says, in blocks of bytes: equal only for equal annotations."""
    if voc_xml.is_split_file(path):
        yield json.dumps(load_annotations(path).dataset).encode()
        return
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _check(data: Any, path: Path) -> None:
    """Raise UserError for what is not COCO's format; fill in optional fields in place."""
    if not isinstance(data, dict):
        raise UserError(f"annotation file {path} is not in COCO's format: no JSON object on top")
    for key in ("images", "categories"):
        if not isinstance(data.get(key), list):
            raise UserError(f"annotation file {path} is not in COCO's format: no list {key!r}")
    if not data["images"]:
        raise UserError(f"annotation file {path} lists no images; name one that does")
    _require(data["images"], ("id", "file_name", "height", "width"), "image", path)
    _require(data["categories"], ("id", "name"), "category", path)
    _require_own_ids(data["images"], "image", "file_name", path)
    _require_own_ids(data["categories"], "category", "name", path)
    for image in data["images"]:
        if not all(isinstance(image[side], int) and image[side] > 0 for side in _SIDES):
            raise UserError(
                f"annotation file {path}: image {image['file_name']} has height {image['height']} "
                f"and width {image['width']}; give its size in whole pixels"
            )
    annotations = data.get("annotations", [])
    _require(annotations, ("image_id", "category_id", "bbox"), "annotation", path)

    categories = {category["id"] for category in data["categories"]}
    for position, ann in enumerate(annotations):
        label = f"annotation {ann.get('id', f'number {position}')}"
        if ann["category_id"] not in categories:
            raise UserError(
                f"annotation file {path}: {label} has category_id {ann['category_id']}, "
                "which 'categories' does not list; add the category or remove the annotation"
            )
        bbox = ann["bbox"]
        is_box = isinstance(bbox, list) and len(bbox) == 4
        if not is_box or not all(isinstance(v, (int, float)) and abs(v) < inf for v in bbox):
            raise UserError(f"annotation file {path}: bbox of {label} is not [x, y, width, height]")
        ann.setdefault("iscrowd", 0)
        if ann.get("segmentation") is None:
            ann["segmentation"] = []
        if "area" not in ann:
            ann["area"] = bbox[2] * bbox[3]

    ids = {ann.get("id") for ann in annotations}
    if annotations and (len(ids) < len(annotations) or 0 in ids or None in ids):
        logger.info("Annotation ids of %s are missing, repeated or 0: renumbered from 1", path)
        for position, ann in enumerate(annotations):
            ann["id"] = position + 1


def _require_own_ids(items: list[dict], what: str, name: str, path: Path) -> None:
    first: dict[Any, dict] = {}
    for item in items:
        other = first.setdefault(item["id"], item)
        if other is not item:
            raise UserError(
                f"annotation file {path} lists {what} id {item['id']} twice, for {other[name]} and "
                f"{item[name]}; give each {what} an id of its own"
            )


def _require(items: list, keys: tuple[str, ...], what: str, path: Path) -> None:
    for position, item in enumerate(items):
        for key in keys:
            if not isinstance(item, dict) or key not in item:
                raise UserError(
                    f"annotation file {path} is not in COCO's format: "
                    f"{what} number {position} has no {key!r}"
                )
