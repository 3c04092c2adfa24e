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
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from core.errors import UserError
from utils.keypoints import PERSON_KEYPOINTS

_MASKS_AT_ONCE = 200  # pycocotools' mask.area takes 255 at most


def evaluate(
    coco: COCO,
    results: Sequence[dict[str, Any]],
    kind: str,
    image_ids: Sequence,
    evaluator: str,
    sigmas: np.ndarray | None = None,
) -> COCOeval:
    """Score results; `coco` and `results` stay as they are (pycocotools alone would change them).

    Args:
        coco: the ground truth; kind: 'bbox', 'segm' or 'keypoints'; image_ids: what to score.
        evaluator: 'pycocotools', or 'fast': faster_coco_eval, equal to it in all numbers.
        sigmas: (K,) spread of each keypoint; None for COCO's 17 of persons.

    Returns:
        pycocotools' object, accumulated: `eval['precision']`, `eval['recall']`, `eval['scores']`,
        ready for summarize(). The fast one leaves its `evalImgs` and `ious` empty.
    """
    truth = ground_truth(coco, image_ids, kind)
    score = {"pycocotools": _by_pycocotools, "fast": _by_library}[evaluator]
    with contextlib.redirect_stdout(io.StringIO()):
        return score(truth, results, kind, sorted(image_ids), sigmas)


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
        found = _without_annotations(COCO(), truth)  # loadRes looks at the first result
    scored = _make(COCOeval, truth, found, kind, image_ids, sigmas)
    scored.evaluate()
    scored.accumulate()
    return scored


def _by_library(
    truth: COCO, results: Sequence[dict], kind: str, image_ids: Sequence, sigmas: np.ndarray | None
) -> COCOeval:
    # Imported where it is used: TEST.COCO_EVALUATOR pycocotools does not need it.
    from faster_coco_eval import COCO as FastCOCO
    from faster_coco_eval import COCOeval_faster

    fast_truth = FastCOCO()
    fast_truth.dataset = truth.dataset
    fast_truth.createIndex()
    if not results:
        found = _without_annotations(FastCOCO(), truth)
    elif kind in ("bbox", "segm"):
        # Its loadRes makes polygons of boxes and boxes of masks; only areas are needed.
        found = FastCOCO()
        found.dataset = truth.dataset | {"annotations": _with_areas(results)}
        found.createIndex()
    else:
        found = fast_truth.loadRes([dict(result) for result in results])
    fast = _make(COCOeval_faster, fast_truth, found, kind, image_ids, sigmas)
    fast.evaluate()
    fast.accumulate()
    # What others read and unpickle is pycocotools' object, whichever library filled it.
    scored = _make(COCOeval, truth, _without_annotations(COCO(), truth), kind, image_ids, sigmas)
    shape = fast.eval["precision"].shape  # IoU, recall, class, area, number of detections
    scored.eval = {
        "params": copy.copy(scored.params),
        "counts": list(shape),
        "precision": fast.eval["precision"],
        "recall": np.asarray(fast.eval["recall"]).reshape(shape[0], *shape[2:]),
        "scores": fast.eval["scores"],
    }
    return scored


def _make(
    evaluator: type, truth: Any, found: Any, kind: str, image_ids: Sequence, sigmas: Any
) -> Any:
    scored = evaluator(truth, found, kind)
    scored.params.imgIds = list(image_ids)
    if kind == "keypoints" and sigmas is not None:
        scored.params.kpt_oks_sigmas = sigmas
    return scored


def _without_annotations(empty: Any, truth: COCO) -> Any:
    empty.dataset = truth.dataset | {"annotations": []}
    empty.createIndex()
    return empty


def _with_areas(results: Sequence[dict]) -> list[dict]:
    """Results of boxes or masks as annotations: with id, area, and no crowds."""
    if "bbox" in results[0]:
        areas = [result["bbox"][2] * result["bbox"][3] for result in results]
    else:
        rles = [result["segmentation"] for result in results]
        areas = np.concatenate(
            [
                mask_util.area(rles[begin : begin + _MASKS_AT_ONCE])
                for begin in range(0, len(rles), _MASKS_AT_ONCE)
            ]
        ).tolist()
    no_box = {"bbox": [0, 0, 0, 0]}  # that of a mask is not used
    return [
        {**no_box, **result, "id": i, "area": area, "iscrowd": 0}
        for i, (result, area) in enumerate(zip(results, areas, strict=True), start=1)
    ]
