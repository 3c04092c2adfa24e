"""What class labels mean: their names, ids in result files, and the skeleton of keypoints."""

from __future__ import annotations

from dataclasses import dataclass

from core.config import cfg
from datasets.annotations import load_annotations
from datasets.coco_classes import COCO_CATEGORY_IDS, COCO_CLASSES
from datasets.dataset_catalog import get_entry, resolve_class_names, resolve_dataset
from utils.skeleton import PERSON_SKELETON, Skeleton, skeleton_of


@dataclass(frozen=True)
class Vocabulary:
    """names and category_ids are indexed by class label; label 0 is the background."""

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    skeleton: Skeleton = PERSON_SKELETON


def vocabulary_of(spec: str) -> Vocabulary:
    """The classes of what `--dataset` names; `coco...` and `keypoints_coco...` need no files.

    Raises UserError naming what is unknown, missing or wrong.
    """
    names = resolve_class_names(spec)
    own_data = spec.endswith((".yaml", ".yml")) or ".json" in spec
    if not own_data and names[1:] in (COCO_CLASSES, COCO_CLASSES[:1]):
        return Vocabulary(names, (0, *COCO_CATEGORY_IDS[: len(names) - 1]))
    resolved = resolve_dataset(spec)
    entry = get_entry((*resolved.train_names, *resolved.test_names)[0])
    categories = load_annotations(entry.annotation_file()).dataset["categories"]
    skeleton = PERSON_SKELETON
    for category in categories:
        if category.get("keypoints"):
            skeleton = skeleton_of(category["keypoints"], category.get("skeleton") or ())
            break
    return Vocabulary(names, (0, *(category["id"] for category in categories)), skeleton)


def vocabulary_for(num_classes: int) -> Vocabulary:
    """The classes of a model of which only their number is known: COCO's where that fits."""
    if num_classes == len(COCO_CLASSES) + 1:
        return vocabulary_of("coco")
    if num_classes == 2 and cfg.MODEL.KEYPOINTS_ON:
        return vocabulary_of("keypoints_coco")
    labels = range(1, num_classes)
    return Vocabulary(("__background__", *(f"class {i}" for i in labels)), (0, *labels))
