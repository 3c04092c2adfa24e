"""A data set to results: the same whatever the batch, in Detectron's file, or a clear sentence."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from core import test_engine, test_results
from core.config import assert_and_infer_cfg, merge_cfg_from_file
from core.errors import UserError
from core.test_engine import test_net as run_test_net  # or pytest would collect it
from core.test_pipeline import detect_files, plan_batches
from core.test_results import DatasetResults, load_detections
from datasets import scoring_ahead
from datasets.dataset_catalog import resolve_dataset
from datasets.demo_shapes import make_demo_data
from datasets.json_dataset import JsonDataset
from datasets.scoring_ahead import ScoringAhead
from modeling.model_builder import Generalized_RCNN

DEMO_CONFIG = (
    Path(__file__).resolve().parents[2] / "configs/demo/e2e_mask_rcnn_R-50-FPN_gn_demo.yaml"
)


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory) -> Path:
    return make_demo_data(tmp_path_factory.mktemp("demo"), num_train=1, num_val=7)


@pytest.fixture
def model(cfg) -> Generalized_RCNN:
    """The demo's detector, untrained, which finds something everywhere."""
    merge_cfg_from_file(DEMO_CONFIG)
    cfg.MODEL.NUM_CLASSES = 4
    cfg.TEST.SCORE_THRESH = 0.2
    cfg.DATA_LOADER.NUM_THREADS = 0
    assert_and_infer_cfg()
    torch.manual_seed(3)
    return Generalized_RCNN().eval()


@pytest.fixture
def dataset(model, demo_data) -> JsonDataset:
    return JsonDataset(resolve_dataset(str(demo_data)).test_names[0])


def test_batches_hold_images_of_equal_padded_size(model):
    sizes = [(160, 160), (120, 160), (150, 150), (160, 160), (120, 160), (160, 160)]
    batches = plan_batches(len(sizes), sizes, 2)
    assert batches == [[0, 2], [3, 5], [1, 4]]
    assert plan_batches(3, None, 8) == [[0], [1], [2]]


def test_results_do_not_depend_on_the_batch(dataset, model, tmp_path):
    one = run_test_net(model, dataset, tmp_path / "1", batch_size=1)
    four = run_test_net(model, dataset, tmp_path / "4", batch_size=4)
    assert sum(len(boxes) for per_image in one.all_boxes for boxes in per_image) > 20
    for j in range(1, 4):
        for i in range(7):
            np.testing.assert_allclose(one.all_boxes[j][i], four.all_boxes[j][i], atol=1e-3)
            assert len(one.all_segms[j][i]) == len(four.all_segms[j][i])


@pytest.mark.gpu
def test_the_gpu_finds_what_the_cpu_finds(dataset, model, tmp_path, monkeypatch):
    # TF32 would change scores in the fourth digit, and with them what is suppressed.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    cpu = run_test_net(model, dataset, tmp_path / "cpu", batch_size=4)
    gpu = run_test_net(model.cuda(), dataset, tmp_path / "gpu", batch_size=4)
    for j in range(1, 4):
        for i in range(7):
            found, wanted = gpu.all_boxes[j][i], cpu.all_boxes[j][i]
            assert len(found) == len(wanted) == len(gpu.all_segms[j][i])
            # Scores that differ in the sixth digit may change places.
            apart = np.abs(found[:, None] - wanted[None]).max(-1, initial=0)
            assert (apart < 1e-2).any(0).all() and (apart < 1e-2).any(1).all()


def test_the_detections_file_is_detectron_s(dataset, model, tmp_path):
    run_test_net(model, dataset, tmp_path)
    with (tmp_path / "detections.pkl").open("rb") as file:
        content = pickle.load(file)
    assert set(content) == {"all_boxes", "all_segms", "all_keyps", "cfg"}
    for key in ("all_boxes", "all_segms", "all_keyps"):
        assert [len(per_image) for per_image in content[key]] == [7] * 4
        assert content[key][0] == [[]] * 7
    for j in range(1, 4):
        for i, entry in enumerate(dataset.get_roidb()):
            boxes, segms = content["all_boxes"][j][i], content["all_segms"][j][i]
            assert boxes.dtype == np.float32
            assert boxes.shape == (len(segms), 5)
            for rle in segms:
                assert rle["size"] == [entry["height"], entry["width"]]
                assert isinstance(rle["counts"], str)
    assert yaml.safe_load(content["cfg"])["FPN"]["DIM"] == 64
    assert sorted(p.name for p in tmp_path.iterdir()) == ["detections.pkl"]


