"""Proposal files: what is read from them, what becomes of it, and what is wrong with bad ones."""

from __future__ import annotations

import http.server
import pickle
import threading

import numpy as np
import pytest
import yaml

from core.config import assert_and_infer_cfg
from core.errors import UserError
from datasets.dataset_catalog import resolve_dataset
from datasets.json_dataset import JsonDataset
from datasets.proposals import (
    add_proposals,
    load_proposals,
    proposal_file_for_testing,
    proposal_files,
    read_proposal_file,
)
from datasets.roidb import combined_roidb_for_training
from utils.packed_roidb import PackedRoidb


def proposal_file(tmp_path, boxes, ids=(4, 1, 2, 3), changes=None):
    data = {"boxes": boxes, "scores": [np.ones(len(b)) for b in boxes], "ids": list(ids)}
    path = tmp_path / "proposals.pkl"
    path.write_bytes(pickle.dumps({**data, **(changes or {})}))
    return path


def test_proposals_are_appended_to_their_image(tiny_dataset, tmp_path):
    of_image_1 = [
        [10, 20, 39, 59],  # the cat
        [10.2, 20.2, 39.3, 59.1],  # the same after rounding
        [20, 20, 120, 59],  # reaches outside
        [50, 3, 52, 20],  # 3 wide
        [50, 3, 51, 20],  # 2 wide
        [6, 62, 30, 70],  # inside the crowd
    ]
    empty = np.zeros((0, 4))
    path = proposal_file(tmp_path, [empty, np.array(of_image_1), empty, empty])
    plain = JsonDataset("tiny").get_roidb(gt=True, proposal_file=path)[0]
    assert plain["boxes"][3:].tolist() == [
        [10, 20, 39, 59],
        [20, 20, 99, 59],
        [50, 3, 52, 20],
        [6, 62, 30, 70],
    ]
    assert plain["gt_classes"].tolist() == [1, 2, 1, 0, 0, 0, 0]
    assert plain["box_to_gt_ind_map"].tolist() == [0, 1, 2, 0, 0, -1, 2]
    overlap = 20 * 40 / (30 * 40 + 60 * 40)  # the cat has x 20 to 39 of the third proposal
    inside = 25 * 9 / (90 * 15)
    np.testing.assert_allclose(plain["max_overlaps"][3:], [1, overlap, 0, inside], rtol=1e-6)
    assert plain["max_classes"].tolist()[3:] == [1, 1, 0, 1]
    filtered = JsonDataset("tiny").get_roidb(True, path, crowd_filter_thresh=0.7)[0]
    assert filtered["max_overlaps"].tolist()[-1] == -1


def test_golden_crowd_filter(golden_data_dir, shared):
    golden = np.load(shared / "golden/targets/crowd_filter_0.7.npz")
    roidb, _, _ = combined_roidb_for_training("coco_2017_train")
    rois = golden["in_rois"]
    for i, index in enumerate(golden["roidb_idx"]):
        entry = dict(roidb[index])
        # Recorded from network input: 256 on the short side, at most 448 on the long one.
        scale = np.float32(256 / min(entry["height"], entry["width"]))
        proposals = rois[rois[:, 0] == i, 1:] / scale
        count = len(golden[f"im{i}_boxes"]) - len(entry["boxes"])
        assert len(proposals) == count
        add_proposals([entry], [golden[f"im{i}_boxes"][-count:]], 0.7)
        np.testing.assert_allclose(
            entry["gt_overlaps"].toarray(), golden[f"im{i}_gt_overlaps"], atol=1e-6
        )
        for key in ("max_classes", "box_to_gt_ind_map"):
            np.testing.assert_array_equal(entry[key], golden[f"im{i}_{key}"], err_msg=key)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": [4, 1, 2]}, "its lists differ in length"),
        ({"ids": [4, 1, 2, 9]}, "lacks 1 of 4 images .first: id 3"),
        ({"ids": ["4", "1", "2", "3"]}, "lacks 4 of 4 images .first: id 1"),
        ({"ids": [[4], [1], [2], [3]]}, "its 'ids' are not image ids"),
        ({"ids": 4}, "its 'ids' is not a list"),
        ({"boxes": [np.zeros((0, 4))] * 3 + [np.zeros((2, 5))]}, "boxes of image 3 are not rows"),
        ({"boxes": [np.full((1, 4), np.nan)] * 4}, "boxes of image 1 are not rows"),
        ({"boxes": [["a box"]] * 4}, "boxes of image 1 are not rows"),
        ({"boxes": print}, "is not a file of proposals .it refers to builtins.print"),
    ],
)
def test_bad_proposal_files(tiny_dataset, tmp_path, changes, message):
    path = proposal_file(tmp_path, [np.zeros((0, 4))] * 4, changes=changes)
    with pytest.raises(UserError, match=message) as raised:
        load_proposals(path, JsonDataset("tiny").get_roidb())
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a file of proposals"),
        (b"<!doctype html>", "is not a file of proposals"),
        (pickle.dumps([1, 2]), "is not a dict with 'boxes'"),
        (pickle.dumps({"all_boxes": []}), "is not a dict with 'boxes'"),
    ],
)
def test_files_of_another_kind(tmp_path, content, message):
    path = tmp_path / "proposals.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_proposal_file(path)


