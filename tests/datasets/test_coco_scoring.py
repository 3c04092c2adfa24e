"""The fast evaluator has pycocotools' numbers; keypoints of any number have their own sigmas."""

from __future__ import annotations

import copy
import json
import pickle
from itertools import pairwise

import numpy as np
import pytest
from pycocotools import mask as mask_util
from pycocotools.cocoeval import COCOeval

from core.benchmark_eval import synthesise
from core.errors import UserError
from datasets import coco_scoring, json_dataset_evaluator
from datasets.coco_matching import Matches, accumulate, blank_sums, class_borders
from datasets.coco_results import image_found
from datasets.dataset_catalog import resolve_dataset
from datasets.json_dataset import JsonDataset

FILES = {
    "bbox": ("coco/annotations/instances_val2017.json", "coco/images/val2017"),
    "segm": ("coco/annotations/instances_val2017.json", "coco/images/val2017"),
    "keypoints": ("coco/annotations/person_keypoints_val2017.json", "coco/images/val2017"),
}
EXACT = {"rtol": 0, "atol": 1e-12}


def real(shared, kind: str) -> JsonDataset:
    annotations, images = (shared / "data" / part for part in FILES[kind])
    return JsonDataset(resolve_dataset(f"{annotations}:{images}").test_names[0])


def both(dataset: JsonDataset, results: list, kind: str, image_ids=None, sigmas=None) -> list:
    ids = dataset.image_ids if image_ids is None else image_ids
    scored = [
        coco_scoring.evaluate(dataset.COCO, results, kind, ids, evaluator, sigmas)
        for evaluator in ("fast", "pycocotools")
    ]
    for one in scored:
        one.summarize()
    return scored


def assert_equal(fast: COCOeval, reference: COCOeval) -> None:
    np.testing.assert_allclose(fast.stats, reference.stats, **EXACT)
    for key in ("precision", "recall", "scores"):
        np.testing.assert_allclose(fast.eval[key], reference.eval[key], err_msg=key, **EXACT)


@pytest.mark.parametrize("kind", list(FILES))
def test_fast_numbers_are_pycocotools_numbers(shared, cfg, kind):
    dataset = real(shared, kind)
    dataset.image_ids = dataset.image_ids[:: 2 if kind == "keypoints" else 5]
    results = synthesise(dataset, np.random.default_rng(0))[kind]
    before = copy.deepcopy((dataset.COCO.dataset["annotations"], results))
    fast, reference = both(dataset, results, kind)
    assert_equal(fast, reference)
    assert 0.1 < reference.stats[0] < 0.9
    # Ground truth is cached for the whole process: an evaluation must not write to it.
    assert (dataset.COCO.dataset["annotations"], results) == before
    # Equal scores, more detections of a class than count, and only some of the images.
    some = dataset.image_ids[::4]
    results = [r | {"score": round(r["score"], 1)} for r in results if r["image_id"] in some]
    assert_equal(*both(dataset, results * 6, kind, some))


def test_several_processes_have_the_same_numbers(shared, cfg, monkeypatch):
    monkeypatch.setattr(coco_scoring, "RESULTS_OF_A_PROCESS", 1)
    dataset = real(shared, "segm")
    dataset.image_ids = dataset.image_ids[::10]
    results = synthesise(dataset, np.random.default_rng(0))["segm"]
    alone, together = (
        coco_scoring.evaluate(
            dataset.COCO, results, "segm", dataset.image_ids, "fast", processes=number
        )
        for number in (1, 3)
    )
    assert together.eval["precision"].max() > 0
    for key in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(together.eval[key], alone.eval[key])


