"""COCO's metrics of a list of results: by pycocotools, or the same numbers faster.

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
from pycocotools.cocoeval import COCOeval, Params

from core.errors import UserError
from datasets.coco_matching import (
    Arrays,
    Found,
    Matches,
    Objects,
    accumulate,
    blank_sums,
    match,
)
from datasets.forked_pool import in_processes
from utils.device import available_cpus
from utils.keypoints import PERSON_KEYPOINTS
from utils.segms import usable_polygons

MOST_PROCESSES = 8  # more would take longer to start than they save
RESULTS_OF_A_PROCESS = 20000  # below, a process takes longer to start than to score
IMAGES_AT_ONCE = 500  # they bound the memory that matching takes
_MASKS_AT_ONCE = 200  # pycocotools' mask.area takes 255 at most


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
        evaluator: 'pycocotools', or 'fast': this project's, equal to it in all numbers.
        sigmas: (K,) spread of each keypoint; None for COCO's 17 of persons.
        processes: that 'fast' takes at most; None: one for each CPU.

    Returns:
        pycocotools' object, accumulated: `eval['precision']`, `eval['recall']`, `eval['scores']`,
        ready for summarize(). The fast one leaves its `evalImgs` and `ious` empty.
    """
    if evaluator == "fast":
        scored = unscored(coco, kind, image_ids, sigmas)
        return complete(scored, sums(scored, _match_results(scored, results, kind, processes)))
    truth = ground_truth(coco, image_ids, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        return _by_pycocotools(truth, results, kind, sorted(image_ids), sigmas)


def default_processes() -> int:
    """How many 'fast' takes where enough is to be scored."""
    return min(available_cpus(), MOST_PROCESSES)


def processes_that_pay(results: int, most: int | None = None) -> int:
    """How many processes so many results are worth."""
    return min(most or default_processes(), results // RESULTS_OF_A_PROCESS)


def images_at_once(count: int, processes: int) -> int:
    """How many of `count` images a process takes at a time: several times, for an even load."""
    return max(1, min(IMAGES_AT_ONCE, count // (4 * max(processes, 1))))


def unscored(
    coco: COCO, kind: str, image_ids: Sequence, sigmas: np.ndarray | None = None
) -> COCOeval:
    """pycocotools' object for these images, for `complete` to fill. Arguments as of `evaluate`."""
    truth = ground_truth(coco, image_ids, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        # What others read and unpickle is pycocotools' object, whoever filled it.
        return _make(truth, _without_annotations(truth), kind, sorted(image_ids), sigmas)


def sums(scored: COCOeval, parts: Sequence[Matches]) -> Arrays:
    """The numbers of all images of the object, each matched in one of the parts."""
    whole = blank_sums(scored.params)
    accumulate(parts, scored.params, whole)
    return whole


def complete(scored: COCOeval, whole: Arrays) -> COCOeval:
    """Fill the object with its numbers."""
    params = copy.copy(scored.params)
    scored.eval = {"params": params, "counts": list(whole["precision"].shape), **whole}
    return scored


def ground_truth(coco: COCO, image_ids: Sequence, kind: str) -> COCO:
    """A copy of the images' annotations that an evaluator may write to. For keypoints, of the
    categories that have any, objects without keypoints count as having none labelled; for masks
    as of `with_mask`."""
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
    if kind == "segm":
        annotations = [with_mask(a, coco.imgs[a["image_id"]]) for a in annotations]
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


def with_mask(annotation: dict[str, Any], image: dict[str, Any]) -> dict[str, Any]:
    """An annotation as mask metrics take it: without polygons of fewer than 3 points. An object
    that has no mask is a crowd that fills its box in the image: what is found there is neither
    right nor wrong."""
    segm = annotation["segmentation"]
    polygons = segm if isinstance(segm, dict) else usable_polygons(segm)
    if not polygons:
        x, y, width, height = annotation["bbox"]
        left, right = (min(max(v, 0), image["width"]) for v in (x, x + width))
        top, bottom = (min(max(v, 0), image["height"]) for v in (y, y + height))
        box = [left, top, left, bottom, right, bottom, right, top]
        return annotation | {"segmentation": [box], "iscrowd": 1}
    return annotation if len(polygons) == len(segm) else annotation | {"segmentation": polygons}


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


def objects_of(coco: COCO, positions: Sequence[int], kind: str, params: Params) -> Objects:
    """The objects of the classes to be scored in the images at these positions of
    params.imgIds; coco: of `ground_truth`."""
    number_of = {category: k for k, category in enumerate(params.catIds)}
    annotations, images = [], []
    for position in positions:
        for annotation in coco.imgToAnns.get(params.imgIds[position], ()):
            if annotation["category_id"] in number_of:
                annotations.append(annotation)
                images.append(position)
    crowd = np.array([annotation.get("iscrowd", 0) for annotation in annotations], dtype=bool)
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    ignored, shapes = crowd, boxes
    if kind == "segm":
        shapes = annotations
    elif kind == "keypoints":
        shapes = np.zeros((len(annotations), 3 * len(params.kpt_oks_sigmas)))
        visible = np.zeros(len(annotations), dtype=np.int64)
        for i, annotation in enumerate(annotations):
            points = annotation.get("keypoints")
            if points:
                shapes[i] = points
            labelled = annotation.get("num_keypoints")
            visible[i] = np.count_nonzero(shapes[i, 2::3]) if labelled is None else labelled
        ignored = crowd | (visible == 0)
    return Objects(
        image=np.array(images, dtype=np.int64),
        category=np.array([number_of[a["category_id"]] for a in annotations], dtype=np.int64),
        area=np.array([a["area"] for a in annotations], dtype=np.float64),
        shapes=shapes,
        crowd=crowd,
        ignored=ignored,
        boxes=boxes,
        to_rle=coco.annToRLE,
    )


def areas_of(shapes: np.ndarray | Sequence[dict[str, Any]], kind: str) -> np.ndarray:
    """(n,) areas that COCO gives to detections of a kind, with shapes as of coco_matching.Found."""
    if kind == "bbox":
        return shapes[:, 2] * shapes[:, 3]
    if kind == "segm":
        areas = [
            mask_util.area(shapes[i : i + _MASKS_AT_ONCE])
            for i in range(0, len(shapes), _MASKS_AT_ONCE)
        ]
        return np.concatenate([*areas, ()]).astype(np.float64)
    sides = [np.ptp(shapes[:, i::3], axis=1) if len(shapes) else np.zeros(0) for i in (0, 1)]
    return sides[0] * sides[1]


def _match_results(
    scored: COCOeval, results: Sequence[dict], kind: str, processes: int | None
) -> list[Matches]:
    """`match` of parts of the images, in as many processes as pay."""
    params = scored.params
    position_of = {image_id: i for i, image_id in enumerate(params.imgIds)}
    number_of = {category: k for k, category in enumerate(params.catIds)}
    # Results of other images, or of classes that are not scored, are left out.
    images = np.array([position_of.get(r["image_id"], -1) for r in results], dtype=np.int64)
    classes = np.array([number_of.get(r["category_id"], -1) for r in results], dtype=np.int64)
    order = np.argsort(images, kind="stable")
    order = order[(images[order] >= 0) & (classes[order] >= 0)]
    processes = processes_that_pay(len(order), processes)
    count = len(params.imgIds)
    step = images_at_once(count, processes)

    def matches(begin: int) -> Matches:
        end = min(begin + step, count)
        first, last = np.searchsorted(images[order], (begin, end))
        rows = order[first:last]
        chosen = [results[i] for i in rows.tolist()]
        key = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[kind]
        shapes = [result[key] for result in chosen]
        if kind != "segm":
            width = 4 if kind == "bbox" else 3 * len(params.kpt_oks_sigmas)
            shapes = np.array(shapes, dtype=np.float64).reshape(-1, width)
        found = Found(
            image=images[rows],
            category=classes[rows],
            area=areas_of(shapes, kind),
            shapes=shapes,
            score=np.array([result["score"] for result in chosen], dtype=np.float64),
        )
        objects = objects_of(scored.cocoGt, range(begin, end), kind, params)
        return match(objects, found, kind, params)

    return in_processes(matches, range(0, count, step), processes)


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
