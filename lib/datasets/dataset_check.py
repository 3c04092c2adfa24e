"""A data set looked at as a whole: annotations, image files, statistics, a page of samples."""

from __future__ import annotations

import collections
import hashlib
import io
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from core.errors import UserError
from datasets import voc_xml
from datasets.annotation_check import (
    ERROR,
    WARNING,
    Findings,
    check_annotations,
    object_statistics,
)
from datasets.annotations import read_json
from datasets.dataset_catalog import find_splits, get_entry
from roi_data.loader_workers import START_METHOD
from utils.image import decode_image, read_file
from utils.progress import Progress
from utils.vis import draw
from utils.vis_layout import Layout, font, lay_out

_CELL = (480, 360)  # width and height of a sample on its page
_COLUMNS = 4
_MARGIN = 8


@dataclass
class SplitCheck:
    """What is known of one split: usable entries, image files, findings."""

    name: str
    annotation_file: Path
    image_dir: Path
    prefix: str
    data: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)
    digests: dict[str, str] = field(default_factory=dict)  # file name -> hash of its content

    @property
    def statistics(self) -> dict[str, Any]:
        return object_statistics(self.data)

    def path(self, file_name: str) -> str:
        return str(self.image_dir / (self.prefix + file_name))


@dataclass(frozen=True)
class ImageFacts:
    """What a file turned out to be; problem is '' if it can be trained on."""

    problem: str
    detail: str = ""
    damage: str = ""
    digest: str = ""


def check_dataset(spec: str, workers: int) -> list[SplitCheck]:
    """Check every split that `--dataset` names, and the splits against each other.

    workers: processes that read images; 0 reads none. Raises UserError if the data set itself or
    its annotation file is not there.
    """
    names = dict.fromkeys(name for part in find_splits(spec) for name in part)
    splits = []
    for name in names:
        entry = get_entry(name)
        check = SplitCheck(name, entry.annotation_file(), *entry.image_dir())
        check.data = check_annotations(_read(check), check.findings)
        splits.append(check)
    if workers:
        _check_files(splits, workers)
    _compare(splits)
    return splits


def _read(check: SplitCheck) -> Any:
    """The annotations; of VOC's layout only if each file of the split can be read."""
    path = check.annotation_file
    try:
        if not voc_xml.is_split_file(path):
            return read_json(path)
        return voc_xml.load_voc(path)
    except UserError as error:
        problems = [str(error)]
    if voc_xml.is_split_file(path):
        problems = list(_bad_xml_files(path)) or problems
    for problem in problems:
        check.findings.add(ERROR, "annotation files that cannot be used", problem)
    return {"images": [], "categories": [], "annotations": []}


def _bad_xml_files(path: Path) -> Iterator[str]:
    for file in sorted((path.parents[2] / "Annotations").glob("*.xml")):
        try:
            voc_xml.parse_voc_file(file)
        except UserError as error:
            yield str(error)


def inspect_image(path: str, height: int, width: int) -> ImageFacts:
    """Read and decode an image file whose annotations state a size."""
    try:
        data = read_file(path)
    except UserError as error:
        missing = not Path(path).exists()
        return ImageFacts("missing image files" if missing else "unreadable images", str(error))
    digest = hashlib.sha256(data).hexdigest()
    image = decode_image(path, data)
    if image is None:
        return ImageFacts("images that cannot be decoded", f"{len(data)} bytes", digest=digest)
    if image.shape[:2] != (height, width):
        detail = f"{image.shape[1]} x {image.shape[0]}, annotated {width} x {height}"
        return ImageFacts("images of another size than annotated", detail, digest=digest)
    return ImageFacts("", damage=_damage(data), digest=digest)


def _damage(data: bytes) -> str:
    """What a stricter reader than OpenCV says of a file."""
    try:
        with Image.open(io.BytesIO(data)) as file:
            file.load()
    except Image.UnidentifiedImageError:
        return ""  # a format that it does not know
    except (OSError, SyntaxError, ValueError) as error:
        return str(error)
    return ""


def _inspect(job: tuple[str, int, int]) -> ImageFacts:
    return inspect_image(*job)


def _check_files(splits: Sequence[SplitCheck], workers: int) -> None:
    jobs = [
        (check, name, (check.path(name), image["height"], image["width"]))
        for check in splits
        for image in check.data["images"]
        for name in (image["file_name"],)
    ]
    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context(START_METHOD)) as pool,
        Progress(len(jobs)) as progress,
    ):
        facts = pool.map(_inspect, [job for _, _, job in jobs], chunksize=8)
        for (check, file_name, _), found in zip(jobs, facts, strict=True):
            if found.problem:
                check.findings.add(ERROR, found.problem, f"{file_name} ({found.detail})")
            elif found.damage:
                check.findings.add(WARNING, "damaged images", f"{file_name} ({found.damage})")
            if found.digest:
                check.digests[file_name] = found.digest
            progress.advance()