def test_a_range_gives_the_same_detections_in_a_part_file(dataset, model, tmp_path):
    whole = run_test_net(model, dataset, tmp_path)
    part = run_test_net(model, dataset, tmp_path, (2, 5))
    assert (tmp_path / "detection_range_2_5.pkl").exists()
    for j in range(1, 4):
        assert len(part.all_boxes[j]) == 3
        for i in range(3):
            np.testing.assert_array_equal(part.all_boxes[j][i], whole.all_boxes[j][i + 2])
            assert part.all_segms[j][i] == whole.all_segms[j][i + 2]


@pytest.mark.parametrize("ind_range", [(0, 8), (3, 3), (-1, 2)])
def test_a_range_outside_the_data_set_is_refused(dataset, model, tmp_path, ind_range):
    with pytest.raises(UserError, match="7 images"):
        run_test_net(model, dataset, tmp_path / "out", ind_range)
    assert not (tmp_path / "out").exists()


def test_pictures_on_request(dataset, model, tmp_path):
    run_test_net(model, dataset, tmp_path, (2, 3), vis=True)
    (picture,) = (tmp_path / "vis").iterdir()
    assert picture.stem == Path(dataset.get_roidb()[2]["image"]).stem
    assert picture.read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("thresh", [0.0, 1.0])
def test_pictures_show_what_scores_vis_th(dataset, model, tmp_path, cfg, monkeypatch, thresh):
    seen = []
    monkeypatch.setattr(test_engine, "vis_one_image", lambda *_, thresh, **__: seen.append(thresh))
    cfg.freeze(False)
    cfg.VIS_TH = thresh
    run_test_net(model, dataset, tmp_path, (0, 1), vis=True)
    assert seen == [thresh]


def test_an_unreadable_image_ends_the_test_by_name(model, tmp_path):
    data = make_demo_data(tmp_path, num_train=1, num_val=3)
    dataset = JsonDataset(resolve_dataset(str(data)).test_names[0])
    broken = Path(dataset.get_roidb()[1]["image"])
    broken.write_text("not an image")
    with pytest.raises(UserError, match=broken.name):
        run_test_net(model, dataset, tmp_path / "out")
    assert part_names(tmp_path / "out") == ["detection_range_0_3.pkl"]  # the first is kept


def interrupted_after(count: int):
    """detect_files that is interrupted when `count` images are done."""

    def detect(*args, **kwargs):
        for done, found in enumerate(detect_files(*args, **kwargs)):
            if done == count:
                raise KeyboardInterrupt
            yield found

    return detect


def counted(counts: list[int]):
    """detect_files that notes how many images it is asked for."""

    def detect(model, paths, *args, **kwargs):
        counts.append(len(paths))
        return detect_files(model, paths, *args, **kwargs)

    return detect


def test_an_interrupted_test_goes_on_where_it_was(dataset, model, tmp_path, monkeypatch):
    whole = run_test_net(model, dataset, tmp_path / "whole")
    monkeypatch.setattr(test_engine, "detect_files", interrupted_after(3))
    for ind_range in (None, (4, 7)):
        with pytest.raises(KeyboardInterrupt):
            run_test_net(model, dataset, tmp_path, ind_range, batch_size=2)
        monkeypatch.setattr(test_engine, "detect_files", interrupted_after(1))
    assert part_names(tmp_path) == ["detection_range_0_7.pkl", "detection_range_4_7.pkl"]
    counts: list[int] = []
    monkeypatch.setattr(test_engine, "detect_files", counted(counts))
    resumed = run_test_net(model, dataset, tmp_path)
    assert sum(counts) < 7 - 3
    assert_same_detections(resumed, whole)
    assert part_names(tmp_path) == []


def test_a_part_of_other_weights_or_settings_is_not_used(dataset, model, tmp_path, monkeypatch):
    run_test_net(model, dataset, tmp_path, (0, 4))
    counts: list[int] = []
    monkeypatch.setattr(test_engine, "detect_files", counted(counts))
    run_test_net(model, dataset, tmp_path, (1, 3), amp="bf16")
    with torch.no_grad():
        model.Box_Outs.cls_score.bias[1] += 0.1
    run_test_net(model, dataset, tmp_path, (2, 4))
    run_test_net(model, dataset, tmp_path, (2, 3))  # this one is known by now
    assert counts == [2, 2, 0]


