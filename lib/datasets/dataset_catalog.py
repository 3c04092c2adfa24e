"""Where each data set's images and annotations are, and what `--dataset` may name.

Paths of the built-in names are relative to `cfg.DATA_DIR`. Users' own data need no entry here:
`resolve_dataset` takes a YAML file, `ANNOTATIONS.json:IMAGE_DIR` or a folder of Pascal VOC's layout
and registers what it finds.
"""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from pathlib import Path

import yaml

from core.config import cfg
from core.errors import UserError
from datasets import voc_xml
from datasets.annotations import load_annotations
from datasets.coco_classes import COCO_CLASSES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CatalogEntry:
    """Files of one split of one data set.

    images: the folders to try in order, each with the prefix that file names have in it; relative
    paths start at cfg.DATA_DIR. annotations: the files to try in order, COCO-format JSON or the
    split of a folder of VOC's layout (ImageSets/Main/SPLIT.txt). proposals: file or URL of
    proposals that come with the data.
    """

    name: str
    images: tuple[tuple[Path, str], ...]
    annotations: tuple[Path, ...]
    proposals: str | None = None

    def annotation_file(self) -> Path:
        """The first annotation file that exists. Raises UserError if there is none."""
        candidates = [cfg_path(path) for path in self.annotations]
        for path in candidates:
            if path.is_file():
                return path
        raise UserError(
            f"annotation file {candidates[0]} of data set {self.name} does not exist; "
            + self._advice(candidates[0])
        )

    def image_dir(self) -> tuple[Path, str]:
        """(image folder, prefix of file names in it). Raises UserError if there is none."""
        candidates = [(cfg_path(path), prefix) for path, prefix in self.images]
        for path, prefix in candidates:
            if path.is_dir():
                return path, prefix
        raise UserError(
            f"image directory {candidates[0][0]} of data set {self.name} does not exist; "
            + self._advice(candidates[0][0])
        )

    def _advice(self, path: Path) -> str:
        data_dir = Path(cfg.DATA_DIR)
        if self.name not in _BUILT_IN:
            return "correct the path"
        folder = data_dir / path.relative_to(data_dir).parts[0]
        return f"soft-link the data set as {folder} (data/README.md shows the layout)"


def cfg_path(path: Path) -> Path:
    """A catalog path as a real one: relative paths start at cfg.DATA_DIR."""
    return Path(cfg.DATA_DIR) / path


def _entry(name: str, images: list[str | tuple[str, str]], annotations: list[str]) -> CatalogEntry:
    pairs = tuple((Path(i), "") if isinstance(i, str) else (Path(i[0]), i[1]) for i in images)
    return CatalogEntry(name, pairs, tuple(Path(a) for a in annotations))


def _coco_images(split: str) -> list[str | tuple[str, str]]:
    """This family's folder, then Detectron's; newer sets also under the names of older ones."""
    folders: list[str | tuple[str, str]] = [f"coco/images/{split}", f"coco/coco_{split}"]
    if split == "test2017":  # the same pictures as test2015, with other file names
        for folder in ("coco/images/test2015", "coco/coco_test2015"):
            folders.append((folder, "COCO_test2015_"))
    return folders


def _built_in_entries() -> list[CatalogEntry]:
    entries = []
    for year, splits in (
        ("2014", {"train": "train", "val": "val", "minival": "val", "valminusminival": "val"}),
        ("2017", {"train": "train", "val": "val"}),
    ):
        for split, folder in splits.items():
            images = _coco_images(f"{folder}{year}")
            if split == "minival":  # 2017 val is the same 5,000 pictures
                images += _coco_images("val2017")
            for prefix, kind in (("coco", "instances"), ("keypoints_coco", "person_keypoints")):
                annotations = [f"coco/annotations/{kind}_{split}{year}.json"]
                entries.append(_entry(f"{prefix}_{year}_{split}", images, annotations))
    for year in ("2015", "2017"):
        for split in ("test", "test-dev"):
            annotations = [f"coco/annotations/image_info_{split}{year}.json"]
            for prefix in ("coco", "keypoints_coco"):
                images = _coco_images(f"test{year}")
                entries.append(_entry(f"{prefix}_{year}_{split}", images, annotations))
    for split in ("train", "val"):
        annotations = [f"coco/annotations/coco_stuff_{split}.json"]
        entries.append(_entry(f"coco_stuff_{split}", _coco_images(f"{split}2014"), annotations))
    for split, file in (
        ("train", "instancesonly_gtFine_train.json"),
        ("val", "instancesonly_filtered_gtFine_val.json"),
        ("test", "instancesonly_gtFine_test.json"),
    ):
        name = f"cityscapes_fine_instanceonly_seg_{split}"
        annotations = [f"cityscapes/annotations/{file}"]
        entries.append(_entry(name, ["cityscapes/images"], annotations))
    for year, splits in (
        ("2007", ("train", "val", "trainval", "test")),
        ("2012", ("train", "val", "trainval")),
    ):
        for split in splits:
            annotations = [f"VOC{year}/annotations/voc_{year}_{split}.json"]
            # As unpacked, and as Detectron and as the archives themselves place it.
            folders = [f"VOC{year}", f"VOC{year}/VOCdevkit{year}/VOC{year}", f"VOCdevkit/VOC{year}"]
            annotations += [f"{folder}/ImageSets/Main/{split}.txt" for folder in folders]
            images = [f"{folder}/JPEGImages" for folder in folders]
            entries.append(_entry(f"voc_{year}_{split}", images, annotations))
    return entries