def _compare(splits: Sequence[SplitCheck]) -> None:
    """Equal files within and between splits; classes that differ."""
    for check in splits:
        by_content = collections.defaultdict(list)
        for file_name, digest in check.digests.items():
            by_content[digest].append(file_name)
        for names in by_content.values():
            if len(names) > 1:
                check.findings.add(WARNING, "images given twice (equal files)", ", ".join(names))
    first = splits[0]
    contents = {digest: name for name, digest in first.digests.items()}
    classes = [c["name"] for c in first.data["categories"]]
    for check in splits[1:]:
        for name, digest in check.digests.items():
            if digest in contents:
                where = f"{name} is {contents[digest]} of {first.name}"
                check.findings.add(ERROR, f"images that are in {first.name} too", where)
        if [c["name"] for c in check.data["categories"]] != classes:
            check.findings.add(ERROR, f"other categories than {first.name}", "the lists differ")


def report_lines(check: SplitCheck) -> Iterator[str]:
    """A split's statistics and findings as text."""
    s = check.statistics
    yield f"{check.name}: {check.annotation_file}"
    yield (
        f"  {s['images']} images ({s['images_without_objects']} without objects), {s['objects']} "
        f"objects (at most {s['most_in_one_image']} in one image): {s['with_mask']} with a mask, "
        f"{s['with_keypoints']} with keypoints, {s['crowds']} crowd, {s['difficult']} difficult"
    )
    for what in ("shorter_side", "longer_side", "width_over_height"):
        if s[what]:
            low, middle, high = (f"{v:.4g}" for v in s[what])
            yield f"  {what.replace('_', ' ')}: {low} to {high}, median {middle}"
    small, medium, large = s["sizes"].values()
    yield f"  objects: {small} small (below 32 x 32), {medium} medium, {large} large (over 96 x 96)"
    width = max((len(name) for name in s["classes"]), default=5)
    yield f"  {'class':<{width}}  objects   images"
    for name, c in sorted(s["classes"].items(), key=lambda item: -item[1]["objects"]):
        yield f"  {name:<{width}} {c['objects']:8d} {c['images']:8d}"
    findings = check.findings.sorted()
    if not findings:
        yield "  nothing is wrong"
    for f in findings:
        yield f"  {f.level.upper()}: {f.count} {f.what}"
        yield from (f"      {example}" for example in f.examples)
        if f.count > len(f.examples):
            yield f"      and {f.count - len(f.examples)} more"


def sample_page(check: SplitCheck, count: int, seed: int = 0) -> np.ndarray | None:
    """A page of a split's images with their ground truth: uint8 BGR; None without usable images.

    Images with objects are drawn at random; the others follow if there are too few.
    """
    objects = collections.defaultdict(list)
    for obj in check.data["annotations"]:
        objects[obj["image_id"]].append(obj)
    images = check.data["images"]
    order = np.random.RandomState(seed).permutation(len(images)).tolist()
    order.sort(key=lambda i: not objects.get(images[i]["id"]))
    names = {c["id"]: c["name"] for c in check.data["categories"]}
    cells = []
    for i in order:
        cell = _cell(check, images[i], objects[images[i]["id"]], names)
        if cell is not None:
            cells.append(cell)
        if len(cells) == count:
            break
    return _grid(cells) if cells else None


def _cell(
    check: SplitCheck, image: dict, objects: Sequence[dict], names: dict[Any, str]
) -> np.ndarray | None:
    path = Path(check.path(image["file_name"]))
    pixels = decode_image(path, path.read_bytes()) if path.is_file() else None
    if pixels is None:
        return None
    boxes = np.array([[*o["bbox"], 1.0] for o in objects], dtype=np.float32).reshape(-1, 5)
    boxes[:, 2:4] += boxes[:, :2] - 1
    scale = min(_CELL[0] / pixels.shape[1], (_CELL[1] - 24) / pixels.shape[0])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    labels = [f"{names[o['category_id']]}{' crowd' if o.get('iscrowd') else ''}" for o in objects]
    masks = [o.get("segmentation") or [] for o in objects]
    same_size = pixels.shape[:2] == (image["height"], image["width"])
    classes = range(len(objects))  # a colour each
    layout = lay_out(pixels.shape, boxes, classes, masks if same_size else None, labels, 0)
    picture = draw(pixels, _without_scores(layout))
    picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    cell = np.full((_CELL[1], _CELL[0], 3), 255, dtype=np.uint8)
    cell[: size[1], : size[0]] = picture
    caption = f"{image['file_name']}  {image['width']} x {image['height']}, {len(objects)} objects"
    cv2.putText(cell, caption[:60], (2, _CELL[1] - 7), 0, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
    return cell


def _without_scores(layout: Layout) -> Layout:
    """Labels that are names alone: ground truth has no score."""
    for number, instance in enumerate(layout.instances):
        if (label := instance.label) is not None:
            text = label.text.removesuffix(" 1.00")
            width = font(layout.font_size).getlength(text) + 0.5 * layout.font_size
            label = replace(label, text=text, width=float(width))
            layout.instances[number] = replace(instance, label=label)
    return layout


def _grid(cells: Sequence[np.ndarray]) -> np.ndarray:
    columns = min(_COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    width, height = _CELL[0] + _MARGIN, _CELL[1] + _MARGIN
    page = np.full((rows * height + _MARGIN, columns * width + _MARGIN, 3), 255, dtype=np.uint8)
    for number, cell in enumerate(cells):
        y, x = (number // columns) * height + _MARGIN, (number % columns) * width + _MARGIN
        page[y : y + _CELL[1], x : x + _CELL[0]] = cell
    return page


def has_errors(splits: Iterable[SplitCheck]) -> bool:
    return any(f.level == ERROR for check in splits for f in check.findings.sorted())