def test_a_file_runs_no_code(tmp_path):
    mark = tmp_path / "was_here"
    path = proposal_file(tmp_path, [np.zeros((0, 4))] * 4, changes={"x": Payload(f"touch {mark}")})
    with pytest.raises(UserError, match="system, which is not data"):
        read_proposal_file(path)
    assert not mark.exists()


def test_a_missing_proposal_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.pkl cannot be read"):
        load_proposals(tmp_path / "none.pkl", [])


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_every_age_of_pickle_is_read(tmp_path, protocol):
    path = tmp_path / "proposals.pkl"
    boxes = [np.array([[1, 2, 30, 40]], np.float32), np.zeros((0, 4), np.float32)]
    # numpy's own numbers as ids, and selective search's name for them
    data = {"boxes": boxes, "scores": [np.ones(1), np.ones(0)], "indexes": np.array([7, 3])}
    path.write_bytes(pickle.dumps(data, protocol))
    entries = [{"id": 3, "height": 50, "width": 50}, {"id": 7, "height": 50, "width": 50}]
    assert [len(b) for b in load_proposals(path, entries)] == [0, 1]


def test_the_limit_keeps_the_first(tiny_dataset, tmp_path):
    boxes = np.array([[0, 0, 10 + i, 20] for i in range(6)])
    path = proposal_file(tmp_path, [boxes] * 4)
    roidb = JsonDataset("tiny").get_roidb()
    assert load_proposals(path, roidb, limit=2)[0][:, 2].tolist() == [10, 11]
    assert len(load_proposals(path, roidb)[0]) == 6


def test_several_files_may_share_the_images_of_a_set(cfg, tiny_dataset, tmp_path):
    cfg.TRAIN.DATASETS, cfg.TRAIN.PROPOSAL_FILES = ("tiny",), ("a.pkl", "b.pkl")
    assert proposal_files("TRAIN") == (("a.pkl", "b.pkl"),)
    boxes = np.array([[1, 1, 20, 20]])
    for name, ids in (("a", (3, 1)), ("b", (4, 2))):
        (tmp_path / name).mkdir()
        files = [boxes + i for i in ids]
        proposal_file(tmp_path / name, files, ids)
    paths = tuple(str(tmp_path / name / "proposals.pkl") for name in "ab")
    roidb = JsonDataset("tiny").get_roidb()
    found = load_proposals(paths, roidb)
    assert [b[0, 0] for b in found] == [1 + entry["id"] for entry in roidb]
    with pytest.raises(UserError, match=r"a.proposals.pkl lacks"):
        load_proposals(paths[0], roidb)
    cfg.TRAIN.USE_FLIPPED = False
    roidb, _, _ = combined_roidb_for_training(("tiny",), paths)
    assert all((entry["gt_classes"] == 0).sum() == 1 for entry in roidb)


