"""Exported weights are what Detectron, safetensors and torch read, bit for bit."""

from __future__ import annotations

import pickle
import pickletools

import numpy as np
import pytest
import safetensors.torch
import torch

import export_weights as script
from core.config import assert_and_infer_cfg, cfg, merge_cfg_from_file, merge_cfg_from_list
from core.errors import UserError
from golden_weights import CONFIGS
from small_model import CONFIG, KEYPOINTS, save_small_model
from utils.class_count import count_classes
from utils.detectron_weight_helper import load_detectron_weight
from utils.weight_export import detectron_blobs, export_weights
from utils.weights import read_detectron_file


def build(config, options=(), num_classes=4):
    from modeling.model_builder import Generalized_RCNN

    merge_cfg_from_file(config)
    merge_cfg_from_list(list(options))
    cfg.MODEL.NUM_CLASSES = num_classes
    cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS = False
    assert_and_infer_cfg()
    return Generalized_RCNN()


@pytest.fixture
def checkpoint(tmp_path, cfg):
    """(file of a small model, its options)"""
    path = tmp_path / "ckpt/model.pth"
    path.parent.mkdir()
    return path, save_small_model(path)


def run(checkpoint, *args):
    from core.config import reset_cfg

    reset_cfg()
    options = [str(o) for o in checkpoint[1]]
    return script.main([*map(str, args), "--cfg", str(CONFIG), "--set", *options])


def test_every_format_goes_round(checkpoint, tmp_path):
    path, _ = checkpoint
    original = torch.load(path)["model"]
    pkl, safe, back = tmp_path / "new/a.pkl", tmp_path / "a.safetensors", tmp_path / "a.pth"
    assert run(checkpoint, pkl, "--load_ckpt", path) == 0
    assert run(checkpoint, safe, "--load_detectron", pkl) == 0
    assert run(checkpoint, back, "--load_ckpt", safe) == 0
    for state in (safetensors.torch.load_file(safe), torch.load(back, weights_only=True)):
        assert state.keys() == original.keys()
        assert all(torch.equal(value, original[name]) for name, value in state.items())
        assert all(value.is_contiguous() for value in state.values())


def test_a_detectron_file_is_as_python_2_writes_it(checkpoint, tmp_path):
    pkl = tmp_path / "a.pkl"
    run(checkpoint, pkl, "--load_ckpt", checkpoint[0])
    operations = list(pickletools.genops(pkl.read_bytes()))
    assert max(operation.proto for operation, _, _ in operations) <= 2
    names = {argument for operation, argument, _ in operations if operation.name == "GLOBAL"}
    assert names == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}
    with pkl.open("rb") as file:
        content = pickle.load(file, encoding="latin1")
    assert content.keys() == {"blobs", "cfg"}
    assert all(blob.dtype == np.float32 for blob in content["blobs"].values())
    assert content["blobs"]["conv1_w"].flags.c_contiguous
    assert content["cfg"].startswith("!!python/object/new:utils.collections.AttrDict\n")


def test_the_config_inside_says_how_boxes_are_coded(checkpoint, tmp_path):
    pkl = tmp_path / "a.pkl"
    checkpoint[1].extend(["MODEL.BBOX_REG_WEIGHTS", "(1.0, 2.0, 3.0, 4.0)"])
    run(checkpoint, pkl, "--load_ckpt", checkpoint[0])
    config = read_detectron_file(pkl).config
    assert config["MODEL"]["BBOX_REG_WEIGHTS"] == [1.0, 2.0, 3.0, 4.0]
    assert config["MODEL"]["NUM_CLASSES"] == 4


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (CONFIG, KEYPOINTS),
        (CONFIGS / "baselines/e2e_mask_rcnn_R-50-C4_1x.yaml", []),
        (CONFIGS / "baselines/retinanet_R-50-FPN_1x.yaml", []),
    ],
    ids=["keypoints", "shared res5", "retinanet"],
)
def test_what_one_model_exports_another_loads(config, options, cfg, tmp_path):
    torch.manual_seed(1)
    source = build(config, options)
    export_weights(source, tmp_path / "a.pkl", cfg)
    cfg.freeze(False)
    assert count_classes(tmp_path / "a.pkl") == 4
    target = build(config, options)
    report = load_detectron_weight(target, tmp_path / "a.pkl")
    assert report.missing == report.mismatched == report.unused == []
    mapping, _ = target.detectron_weight_mapping
    states = source.state_dict(), target.state_dict()
    assert all(torch.equal(states[0][n], states[1][n]) for n in mapping if mapping[n])
    again = detectron_blobs(target)
    stored = read_detectron_file(tmp_path / "a.pkl").blobs
    assert again.keys() == stored.keys()
    assert all(np.array_equal(again[blob], stored[blob]) for blob in stored)


@pytest.mark.parametrize(
    ("blob", "channels", "options"),
    [
        ("cls_score_b", 4, []),
        ("conv_cls_b", 4 * 3 * 3, []),
        ("retnet_cls_pred_fpn3_b", 9 * 3, ["FPN.RPN_MIN_LEVEL", 3]),
        ("retnet_cls_pred_fpn3_b", 9 * 4, ["FPN.RPN_MIN_LEVEL", 3, "RETINANET.SOFTMAX", True]),
    ],
)
def test_classes_are_counted_in_every_kind_of_model(cfg, tmp_path, blob, channels, options):
    merge_cfg_from_list(options)
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({blob: np.zeros(channels, "f4")}, protocol=2))
    assert count_classes(path) == 4


def test_imagenet_weights_tell_no_classes_of_a_detector(cfg, tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"fc1000_b": np.zeros(1000)}, protocol=2))
    with pytest.raises(UserError, match="a.pkl does not tell its number of classes"):
        count_classes(tmp_path / "a.pkl")


def test_an_ending_that_says_no_format(checkpoint, tmp_path, capsys):
    assert run(checkpoint, tmp_path / "a.onnx", "--load_ckpt", checkpoint[0]) == 2
    message = capsys.readouterr().err
    assert "a.onnx must end in one of .pkl, .safetensors, .pth" in message
    with pytest.raises(UserError, match="must end in"):
        export_weights(torch.nn.Linear(1, 1), tmp_path / "a.bin", {})


def test_a_bad_safetensors_file_is_one_sentence(checkpoint, tmp_path, capsys):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not json at all")
    assert run(checkpoint, tmp_path / "a.pkl", "--load_ckpt", bad) == 2
    assert "bad.safetensors is damaged or not a safetensors file" in capsys.readouterr().err