def test_what_is_done_is_written_while_the_test_runs(dataset, model, tmp_path, monkeypatch):
    """As a test that is killed leaves it: without a chance to write anything."""
    monkeypatch.setattr(test_results, "SECONDS_BETWEEN_PARTS", 0.0)
    seen = []

    def watched(*args, **kwargs):
        for found in detect_files(*args, **kwargs):
            seen.extend(load_detections(path)[1]["done"].sum() for path in tmp_path.iterdir())
            yield found

    monkeypatch.setattr(test_engine, "detect_files", watched)
    run_test_net(model, dataset, tmp_path, (0, 4))
    assert seen == [1, 2, 3]


def test_a_damaged_part_file_is_left_alone(dataset, model, tmp_path, caplog):
    (tmp_path / "detection_range_0_3.pkl").write_bytes(b"no pickle")
    found = run_test_net(model, dataset, tmp_path, (2, 5))
    assert found.num_images == 3
    assert "detection_range_0_3.pkl is damaged" in caplog.text


def part_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("detection_range_*"))


def assert_same_detections(found: DatasetResults, expected: DatasetResults) -> None:
    for j in range(1, 4):
        for i in range(7):
            np.testing.assert_allclose(found.all_boxes[j][i], expected.all_boxes[j][i], atol=1e-3)
            assert len(found.all_segms[j][i]) == len(expected.all_segms[j][i])


@pytest.fixture
def two_processes(model, demo_data, tmp_path) -> argparse.Namespace:
    """A test of the demo data shared by two processes on the CPU."""
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    return argparse.Namespace(
        load_ckpt=str(tmp_path / "model.pth"),
        load_detectron=None,
        output_dir=tmp_path / "out",
        dataset=str(demo_data),
        device=torch.device("cpu"),
        devices=[torch.device("cpu")] * 2,
        bs=2,
    )


def test_processes_share_a_test(model, dataset, two_processes, cfg, tmp_path):
    cfg.freeze(False)
    cfg.TEST.DATASETS = (dataset.name,)
    cfg.freeze()
    alone = argparse.Namespace(**vars(two_processes) | {"devices": None, "bs": 1})
    # An earlier test by one process was interrupted: its images are not tested again.
    test_engine.run_inference(alone, ind_range=(0, 3))
    results = test_engine.run_inference(two_processes)
    alone.output_dir = tmp_path / "alone"
    expected = test_engine.run_inference(alone)
    found, _ = load_detections(tmp_path / "out/detections.pkl")
    assert_same_detections(found, load_detections(tmp_path / "alone/detections.pkl")[0])
    assert part_names(tmp_path / "out") == []
    assert results[dataset.name]["box"] == pytest.approx(expected[dataset.name]["box"], abs=1e-3)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_files_do_not_stop_the_others(model, dataset, tmp_path, num_workers):
    good = [entry["image"] for entry in dataset.get_roidb()[:2]]
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    paths = [good[0], text, tmp_path / "missing.jpg", good[1]]
    results = {r.index: r for r in detect_files(model, paths, num_workers=num_workers)}
    assert sorted(results) == [0, 1, 2, 3]
    for index in (0, 3):
        assert results[index].error is None
        assert results[index].image.shape == cv2.imread(str(paths[index])).shape
        assert len(results[index].cls_boxes) == 4
    for index in (1, 2):
        assert str(paths[index]) in str(results[index].error)
        assert results[index].cls_boxes is None


@pytest.mark.skipif(not ScoringAhead.possible(10**6), reason="elsewhere nothing is forked")
def test_scores_are_the_same_when_made_while_the_test_goes_on(
    dataset, model, tmp_path, monkeypatch
):
    at_end = test_engine.test_net_on_dataset(model, dataset.name, tmp_path / "end", batch_size=2)
    used = []
    result = ScoringAhead.result
    monkeypatch.setattr(ScoringAhead, "result", lambda ahead: used.append(1) or result(ahead))
    monkeypatch.setattr(scoring_ahead, "LEAST_IMAGES", 1)
    ahead = tmp_path / "ahead"
    monkeypatch.setattr(test_engine, "detect_files", interrupted_after(3))
    with pytest.raises(KeyboardInterrupt):  # what a part file holds counts too
        test_engine.test_net_on_dataset(model, dataset.name, ahead, batch_size=2)
    monkeypatch.setattr(test_engine, "detect_files", detect_files)
    assert test_engine.test_net_on_dataset(model, dataset.name, ahead, batch_size=2) == at_end
    assert used == [1]
    names = [sorted(p.name for p in folder.iterdir()) for folder in (tmp_path / "end", ahead)]
    assert names[0] == names[1]
