"""Scoring beside a test gives what scoring after it gives; its failures arrive, its end is sure."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time

import numpy as np
import pytest

from core.errors import UserError
from datasets import json_dataset_evaluator, scoring_ahead, scoring_process, task_evaluation
from datasets.dataset_catalog import resolve_dataset
from datasets.demo_shapes import make_demo_data
from datasets.json_dataset import JsonDataset
from datasets.scoring_ahead import ScoringAhead
from utils.segms import compress_rle, mask_to_rle

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")
IMAGES = 40


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> str:
    return str(make_demo_data(tmp_path_factory.mktemp("demo"), num_train=1, num_val=IMAGES))


@pytest.fixture
def dataset(cfg, demo) -> JsonDataset:
    cfg.MODEL.MASK_ON = True
    return JsonDataset(resolve_dataset(demo).test_names[0])


def detections(dataset: JsonDataset) -> tuple[list, list, list]:
    """The objects, displaced, with scores of which many are equal; some images have none."""
    rng = np.random.default_rng(0)
    shape = len(dataset.classes), len(dataset.image_ids)
    boxes, segms, keyps = ([[[] for _ in range(shape[1])] for _ in range(shape[0])] for _ in "123")
    for i, image_id in enumerate(dataset.image_ids):
        for found in dataset.COCO.imgToAnns[image_id] * 2 if i % 7 else []:
            label = dataset.json_category_id_to_contiguous_id[found["category_id"]]
            x, y, w, h = found["bbox"]
            shift = rng.integers(-8, 9, 2)
            box = [x + shift[0], y + shift[1], x + w - 1, y + h - 1, rng.integers(1, 5) / 5]
            boxes[label][i].append(box)
            mask = np.roll(dataset.COCO.annToMask(found), shift[::-1], (0, 1))
            rle = compress_rle(mask_to_rle(mask))
            segms[label][i].append(rle | {"counts": rle["counts"].decode()})
    boxes = [[np.array(b, np.float32).reshape(-1, 5) for b in of_label] for of_label in boxes]
    boxes[0] = [[] for _ in range(shape[1])]
    return boxes, segms, keyps


def hand_over(ahead: ScoringAhead, found: tuple, order: np.ndarray) -> None:
    for i in order.tolist():
        ahead.add(i, *([of_label[i] for of_label in kind] for kind in found))
    ahead.complete()


@pytest.mark.parametrize("processes", [1, 6])  # these share out the classes
def test_the_scores_and_files_are_those_of_the_end(
    dataset, tmp_path, caplog, monkeypatch, processes
):
    monkeypatch.setattr(scoring_process, "available_cpus", lambda: processes)
    monkeypatch.setattr(scoring_ahead, "LAST_IMAGES", 10)  # larger pieces go before them
    found = detections(dataset)
    order = np.random.default_rng(1).permutation(IMAGES)  # as batches of one size each give them
    folders = tmp_path / "end", tmp_path / "ahead"
    with caplog.at_level(logging.INFO):
        at_end = task_evaluation.evaluate_all(dataset, *found, folders[0])
        said = [record.getMessage() for record in caplog.records]
        caplog.clear()
        with ScoringAhead(dataset, ["bbox", "segm"], folders[1]) as ahead:
            assert ahead._connection.poll(60)  # ready: images are sent as they come
            hand_over(ahead, found, order)
            results = task_evaluation.evaluate_all(dataset, *found, folders[1], ahead.result())
    assert results == at_end
    assert 0.05 < results[dataset.name]["box"]["AP"] < 0.95
    assert 0.05 < results[dataset.name]["mask"]["AP"] < 0.95
    again = [
        record.getMessage().replace(str(folders[1]), str(folders[0])) for record in caplog.records
    ]
    assert again == said
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] and len(names[0]) == 4
    for name in names[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_data_without_annotations_are_written_only(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(JsonDataset, "has_annotations", False)
    with ScoringAhead(dataset, ["bbox", "segm"], tmp_path) as ahead:
        hand_over(ahead, detections(dataset), np.arange(IMAGES))
        evaluations = ahead.result()
    assert [of_kind.stats for of_kind in evaluations.values()] == [None, None]
    for (kind, of_kind), name in zip(evaluations.items(), ("bbox", "segmentations"), strict=True):
        (message,) = of_kind.messages
        assert "no annotations to score by" in message and f"{name}_" in message, kind
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"] * 2


def test_the_test_does_not_wait_for_the_processes_to_begin(dataset, tmp_path, monkeypatch):
    found, handed_over = detections(dataset), multiprocessing.get_context("fork").Event()
    kind_of_results = scoring_process.kind_of_results

    def slow(*args):
        assert handed_over.wait(60)
        return kind_of_results(*args)

    monkeypatch.setattr(scoring_process, "kind_of_results", slow)
    with ScoringAhead(dataset, ["bbox"], tmp_path) as ahead:
        for i in range(IMAGES):
            ahead.add(i, *([of_label[i] for of_label in kind] for kind in found))
        assert len(ahead._waiting) == IMAGES  # none of them in a pipe that nobody reads
        handed_over.set()
        ahead.complete()
        stats = ahead.result()["bbox"].stats
    ahead._process.join(60)
    assert not ahead._process.is_alive()
    at_end = json_dataset_evaluator.evaluate_boxes(dataset, found[0], tmp_path / "end")
    np.testing.assert_array_equal(stats, at_end.stats)


def test_a_failure_arrives_with_its_traceback(dataset, tmp_path, monkeypatch):
    found = detections(dataset)

    def part(*_):
        raise ZeroDivisionError("in a process")

    monkeypatch.setattr("datasets.coco_results.KindOfResults.part", part)
    with (
        pytest.raises(RuntimeError, match=r"(?s)test_scoring_ahead.*ZeroDivisionError: in a proc"),
        ScoringAhead(dataset, ["bbox"], tmp_path) as ahead,
    ):
        hand_over(ahead, found, np.arange(IMAGES))
        ahead.result()


def test_a_user_s_mistake_stays_one(dataset, tmp_path, monkeypatch):
    def wrong(*_):
        raise UserError("sigmas are wrong")

    monkeypatch.setattr(scoring_process, "kind_of_results", wrong)
    with (
        pytest.raises(UserError, match="sigmas are wrong"),
        ScoringAhead(dataset, ["bbox"], tmp_path) as ahead,
    ):
        hand_over(ahead, detections(dataset), np.arange(IMAGES))
        ahead.result()


def test_a_process_that_is_killed_is_named_in_the_end(dataset, tmp_path, caplog):
    with ScoringAhead(dataset, ["bbox"], tmp_path) as ahead:
        ahead._process.kill()
        ahead._process.join()
        hand_over(ahead, detections(dataset), np.arange(IMAGES))  # the test itself goes on
        assert caplog.text.count("has ended by itself") == 1
        with pytest.raises(RuntimeError, match="has ended by itself"):
            ahead.result()


@pytest.mark.parametrize("doing", ["coco_results.KindOfResults.part", "scoring_process.accumulate"])
def test_a_process_of_the_pool_that_is_killed_is_no_riddle(dataset, tmp_path, monkeypatch, doing):
    def killed(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(f"datasets.{doing}", killed)
    with ScoringAhead(dataset, ["bbox"], tmp_path) as ahead:
        hand_over(ahead, detections(dataset), np.arange(IMAGES))
        with pytest.raises(RuntimeError, match="begun has ended by itself; if memory ran out"):
            ahead.result()


def test_an_interruption_ends_it_at_once(dataset, tmp_path):
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), ScoringAhead(dataset, ["bbox"], tmp_path) as ahead:
        hand_over(ahead, detections(dataset), np.arange(IMAGES))
        raise KeyboardInterrupt
    assert not ahead._process.is_alive() and time.monotonic() - begin < 60
