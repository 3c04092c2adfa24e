"""Proposals of a data set: Detectron's file, the same whatever the batch, kept when interrupted."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_test_engine import DEMO_CONFIG, demo_data

from core import rpn_generator
from core.config import assert_and_infer_cfg, merge_cfg_from_file, merge_cfg_from_list
from core.errors import UserError
from core.rpn_generator import (
    ProposalResults,
    batch_proposals,
    evaluate_proposal_file,
    generate_proposals,
    im_proposals,
)
from core.test_results import join_parts
from datasets.dataset_catalog import resolve_dataset
from datasets.json_dataset import JsonDataset
from datasets.proposals import load_proposals

__all__ = ["demo_data"]


@pytest.fixture
def model(cfg):
    """The demo's RPN alone, untrained."""
    from modeling.model_builder import Generalized_RCNN

    merge_cfg_from_file(DEMO_CONFIG)
    options = ["MODEL.FASTER_RCNN", False, "MODEL.MASK_ON", False, "MODEL.RPN_ONLY", True]
    merge_cfg_from_list([*options, "MODEL.NUM_CLASSES", 4, "TEST.RPN_POST_NMS_TOP_N", 60])
    merge_cfg_from_list(["DATA_LOADER.NUM_THREADS", 0])
    assert_and_infer_cfg()
    torch.manual_seed(3)
    return Generalized_RCNN().eval()


@pytest.fixture
def dataset(model, demo_data) -> JsonDataset:
    return JsonDataset(resolve_dataset(str(demo_data)).test_names[0])


def test_the_file_is_detectrons(dataset, model, tmp_path):
    generate_proposals(model, dataset, tmp_path)
    with (tmp_path / "rpn_proposals.pkl").open("rb") as file:
        content = pickle.load(file)
    assert set(content) == {"boxes", "scores", "ids", "cfg"}
    assert content["ids"] == dataset.image_ids
    assert yaml.safe_load(content["cfg"])["MODEL"]["RPN_ONLY"] is True
    for boxes, scores in zip(content["boxes"], content["scores"], strict=True):
        assert boxes.dtype == scores.dtype == np.float32
        assert boxes.shape == (len(scores), 4) and 0 < len(scores) <= 60
        assert (np.diff(scores) <= 0).all()
    assert [p.name for p in tmp_path.iterdir()] == ["rpn_proposals.pkl"]
    # and what a training reads
    roidb = dataset.get_roidb()
    loaded = load_proposals(tmp_path / "rpn_proposals.pkl", roidb)
    for boxes, entry in zip(loaded, roidb, strict=True):
        assert (boxes >= 0).all() and (boxes[:, 2] < entry["width"]).all() and len(boxes)


def test_boxes_are_in_image_pixels(model, cfg):
    image = np.random.RandomState(0).randint(0, 256, (80, 110, 3)).astype(np.uint8)
    boxes, scores = im_proposals(model, image)
    import utils.blob as blob_utils

    data, scales, im_info = blob_utils.prep_images(
        [image], cfg.TEST.SCALE, cfg.TEST.MAX_SIZE, torch.device("cpu")
    )
    found = model.propose(data, im_info)
    np.testing.assert_allclose(boxes * scales[0], found.boxes[found.valid].numpy(), atol=1e-3)
    np.testing.assert_allclose(scores, found.scores[found.valid].numpy(), atol=1e-5)


def test_a_batch_changes_nothing(dataset, model, tmp_path):
    one = generate_proposals(model, dataset, tmp_path / "1")
    four = generate_proposals(model, dataset, tmp_path / "4", batch_size=4)
    assert one.ids == four.ids
    for a, b, s, t in zip(one.boxes, four.boxes, one.scores, four.scores, strict=True):
        assert len(a) == len(b)
        np.testing.assert_allclose(s, t, atol=1e-5)
        np.testing.assert_allclose(np.sort(a, axis=0), np.sort(b, axis=0), atol=1e-2)


def test_parts_join_to_the_whole(dataset, model, tmp_path):
    whole = generate_proposals(model, dataset, tmp_path / "whole")
    ranges = [(0, 3), (3, 7)]
    for ind_range in ranges:
        generate_proposals(model, dataset, tmp_path, ind_range)
    assert (tmp_path / "rpn_proposals_range_0_3.pkl").is_file()
    joined = join_parts(tmp_path, ranges, ProposalResults)
    assert joined.ids == whole.ids
    for a, b in zip(joined.boxes, whole.boxes, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not list(tmp_path.glob("*range*"))


def test_an_interrupted_run_goes_on(dataset, model, tmp_path, monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return batch_proposals(*args)

    monkeypatch.setattr(rpn_generator, "batch_proposals", counted)
    with pytest.raises(KeyboardInterrupt):
        generate_proposals(model, dataset, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["rpn_proposals_range_0_7.pkl"]
    results = generate_proposals(model, dataset, tmp_path)
    assert len(calls) == 4 + 4  # three of seven images were done
    assert results.ids == dataset.image_ids and all(len(b) for b in results.boxes)
    assert [p.name for p in tmp_path.iterdir()] == ["rpn_proposals.pkl"]


@pytest.mark.parametrize("ind_range", [(0, 8), (3, 3)])
def test_a_range_outside_the_data_set_is_refused(dataset, model, tmp_path, ind_range):
    with pytest.raises(UserError, match="7 images"):
        generate_proposals(model, dataset, tmp_path / "out", ind_range)
    assert not (tmp_path / "out").exists()


def test_an_unreadable_image_ends_the_run_by_name(dataset, model, tmp_path, monkeypatch):
    broken = tmp_path / "broken.jpg"
    broken.write_text("no image")
    roidb = dataset.get_roidb()
    roidb[0]["image"] = str(broken)
    monkeypatch.setattr(dataset, "get_roidb", lambda: roidb)
    with pytest.raises(UserError, match=r"broken\.jpg"):
        generate_proposals(model, dataset, tmp_path / "out")


def test_ground_truth_in_a_file_is_recalled(dataset, tmp_path):
    roidb = dataset.get_roidb(gt=True)
    truth = ProposalResults.blank(len(roidb))
    for i, entry in enumerate(roidb):
        truth.extend(i, entry["id"], entry["boxes"], np.ones(len(entry["boxes"])))
    truth.save(tmp_path / "gt.pkl")
    results = evaluate_proposal_file(dataset, tmp_path / "gt.pkl", tmp_path)
    metrics = results[dataset.name]["box_proposal"]
    assert metrics["AR@100"] == metrics["AR@1000"] == 1.0
    with (tmp_path / "rpn_proposal_recall.pkl").open("rb") as file:
        assert pickle.load(file)[dataset.name]["box_proposal"]["AR@100"] == 1.0


def test_a_file_without_an_image_is_named(dataset, tmp_path):
    part = ProposalResults.blank(1)
    part.extend(0, dataset.image_ids[0], np.zeros((0, 4)), np.zeros(0))
    path: Path = tmp_path / "part.pkl"
    part.save(path)
    with pytest.raises(UserError, match=r"part\.pkl lacks 6 of 7 images"):
        evaluate_proposal_file(dataset, path, tmp_path)