@pytest.mark.parametrize("groups", [1, 3, 16])
def test_classes_are_added_up_apart_as_together(groups):
    """Of 7 classes, one of which most detections have, one without any."""
    rng, params = np.random.default_rng(0), COCOeval(iouType="bbox").params
    params.catIds = list(range(7))
    parts = []
    for image in range(5):
        n = int(rng.integers(40))
        category = np.sort(rng.choice(7, n, p=(0, 0.05, 0.05, 0.7, 0.1, 0.05, 0.05)))
        bits = rng.integers(0, 256, (2, n, 5), dtype=np.uint8)
        rank = np.arange(n) - np.searchsorted(category, category)
        objects = rng.integers(0, 200, (4, 7))  # more in all than a byte holds
        parts.append(
            Matches(np.full(n, image), category, rank, rng.random(n), bits[0], bits[1], objects)
        )
    whole, apart = blank_sums(params), blank_sums(params)
    accumulate(parts, params, whole)
    borders, objects = class_borders(7, groups), sum(part.objects for part in parts)
    assert borders[0] == 0 and borders[-1] == 7 and (np.diff(borders) >= 0).all()
    every = np.concatenate([part.rows() for part in parts])
    for begin, end in pairwise(borders.tolist()):
        rows = every[(every["category"] >= begin) & (every["category"] < end)]
        there = np.zeros_like(objects)
        there[:, begin:end] = objects[:, begin:end]
        accumulate([Matches.of_rows(rows, there)], params, apart)
    assert whole["precision"].max() > 0
    for key in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(apart[key], whole[key])


def test_nothing_found_is_scored(tiny_dataset, cfg):
    dataset = JsonDataset(tiny_dataset.train_names[0])
    fast, reference = both(dataset, [], "bbox")
    assert_equal(fast, reference)
    assert reference.stats[0] == 0


def found_rle(result: dict) -> dict:
    rle = result["segmentation"]
    return rle | {"counts": rle["counts"].decode()}


@pytest.mark.parametrize("segmentation", [[], [[10, 20, 40, 20]]])
def test_objects_without_a_mask_are_neither_right_nor_wrong(tiny_files, cfg, segmentation):
    def change(data):
        data["annotations"][0]["segmentation"] = segmentation
        data["annotations"][3]["segmentation"].append([10, 30, 35, 50])

    whole = JsonDataset(resolve_dataset(tiny_files.spec).test_names[0])
    results = [
        {
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "segmentation": whole.COCO.annToRLE(annotation),
            "bbox": annotation["bbox"],
            "score": 0.9,
        }
        for annotation in whole.COCO.dataset["annotations"]
        if not annotation["iscrowd"]
    ]
    found = whole.COCO.anns[11]
    beside = found | {"segmentation": [[60.0, 0, 90, 0, 90, 10, 60, 10]]}
    results.append(results[0] | {"segmentation": whole.COCO.annToRLE(beside), "score": 0.95})
    with_it, _ = both(whole, results, "segm")
    tiny_files.edit(change)
    dataset = JsonDataset(resolve_dataset(tiny_files.spec).test_names[0])
    assert dataset.COCO.anns[11]["segmentation"] == segmentation
    fast, reference = both(dataset, results, "segm")
    assert_equal(fast, reference)
    taken = coco_scoring.objects_of(fast.cocoGt, [0, 1], "segm", fast.params)
    assert taken.crowd.tolist() == [True, False, True, False]
    areas = mask_util.area([taken.to_rle(annotation) for annotation in taken.shapes])
    assert areas[0] == 30 * 40 and areas.min() > 0
    # As the processes that score during a test match them.
    of_kind = json_dataset_evaluator.kind_of_results(dataset, "segm")
    boxes, segms = ([[] for _ in dataset.classes] for _ in range(2))
    boxes[1], segms[1] = np.array([[10, 20, 39, 59, 0.9]], np.float32), [found_rle(results[0])]
    part = of_kind.part([image_found(0, boxes, segms)])
    assert np.unpackbits(part.matches.ignored).any() and (part.matches.objects[:, 1] == 0).all()
    before, after = with_it.eval["precision"], fast.eval["precision"]
    dog, cat = 0, 1  # in the order of their ids
    assert 0 < before[0, :, cat, 0, 2].mean() < 1  # what is beside the cat is wrong
    assert (after[:, :, cat] == -1).all()  # no cat is left to be found
    np.testing.assert_array_equal(after[:, :, dog], before[:, :, dog])
    boxes, reference = both(dataset, results, "bbox")
    assert_equal(boxes, reference)
    assert boxes.eval["precision"][0, :, cat, 0, 2].max() > 0


@pytest.mark.parametrize("box", [[0, 0, 1e12, 1e12], [1e12, 5, 10, 10], [-1e12, 0, 5, 5]])
def test_a_box_in_place_of_a_mask_ends_at_the_image(box):
    annotation = {"bbox": box, "segmentation": [], "iscrowd": 0}
    (polygon,) = coco_scoring.with_mask(annotation, {"width": 60, "height": 40})["segmentation"]
    assert min(polygon) >= 0 and max(polygon[::2]) <= 60 and max(polygon[1::2]) <= 40