_BUILT_IN = {entry.name: entry for entry in _built_in_entries()}
_USER_DATA: dict[str, CatalogEntry] = {}

# What the scripts' --dataset calls a pair of splits.
_PAIRS = {
    "coco2017": ("coco_2017_train", "coco_2017_val"),
    "keypoints_coco2017": ("keypoints_coco_2017_train", "keypoints_coco_2017_val"),
}


@dataclass(frozen=True)
class ResolvedDataset:
    """What a script needs to know of its --dataset.

    class_names starts with '__background__', so that it is indexed by class label and
    num_classes == len(class_names).
    """

    train_names: tuple[str, ...]
    test_names: tuple[str, ...]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def get_entry(name: str) -> CatalogEntry:
    """The files of a data set. Raises UserError, with the nearest names, if it is unknown."""
    entry = _BUILT_IN.get(name) or _USER_DATA.get(name)
    if entry is None:
        known = sorted({*_PAIRS, *_BUILT_IN, *_USER_DATA})
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise UserError(
            f"unknown data set {name!r}{' (nearest: ' + ', '.join(near) + ')' if near else ''}; "
            "name a data set of lib/datasets/dataset_catalog.py, a YAML file, "
            "ANNOTATIONS.json:IMAGE_DIR, or a folder of VOC's layout"
        )
    return entry


def own_proposals(name: str) -> str | None:
    """The proposal file that a user's data set names itself; None if it names none."""
    entry = _USER_DATA.get(name)
    return entry.proposals if entry else None


def register(name: str, annotations: Path, images: Path, proposals: str | None = None) -> None:
    """Make a user's data set known under a name. Raises UserError if a built-in one has it."""
    if name in _BUILT_IN:
        raise UserError(f"data set name {name!r} is taken by the catalog; rename your file")
    folders, files = ((images.resolve(), ""),), (annotations.resolve(),)
    _USER_DATA[name] = CatalogEntry(name, folders, files, proposals)


def resolve_dataset(spec: str) -> ResolvedDataset:
    """Find out what `--dataset` means, registering users' own data.

    spec: `coco2017` or `keypoints_coco2017` (train and val), any catalog name (this split, for
    both), a YAML file (`train: {annotations: FILE, images: DIR}` or `train: {voc: DIR, set: NAME}`
    and/or `val: ...`, relative to the YAML file, each perhaps with `proposals: FILE`),
    `ANNOTATIONS.json:IMAGE_DIR` (for both), a folder of VOC's layout (trained on trainval and
    tested on test, or else train and val) or `DIR:SET`
    (that split for both). Classes of COCO are known without its files; those of other data come
    from the annotations.
    Raises UserError naming what is unknown, missing or wrong.
    """
    train_names, test_names = find_splits(spec)
    classes = {name: dataset_classes(name) for name in (*train_names, *test_names)}
    if len(set(classes.values())) > 1:
        raise UserError(f"{spec}: the categories of train and val differ; make them the same list")
    return ResolvedDataset(train_names, test_names, next(iter(classes.values())))


