"""COCO's metrics by faster-coco-eval, class by class, in as many processes as there are CPUs.

No number of a class depends on another class, so that the parts are exactly those of the whole.
Masks are compared by pycocotools, only where an image has both objects and detections of a class,
while the library matches them: its own way converts every mask first.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import Params

from roi_data.loader_workers import START_METHOD

_MASKS_AT_ONCE = 200  # pycocotools' mask.area takes 255 at most
_PR_SET_PDEATHSIG = 1  # of Linux' prctl
RESULTS_OF_A_PROCESS = 5000  # below, a process takes longer to start than to score

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class _Job:
    """What the processes share. The lists are of a class, by its id."""

    truth: COCO
    kind: str  # 'bbox', 'segm' or 'keypoints'
    params: Params
    objects: dict[int, list[dict[str, Any]]]
    results: dict[int, list[dict[str, Any]]]


def evaluate(
    truth: COCO, results: Sequence[dict[str, Any]], kind: str, params: Params, processes: int
) -> Arrays:
    """The numbers of pycocotools' COCOeval.eval.

    Args:
        truth: the images to score with their annotations, which may be written to; ids of images
            that results have besides are left out.
        params: pycocotools', with the classes and the thresholds.
        processes: as many at most.

    Returns:
        precision and scores: (IoU, recall, class, area, number of detections) float64;
        recall: (IoU, class, area, number of detections). -1 where a class has no objects.
    """
    objects, found = defaultdict(list), defaultdict(list)
    for annotation in truth.dataset["annotations"]:
        objects[annotation["category_id"]].append(annotation)
    for result in results:
        if result["image_id"] in truth.imgs:
            found[result["category_id"]].append(result)
    job = _Job(truth, kind, params, objects, found)
    # Largest first: nobody should begin with one when the others are done.
    classes = sorted((c for c in params.catIds if objects[c]), key=lambda c: -len(found[c]))
    processes = min(processes, len(classes), len(results) // RESULTS_OF_A_PROCESS)
    collecting = gc.isenabled()
    gc.disable()  # it would look through the results again and again, and find nothing to collect
    try:
        if processes > 1:
            context = multiprocessing.get_context(START_METHOD)
            with ProcessPoolExecutor(processes, context, _share, (job,)) as pool:
                parts = dict(zip(classes, pool.map(_score_shared, classes), strict=True))
        else:
            parts = {category: _score(job, category) for category in classes}
    finally:
        if collecting:
            gc.enable()
    return _joined(parts, params)


_shared: list[_Job] = []  # of a worker process


def _share(job: _Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    # Were that one killed, this one would wait for work for ever, with its memory and connections.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _shared[:] = [job]


def _score_shared(category: int) -> Arrays:
    return _score(_shared[0], category)


def _score(job: _Job, category: int) -> Arrays:
    """The numbers of one class, as those of `evaluate`."""
    # Imported where it is used: TEST.COCO_EVALUATOR pycocotools does not need it.
    from faster_coco_eval import COCO as FastCOCO
    from faster_coco_eval import COCOeval_faster

    objects, results = job.objects[category], job.results[category]
    # Images without either would change nothing.
    ids = sorted({one["image_id"] for one in (*objects, *results)})
    images = [job.truth.imgs[image_id] for image_id in ids]
    base = {"info": {}, "images": images, "categories": [job.truth.cats[category]]}
    truth, found = FastCOCO(), FastCOCO()
    truth.dataset = base | {"annotations": objects}
    truth.createIndex()
    if results and job.kind == "keypoints":
        found = truth.loadRes([dict(result) for result in results])
    else:
        # Its loadRes makes polygons of boxes and boxes of masks; only areas are needed.
        found.dataset = base | {"annotations": _with_areas(results)}
        found.createIndex()
    # To the library masks are boxes whose overlaps come from elsewhere.
    scored = COCOeval_faster(truth, found, "keypoints" if job.kind == "keypoints" else "bbox")
    scored.params.imgIds, scored.params.catIds = ids, [category]
    if job.kind == "keypoints":
        scored.params.kpt_oks_sigmas = job.params.kpt_oks_sigmas
    if job.kind == "segm":
        scored.computeIoU = _mask_overlaps(job, category)
    scored.evaluate()
    scored.accumulate()
    precision, scores = scored.eval["precision"], scored.eval["scores"]
    recall = np.asarray(scored.eval["recall"]).reshape(precision.shape[0], *precision.shape[2:])
    return {"precision": precision, "recall": recall, "scores": scores}


def _mask_overlaps(job: _Job, category: int) -> Callable[[int, int], np.ndarray]:
    """A function of an image (and the class) to the (detections, objects) IoU of their masks.

    Detections are those with the best scores, best first, objects as they come; to a crowd it is
    the share of the detection that lies in it. As pycocotools' COCOeval.computeIoU.
    """
    objects, results = defaultdict(list), defaultdict(list)
    for annotation in job.objects[category]:
        objects[annotation["image_id"]].append(annotation)
    for result in job.results[category]:
        results[result["image_id"]].append(result)

    def overlaps(image_id: int, _: int) -> np.ndarray:
        best = sorted(results[image_id], key=lambda result: -result["score"])
        return mask_util.iou(
            [result["segmentation"] for result in best[: job.params.maxDets[-1]]],
            [job.truth.annToRLE(annotation) for annotation in objects[image_id]],
            [int(annotation.get("iscrowd", 0)) for annotation in objects[image_id]],
        )

    return overlaps


def _with_areas(results: Sequence[dict]) -> list[dict]:
    """Results of boxes or masks as annotations: with id, area, and no crowds."""
    if results and "bbox" in results[0]:
        areas = [result["bbox"][2] * result["bbox"][3] for result in results]
    else:
        rles = [result["segmentation"] for result in results]
        areas = [
            area
            for begin in range(0, len(rles), _MASKS_AT_ONCE)
            for area in mask_util.area(rles[begin : begin + _MASKS_AT_ONCE]).tolist()
        ]
    no_box = {"bbox": [0, 0, 0, 0]}  # that of a mask is not used
    return [
        {**no_box, **result, "id": i, "area": area, "iscrowd": 0}
        for i, (result, area) in enumerate(zip(results, areas, strict=True), start=1)
    ]


def _joined(parts: dict[int, Arrays], params: Params) -> Arrays:
    axes = [len(params.iouThrs), len(params.catIds), len(params.areaRng), len(params.maxDets)]
    each = (axes[0], len(params.recThrs), *axes[1:])
    whole = {"precision": -np.ones(each), "recall": -np.ones(axes), "scores": -np.ones(each)}
    for k, category in enumerate(params.catIds):
        for name, values in parts.get(category, {}).items():
            whole[name][..., k, :, :] = values[..., 0, :, :]
    return whole