def test_the_key_chooses_and_the_pickle_is_pycocotools(tiny_dataset, cfg, tmp_path, monkeypatch):
    dataset = JsonDataset(tiny_dataset.train_names[0])
    boxes = [[[] for _ in dataset.image_ids] for _ in dataset.classes]
    boxes[1][0] = np.array([[10, 20, 39, 59, 0.9]])
    used = []
    evaluate = coco_scoring.evaluate
    monkeypatch.setattr(
        coco_scoring, "evaluate", lambda *args: used.append(args[4]) or evaluate(*args)
    )
    for name in ("fast", "pycocotools"):
        cfg.TEST.COCO_EVALUATOR = name
        found = json_dataset_evaluator.evaluate_boxes(dataset, boxes, tmp_path)
        with open(tmp_path / "detection_results.pkl", "rb") as file:
            loaded = pickle.load(file)
        assert type(loaded) is COCOeval
        loaded.summarize()
        np.testing.assert_array_equal(loaded.stats, found.stats)
    assert used == ["pycocotools"]


def hands(tmp_path, **category) -> JsonDataset:
    """Two hands of five points, one of them unlabelled, and a ball without points."""
    points = np.array([[20, 20, 2], [40, 20, 2], [60, 20, 1], [20, 60, 2], [0, 0, 0]], float)
    objects = [
        {"id": 1, "category_id": 1, "keypoints": points.reshape(-1).tolist()},
        {"id": 2, "category_id": 1},
        {"id": 3, "category_id": 2},
    ]
    hand = {"id": 1, "name": "hand", "keypoints": list("abcde"), "skeleton": []} | category
    data = {
        "images": [{"id": 1, "file_name": "1.png", "height": 100, "width": 100}],
        "annotations": [o | {"image_id": 1, "bbox": [10, 10, 80, 80]} for o in objects],
        "categories": [hand, {"id": 2, "name": "ball"}],
    }
    file = tmp_path / "hands.json"
    file.write_text(json.dumps(data))
    return JsonDataset(resolve_dataset(f"{file}:{tmp_path}").test_names[0])


@pytest.mark.parametrize("evaluator", ["fast", "pycocotools"])
def test_sigmas_of_the_data_set_decide(tmp_path, cfg, evaluator):
    """Each point is displaced by 12 px: OKS is the mean of exp(-d^2 / (2 area (2 sigma)^2))."""
    cfg.TEST.COCO_EVALUATOR = evaluator
    cfg.MODEL.KEYPOINTS_ON = True
    given = [0.1, 0.2, 0.15, 0.1, 0.3]
    dataset = hands(tmp_path, sigmas=given)
    sigmas = np.array(given)[:4]  # the last point is not labelled
    oks = np.exp(-(12**2) / (2 * 80 * 80 * (2 * sigmas) ** 2)).mean()
    assert 0.8 < oks < 0.85
    points = np.array(dataset.COCO.anns[1]["keypoints"]).reshape(-1, 3).T
    points = np.concatenate((points[:1] + 12, points[1:2], np.zeros((2, 5))))
    boxes = [[[]], [np.array([[10, 10, 89, 89, 0.9]])], [[]]]
    found = json_dataset_evaluator.evaluate_keypoints(
        dataset, boxes, [[[]], [[points]], [[]]], tmp_path
    )
    thresholds = np.arange(0.5, 1, 0.05)
    assert found.stats[0] == pytest.approx(np.mean(oks >= thresholds), abs=1e-9)


def test_sigmas_without_being_given(tmp_path, cfg, shared):
    assert coco_scoring.keypoint_sigmas(real(shared, "keypoints").COCO) is None
    mean = COCOeval(iouType="keypoints").params.kpt_oks_sigmas.mean()
    np.testing.assert_allclose(coco_scoring.keypoint_sigmas(hands(tmp_path).COCO), [mean] * 5)


@pytest.mark.parametrize("sigmas", [[0.1, 0.1], [0.1, 0.1, 0, 0.1, 0.1]])
def test_wrong_sigmas_are_one_sentence(tmp_path, cfg, sigmas):
    with pytest.raises(UserError, match="hand.*sigmas.*5 keypoints"):
        coco_scoring.keypoint_sigmas(hands(tmp_path, sigmas=sigmas).COCO)