def test_a_url_is_fetched_once(cfg, tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "set").mkdir(parents=True)
    proposal_file(site / "set", [np.array([[1, 1, 20, 20]])] * 4)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(site))

        def log_message(self, *args):
            asked.append(self.path)

    cfg.DATA_DIR = str(tmp_path / "data")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/set/proposals.pkl"
        entries = [{"id": 1, "height": 50, "width": 50}]
        first = load_proposals(url, entries)
        requests = len(asked)
        second = load_proposals(url, entries)
        server.shutdown()
    assert first[0].tolist() == second[0].tolist() == [[1, 1, 20, 20]]
    assert requests and len(asked) == requests
    assert (tmp_path / "data/proposals/set/proposals.pkl").is_file()


# From the config to the loader


def test_there_must_be_a_file_for_each_data_set(cfg):
    cfg.TRAIN.DATASETS, cfg.TRAIN.PROPOSAL_FILES = ("a", "b"), ("a.pkl",)
    with pytest.raises(UserError, match=r"TRAIN.PROPOSAL_FILES must name one .* \(a, b\), not 1"):
        proposal_files("TRAIN")
    cfg.TRAIN.PROPOSAL_FILES = ("a.pkl", "b.pkl")
    assert proposal_files("TRAIN") == ("a.pkl", "b.pkl")


def test_users_data_may_name_their_proposals(cfg, tiny_files, tmp_path):
    split = {"annotations": str(tiny_files.annotations), "images": str(tiny_files.images)}
    file = tmp_path / "tiny.yaml"
    proposals = {"train": "proposals.pkl", "val": "https://example.org/val.pkl"}
    data = {key: {**split, "proposals": value} for key, value in proposals.items()}
    file.write_text(yaml.safe_dump(data))
    dataset = resolve_dataset(str(file))
    cfg.TRAIN.DATASETS, cfg.TEST.DATASETS = dataset.train_names, dataset.test_names
    assert proposal_files("TRAIN") == (str(tmp_path / "proposals.pkl"),)
    assert proposal_files("TEST") == ("https://example.org/val.pkl",)
    assert proposal_file_for_testing("tiny_val") == "https://example.org/val.pkl"
    assert proposal_file_for_testing("another") is None


def test_a_model_with_an_rpn_reads_no_file(cfg):
    cfg.TRAIN.DATASETS, cfg.TRAIN.PROPOSAL_FILES = ("a", "b"), ("a.pkl",)
    cfg.MODEL.FASTER_RCNN = True
    assert_and_infer_cfg(make_immutable=False)
    assert proposal_files("TRAIN") == (None, None)


def test_mirrored_copies_have_mirrored_proposals(cfg, tiny_dataset, tmp_path):
    boxes = np.array([[12, 22, 41, 61], [6, 62, 30, 70]])  # the second lies inside the crowd
    path = proposal_file(tmp_path, [boxes] * 4)
    cfg.TRAIN.CROWD_FILTER_THRESH = 0.7
    roidb, _, _ = combined_roidb_for_training(tiny_dataset.train_names, (str(path),))
    entries = [e for e in roidb if e["id"] == 1]
    assert [e["flipped"] for e in entries] == [False, True]
    packed = PackedRoidb.pack(entries)
    # What the crowd filter leaves out can never be drawn: it does not reach the loader.
    assert packed[0]["proposals"].tolist() == [[12, 22, 41, 61]]
    assert packed[1]["proposals"].tolist() == [[99 - 41, 22, 99 - 12, 61]]
    assert len(packed[0]["boxes"]) == len(packed[0]["segms"]) == 3


def test_an_image_may_live_by_its_proposals_alone(cfg, tiny_dataset, tmp_path):
    """Image 4 has a crowd only: a background proposal makes it one to train on."""
    path = proposal_file(tmp_path, [np.array([[0, 0, 40, 20]])] * 4)
    without, _, _ = combined_roidb_for_training(tiny_dataset.train_names)
    roidb, _, _ = combined_roidb_for_training(tiny_dataset.train_names, (str(path),))
    assert 4 not in {e["id"] for e in without}
    assert {e["id"] for e in roidb} == {1, 2, 3, 4}
