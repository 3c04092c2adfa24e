"""Ground-truth roidbs on disk: valid for exactly the content they were made from.

The file's name holds a hash of everything that went in (annotation file, image directory, config
keys, version of the code), so a changed input means another file and nothing can be stale. The
format is npz with plain arrays, loaded with pickling off: a cache file can hold no code. Only what
annotations say is stored; overlaps and flipped copies are made anew.
"""

from __future__ import annotations

import collections
import hashlib
import json
import logging
from pathlib import Path

import numpy as np

from core.config import cfg
from datasets.annotations import content_blocks
from datasets.entry import RoidbEntry, make_entry
from datasets.json_dataset import JsonDataset, check_images_exist
from utils.packed_roidb import PackedRoidb
from utils.weights import atomic_write

logger = logging.getLogger(__name__)

# Raise when entries get other content from the same annotations.
_CODE_VERSION = 1


def cached_gt_roidb(dataset: JsonDataset) -> list[RoidbEntry]:
    """`dataset.get_roidb(gt=True)`, from cfg.DATA_DIR/cache if it is there.

    A damaged cache file is made anew; a folder that cannot be written to is only warned about.
    With cfg.DEBUG nothing is read from or written to the cache.
    """
    if cfg.DEBUG:
        return dataset.get_roidb(gt=True)
    path = cache_path(dataset)
    roidb = _load(path, dataset) if path.exists() else None
    if roidb is None:
        roidb = dataset.get_roidb(gt=True)
        _save(path, dataset, roidb)
    return roidb


def cache_path(dataset: JsonDataset) -> Path:
    """Where the roidb of the data set, as it is now, is kept."""
    digest = hashlib.sha256()
    for block in content_blocks(dataset.annotation_file):
        digest.update(block)
    settings = {
        "version": _CODE_VERSION,
        "images": dataset.image_path(""),
        "TRAIN.GT_MIN_AREA": cfg.TRAIN.GT_MIN_AREA,
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return Path(cfg.DATA_DIR) / "cache" / f"roidb_{dataset.name}_{digest.hexdigest()[:20]}.npz"


def _save(path: Path, dataset: JsonDataset, roidb: list[RoidbEntry]) -> None:
    about = {"num_classes": dataset.num_classes, "findings": dataset.findings}
    arrays = PackedRoidb.pack(roidb).arrays
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
    except OSError as error:
        logger.warning("Cannot write the roidb cache %s (%s); going on without", path, error)
    else:
        logger.info("Wrote roidb of %s to %s", dataset.name, path)


def _load(path: Path, dataset: JsonDataset) -> list[RoidbEntry] | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        about = json.loads(arrays.pop("about").tobytes())
        dataset.findings = collections.Counter(about["findings"])
        roidb = [_entry(item, about["num_classes"]) for item in PackedRoidb(arrays)]
    except Exception as error:  # a damaged file may raise anything, and must not stop a training
        logger.warning("Roidb cache %s is damaged (%s): made anew", path, error)
        return None
    check_images_exist(roidb, dataset.annotation_file)
    logger.info("Loaded roidb of %s from %s", dataset.name, path)
    dataset.log_findings()
    return roidb


def _entry(item: RoidbEntry, num_classes: int) -> RoidbEntry:
    del item["flipped"]
    return make_entry(
        image_id=item.pop("id"), num_classes=num_classes, **{"gt_keypoints": None, **item}
    )