def find_splits(spec: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of what to train and to test on, as for `resolve_dataset`, registering users' own data
    without reading any annotations."""
    if spec in _PAIRS:
        train, test = _PAIRS[spec]
        return (train,), (test,)
    if spec.endswith((".yaml", ".yml")):
        return _register_yaml(Path(spec))
    if ".json:" in spec:
        annotations, _, images = spec.partition(".json:")
        path = Path(annotations + ".json")
        register(path.stem, path, Path(images))
        return (path.stem,), (path.stem,)
    if (voc := _voc_parts(spec)) is not None:
        return _register_voc_splits(*voc)
    if spec.endswith(".json"):
        raise UserError(f"--dataset {spec} lacks the image directory: write {spec}:IMAGE_DIR")
    get_entry(spec)
    return (spec,), (spec,)


def resolve_class_names(spec: str) -> tuple[str, ...]:
    """Class names for inference alone: `coco...` and `keypoints_coco...` need no data set."""
    is_file = spec.endswith((".yaml", ".yml", ".json")) or ".json:" in spec or _voc_parts(spec)
    if not is_file and spec.startswith(("coco", "keypoints_coco")):
        return _coco_classes(spec)
    return resolve_dataset(spec).class_names


def dataset_classes(name: str) -> tuple[str, ...]:
    """Class names of a catalog name, '__background__' first."""
    entry = get_entry(name)
    if name in _BUILT_IN and name.startswith(("coco_20", "keypoints_coco")):
        return _coco_classes(name)
    categories = load_annotations(entry.annotation_file()).dataset["categories"]
    return ("__background__", *(category["name"] for category in categories))


def _coco_classes(name: str) -> tuple[str, ...]:
    names = ("person",) if name.startswith("keypoints") else COCO_CLASSES
    return ("__background__", *names)


def _voc_parts(spec: str) -> tuple[Path, str] | None:
    """Folder and split ('': the usual ones) if spec names a folder; None if it does not."""
    folder, _, split = spec.rpartition(":") if not Path(spec).is_dir() else (spec, "", "")
    # A catalog name may also be that of a folder in the working directory.
    if not folder or not Path(folder).is_dir() or (spec in _BUILT_IN or spec.startswith("coco")):
        return None
    if not voc_xml.is_voc_folder(Path(folder)):
        raise UserError(
            f"--dataset {spec} is a folder without Pascal VOC's Annotations, ImageSets/Main and "
            "JPEGImages; for other data name a YAML file or ANNOTATIONS.json:IMAGE_DIR"
        )
    return Path(folder), split


def _register_voc_splits(folder: Path, split: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    there = voc_xml.split_names(folder)
    pairs = [(split, split)] if split else [("trainval", "test"), ("train", "val")]
    train, test = next((p for p in pairs if set(p) <= set(there)), pairs[-1])
    names = tuple(_register_voc(f"{folder.resolve().name}_{s}", folder, s) for s in (train, test))
    return (names[0],), (names[1],)


def _register_voc(name: str, folder: Path, split: str, proposals: str | None = None) -> str:
    register(name, voc_xml.split_file(folder, split), folder / "JPEGImages", proposals)
    return name


def _register_yaml(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    names = {}
    for split, files in _read_yaml(path).items():
        names[split] = f"{path.stem}_{split}"
        proposals = files.get("proposals")
        if proposals and not proposals.startswith(("http://", "https://")):
            proposals = str(path.parent / proposals)
        if "voc" in files:
            _register_voc(names[split], path.parent / files["voc"], files["set"], proposals)
        else:
            images = path.parent / files["images"]
            register(names[split], path.parent / files["annotations"], images, proposals)
    train, val = names.get("train"), names.get("val")
    return (train,) if train else (), (val,) if val else ()


def _read_yaml(path: Path) -> dict[str, dict[str, str]]:
    """The YAML file's splits, checked."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"data set file {path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"data set file {path} is not valid YAML ({error})") from error
    form = "train: {annotations: FILE, images: DIRECTORY} and/or val: ..."
    keys = ({"annotations", "images"}, {"voc", "set"})
    if not isinstance(data, dict) or not data or not set(data) <= {"train", "val"}:
        raise UserError(f"data set file {path} must have the form {form}")
    for split, files in data.items():
        if not isinstance(files, dict) or set(files) - {"proposals"} not in keys:
            raise UserError(f"data set file {path}: {split!r} must have the form {form}")
        for key, value in files.items():
            if not isinstance(value, str):
                raise UserError(f"data set file {path}: {split}.{key} must be a path")
    return data
