"""Ground-truth roidbs on disk: valid for exactly the content they were made from.

The file's name holds a hash of everything that went in (annotation file, config keys, version of
the code), so a changed input means another file and nothing can be stale. The format is npz with
plain arrays, loaded with pickling off: a cache file can hold no code. Only what annotations say is
stored; image paths, overlaps and flipped copies are made anew.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from core.config import cfg
from datasets.entry import RoidbEntry, make_entry
from datasets.json_dataset import JsonDataset, check_images_exist

logger = logging.getLogger(__name__)

# Raise when entries get other content from the same annotations.
_CODE_VERSION = 1

_BLOCK = 2**24  # bytes read at a time while hashing


def cached_gt_roidb(dataset: JsonDataset) -> list[RoidbEntry]:
    """`dataset.get_roidb(gt=True)`, from cfg.DATA_DIR/cache if it is there.

    A damaged cache file is made anew; a folder that cannot be written to is only warned about.
    With cfg.DEBUG nothing is read from or written to the cache.
    """
    if cfg.DEBUG:
        return dataset.get_roidb(gt=True)
    path = cache_path(dataset)
    roidb = _load(path, dataset)
    if roidb is None:
        roidb = dataset.get_roidb(gt=True)
        _save(path, dataset, roidb)
    return roidb


def cache_path(dataset: JsonDataset) -> Path:
    """Where the roidb of the data set, as it is now, is kept."""
    digest = hashlib.sha256()
    with open(dataset.annotation_file, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    settings = {"version": _CODE_VERSION, "TRAIN.GT_MIN_AREA": cfg.TRAIN.GT_MIN_AREA}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return Path(cfg.DATA_DIR) / "cache" / f"roidb_{dataset.name}_{digest.hexdigest()[:20]}.npz"


def _save(path: Path, dataset: JsonDataset, roidb: list[RoidbEntry]) -> None:
    """Write atomically: whoever reads the path sees a whole file or none."""
    arrays = _pack(roidb, dataset)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("Cannot write the roidb cache %s (%s); going on without", path, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    else:
        logger.info("Wrote roidb of %s to %s", dataset.name, path)


def _load(path: Path, dataset: JsonDataset) -> list[RoidbEntry] | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        roidb = list(_unpack(arrays, dataset))
        dataset.findings = collections.Counter(dict(_from_text(arrays["findings"])))
    except Exception as error:  # a damaged file may raise anything, and must not stop a training
        logger.warning("Roidb cache %s is damaged (%s): made anew", path, error)
        return None
    check_images_exist(roidb, dataset.annotation_file)
    logger.info("Loaded roidb of %s from %s", dataset.name, path)
    dataset.log_findings()
    return roidb


def _pack(roidb: list[RoidbEntry], dataset: JsonDataset) -> dict[str, np.ndarray]:
    """A roidb as flat arrays. `polygons` counts an object's polygons (-1: it is the next RLE),
    `points` counts the numbers of each polygon."""
    polygons, points, coords, rles = [], [], [], []
    for segm in (segm for entry in roidb for segm in entry["segms"]):
        if isinstance(segm, dict):
            polygons.append(-1)
            rles.append(_plain_rle(segm))
        else:
            polygons.append(len(segm))
            points.extend(len(p) for p in segm)
            coords.extend(segm)
    prefix_length = len(dataset.image_path(""))
    arrays = {
        "num_classes": np.array(dataset.num_classes),
        "has_keypoints": np.array(dataset.keypoints is not None),
        "ids": _text([entry["id"] for entry in roidb]),
        "files": _text([entry["image"][prefix_length:] for entry in roidb]),
        "sizes": np.array([(e["height"], e["width"]) for e in roidb], dtype=np.int64),
        "objects": np.array([len(entry["boxes"]) for entry in roidb], dtype=np.int64),
        "polygons": np.array(polygons, dtype=np.int64),
        "points": np.array(points, dtype=np.int64),
        "coords": np.concatenate([np.zeros(0), *coords]),
        "rles": _text(rles),
        "findings": _text(list(dataset.findings.items())),
    }
    keys = ["boxes", "gt_classes", "is_crowd", "seg_areas"]
    if dataset.keypoints is not None:
        keys.append("gt_keypoints")
    for key in keys:
        arrays[key] = np.concatenate([entry[key] for entry in roidb])
    return arrays


def _unpack(arrays: dict[str, np.ndarray], dataset: JsonDataset) -> Iterator[RoidbEntry]:
    num_classes = int(arrays["num_classes"])
    ends = np.cumsum(arrays["objects"])[:-1]
    columns = [np.split(arrays[k], ends) for k in ("boxes", "gt_classes", "is_crowd", "seg_areas")]
    segms = _unpack_segms(arrays)
    ids, files = _from_text(arrays["ids"]), _from_text(arrays["files"])
    keypoints = [None] * len(ids)
    if arrays["has_keypoints"]:
        keypoints = np.split(arrays["gt_keypoints"], ends)
    for i, (boxes, gt_classes, is_crowd, seg_areas) in enumerate(zip(*columns, strict=True)):
        height, width = arrays["sizes"][i].tolist()
        yield make_entry(
            image_id=ids[i],
            image=dataset.image_path(files[i]),
            height=height,
            width=width,
            num_classes=num_classes,
            boxes=boxes,
            gt_classes=gt_classes,
            is_crowd=is_crowd,
            seg_areas=seg_areas,
            segms=list(itertools.islice(segms, len(boxes))),
            gt_keypoints=keypoints[i],
        )


def _unpack_segms(arrays: dict[str, np.ndarray]) -> Iterator[list | dict]:
    polygons = iter(np.split(arrays["coords"], np.cumsum(arrays["points"])[:-1]))
    rles = iter(_from_text(arrays["rles"]))
    for count in arrays["polygons"].tolist():
        yield next(rles) if count < 0 else [next(polygons) for _ in range(count)]


def _plain_rle(rle: dict) -> dict:
    counts = rle["counts"]
    return {**rle, "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def _text(values: list) -> np.ndarray:
    """Any JSON values as bytes: ids may be numbers or text, and stay what they are."""
    return np.frombuffer(json.dumps(values).encode(), dtype=np.uint8)


def _from_text(array: np.ndarray) -> list:
    return json.loads(array.tobytes())
