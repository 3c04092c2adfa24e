"""COCO's metrics of a list of results: by pycocotools, or the same numbers by a faster library.

Results are COCO's: dicts of image_id, category_id, score and bbox, segmentation (RLE) or keypoints.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from core.errors import UserError
from datasets import coco_by_class
from utils.device import available_cpus
from utils.keypoints import PERSON_KEYPOINTS

MOST_PROCESSES = 8  # more would wait for the largest class, of COCO more than a quarter


def evaluate(
    coco: COCO,
    results: Sequence[dict[str, Any]],
    kind: str,
    image_ids: Sequence,
    evaluator: str,
    sigmas: np.ndarray | None = None,
    processes: int | None = None,
) -> COCOeval:
    """Score results; `coco` and `results` stay as they are (pycocotools alone would change them).

    Args:
        coco: the ground truth; kind: 'bbox', 'segm' or 'keypoints'; image_ids: what to score.
        evaluator: 'pycocotools', or 'fast': faster_coco_eval, equal to it in all numbers.
        sigmas: (K,) spread of each keypoint; None for COCO's 17 of persons.
        processes: that 'fast' takes at most; None: one for each CPU.

    Returns:
        pycocotools' object, accumulated: `eval['precision']`, `eval['recall']`, `eval['scores']`,
        ready for summarize(). The fast one leaves its `evalImgs` and `ious` empty.
    """
    truth = ground_truth(coco, image_ids, kind)
    rest = (truth, results, kind, sorted(image_ids), sigmas)
    with contextlib.redirect_stdout(io.StringIO()):
        if evaluator == "fast":
            return _by_library(*rest, processes or default_processes())
        return _by_pycocotools(*rest)


def default_processes() -> int:
    """How many 'fast' takes where enough is to be scored."""
    return min(available_cpus(), MOST_PROCESSES)


def ground_truth(coco: COCO, image_ids: Sequence, kind: str) -> COCO:
    """A copy of the images' annotations that an evaluator may write to. For keypoints, of the
    categories that have any, objects without keypoints count as having none labelled."""
    categories = coco.dataset["categories"]
    if kind == "keypoints":
        # Files of one category need not name its points.
        categories = [c for c in categories if c.get("keypoints")] or categories
    known = {category["id"] for category in categories}
    annotations = [
        dict(annotation)
        for image_id in image_ids
        for annotation in coco.imgToAnns.get(image_id, [])
        if annotation["category_id"] in known
    ]
    if kind == "keypoints":
        numbers = next((len(a["keypoints"]) for a in annotations if a.get("keypoints")), 0)
        for annotation in annotations:
            points = annotation.setdefault("keypoints", [0] * numbers)
            annotation.setdefault("num_keypoints", int(np.count_nonzero(points[2::3])))
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": coco.loadImgs(list(image_ids)),
        "categories": categories,
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def keypoint_sigmas(coco: COCO) -> np.ndarray | None:
    """Spread of each keypoint: `sigmas` (or `keypoint_sigmas`) of the category with keypoints.

    None means COCO's 17; another number of points without sigmas has the mean of COCO's for each.
    Raises UserError if there are more or fewer sigmas than keypoints, or one is not positive.
    """
    for category in coco.dataset["categories"]:
        names = category.get("keypoints")
        if not names:
            continue
        given = category.get("sigmas", category.get("keypoint_sigmas"))
        if given is None:
            if len(names) == len(PERSON_KEYPOINTS):
                return None
            return np.full(len(names), COCOeval(iouType="keypoints").params.kpt_oks_sigmas.mean())
        sigmas = np.array(given, dtype=np.float64)
        if sigmas.shape != (len(names),) or not (sigmas > 0).all():
            raise UserError(
                f"category {category['name']} of the annotations has sigmas {given}: give a "
                f"positive number for each of its {len(names)} keypoints"
            )
        return sigmas
    return None


def _by_pycocotools(
    truth: COCO, results: Sequence[dict], kind: str, image_ids: Sequence, sigmas: np.ndarray | None
) -> COCOeval:
    if results:
        found = truth.loadRes([dict(result) for result in results])
    else:
        found = _without_annotations(truth)  # loadRes looks at the first result
    scored = _make(truth, found, kind, image_ids, sigmas)
    scored.evaluate()
    scored.accumulate()
    return scored


def _by_library(
    truth: COCO,
    results: Sequence[dict],
    kind: str,
    image_ids: Sequence,
    sigmas: np.ndarray | None,
    processes: int,
) -> COCOeval:
    # What others read and unpickle is pycocotools' object, whichever library filled it.
    scored = _make(truth, _without_annotations(truth), kind, image_ids, sigmas)
    found = coco_by_class.evaluate(truth, results, kind, scored.params, processes)
    params = copy.copy(scored.params)
    scored.eval = {"params": params, "counts": list(found["precision"].shape), **found}
    return scored


def _make(
    truth: COCO, found: COCO, kind: str, image_ids: Sequence, sigmas: np.ndarray | None
) -> COCOeval:
    scored = COCOeval(truth, found, kind)
    scored.params.imgIds = list(image_ids)
    if kind == "keypoints" and sigmas is not None:
        scored.params.kpt_oks_sigmas = sigmas
    return scored


def _without_annotations(truth: COCO) -> COCO:
    empty = COCO()
    empty.dataset = truth.dataset | {"annotations": []}
    empty.createIndex()
    return empty
