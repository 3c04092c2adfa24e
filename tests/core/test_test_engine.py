"""A data set to results: the same whatever the batch, in Detectron's file, or a clear sentence."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from core import test_engine
from core.config import assert_and_infer_cfg, merge_cfg_from_file
from core.errors import UserError
from core.test_engine import test_net as run_test_net  # or pytest would collect it
from core.test_pipeline import FileResult, detect_files, plan_batches
from datasets.dataset_catalog import resolve_dataset
from datasets.demo_shapes import make_demo_data
from datasets.json_dataset import JsonDataset
from modeling.model_builder import Generalized_RCNN
from utils.segms import mask_to_rle, polys_to_mask

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
            np.testing.assert_allclose(gpu.all_boxes[j][i], cpu.all_boxes[j][i], atol=1e-2)
            assert len(gpu.all_segms[j][i]) == len(cpu.all_segms[j][i])


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
    run_test_net(model, dataset, tmp_path, (0, 1), vis=True)
    (picture,) = (tmp_path / "vis").iterdir()
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
    assert not list((tmp_path / "out").iterdir())


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


def test_ground_truth_boxes_score_one(dataset, model, tmp_path, monkeypatch):
    """The way from detections to metrics, without what a detector gets wrong."""
    truth = {entry["image"]: entry for entry in dataset.get_roidb(gt=True)}

    def detect_truth(model, paths, sizes, **options):
        for index, path in enumerate(paths):
            entry = truth[path]
            classes = entry["gt_classes"]
            segms = [_rle(s, sizes[index]) for s in entry["segms"]]
            boxes = np.c_[entry["boxes"], np.ones(len(classes))].astype(np.float32)
            yield FileResult(
                index,
                None,
                [[], *(boxes[classes == j] for j in range(1, 4))],
                [[s for s, c in zip(segms, classes, strict=True) if c == j] for j in range(4)],
            )

    monkeypatch.setattr(test_engine, "detect_files", detect_truth)
    results = test_engine.test_net_on_dataset(model, dataset.name, tmp_path)
    metrics = results[dataset.name]
    assert metrics["box"]["AP"] == pytest.approx(1.0)
    assert metrics["mask"]["AP"] == pytest.approx(1.0)
    (file,) = tmp_path.glob("bbox_*_results.json")
    assert json.loads(file.read_text())


def _rle(segm: list, size: tuple[int, int]) -> dict:
    rle = mask_to_rle(polys_to_mask(segm, *size))
    return {"size": rle["size"], "counts": rle["counts"].decode()}
