"""Detectron blobs find their parameters, by the mapping of the model."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from core.errors import UserError
from utils.detectron_weight_helper import load_detectron_weight, use_box_weights_of


class Net(nn.Module):
    """A box head, a mask head with stages of its own, and a layer without blob."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.Mask_Head = nn.Linear(2, 2)
        self.Box_Outs = nn.Linear(2, num_classes)
        self.Upsample = nn.Linear(1, 1)

    @property
    def detectron_weight_mapping(self):
        return {
            "Mask_Head.weight": "_[mask]_res5_0_w",
            "Mask_Head.bias": "_[mask]_res5_0_b",
            "Box_Outs.weight": "cls_score_w",
            "Box_Outs.bias": "cls_score_b",
            "Upsample.weight": None,
            "Upsample.bias": None,
        }, ["fc1000_w"]


def write(path, cfg_text=None, **blobs):
    content = {"blobs": {name: np.asarray(value, np.float32) for name, value in blobs.items()}}
    if cfg_text is not None:
        content["cfg"] = cfg_text
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


BOX = {"cls_score_w": np.full((3, 2), 5.0), "cls_score_b": np.full(3, 6.0)}
MASK = {"_[mask]_res5_0_w": np.ones((2, 2)), "_[mask]_res5_0_b": np.ones(2)}


def test_every_blob_lands_in_its_parameter_and_extras_are_ignored(tmp_path):
    net = Net()
    constant = net.Upsample.weight.clone()
    extras = {"fc1000_w": np.zeros((1000, 2)), "cls_score_w_momentum": np.zeros((3, 2))}
    path = write(tmp_path / "m.pkl", **BOX, **MASK, **extras)
    report = load_detectron_weight(net, path)
    assert net.Box_Outs.weight.unique().item() == 5 and net.Box_Outs.bias.unique().item() == 6
    assert net.Mask_Head.weight.unique().item() == 1
    assert torch.equal(net.Upsample.weight, constant)
    assert len(report.loaded) == 4 and report.without_blob == ["Upsample.weight", "Upsample.bias"]


def test_a_masked_blob_falls_back_to_the_name_after_the_bracket(tmp_path):
    net = Net()
    res5 = {"res5_0_w": np.full((2, 2), 7.0), "res5_0_b": np.full(2, 8.0)}
    load_detectron_weight(net, write(tmp_path / "m.pkl", **BOX, **res5))
    assert net.Mask_Head.weight.unique().item() == 7 and net.Mask_Head.bias.unique().item() == 8


def test_missing_blobs_are_named_and_keep_their_values(tmp_path, caplog):
    net = Net()
    before = net.Mask_Head.weight.clone()
    report = load_detectron_weight(net, write(tmp_path / "m.pkl", **BOX))
    assert torch.equal(net.Mask_Head.weight, before)
    assert report.missing[0] == "Mask_Head.weight (_[mask]_res5_0_w)"
    assert "Mask_Head.weight (_[mask]_res5_0_w), Mask_Head.bias" in caplog.text


def test_other_shapes_are_an_error_that_loads_nothing(tmp_path):
    net = Net(num_classes=4)
    before = net.Mask_Head.weight.clone()
    path = write(tmp_path / "m.pkl", **BOX, **MASK)
    with pytest.raises(UserError, match=r"Box_Outs.weight \(4, 2\) \(cls_score_w, .*\(3, 2\)\)"):
        load_detectron_weight(net, path)
    assert torch.equal(net.Mask_Head.weight, before)
    with pytest.raises(UserError, match="has no blob of this model"):
        load_detectron_weight(net, write(tmp_path / "other.pkl", conv1_w=np.zeros(3)))


def test_fine_tuning_keeps_only_the_predictors_of_other_classes(tmp_path):
    class TwoOuts(Net):
        def __init__(self):
            super().__init__()
            self.Box_Outs = nn.ModuleDict({"cls_score": nn.Linear(2, 4)})

        @property
        def detectron_weight_mapping(self):
            mapping, orphans = super().detectron_weight_mapping
            names = {"Box_Outs.weight": "Box_Outs.cls_score.weight",
                     "Box_Outs.bias": "Box_Outs.cls_score.bias"}  # fmt: skip
            return {names.get(k, k): v for k, v in mapping.items()}, orphans

    net = TwoOuts()
    before = net.Box_Outs["cls_score"].weight.clone()
    path = write(tmp_path / "m.pkl", **BOX, **MASK)
    report = load_detectron_weight(net, path, new_classes=True)
    assert torch.equal(net.Box_Outs["cls_score"].weight, before)
    assert net.Mask_Head.weight.unique().item() == 1
    assert len(report.skipped) == 2


def test_the_report_names_everything(tmp_path, caplog):
    extras = {"fc1000_w": np.zeros((1000, 2)), "cls_score_w_momentum": np.zeros((3, 2))}
    path = write(tmp_path / "m.pkl", **BOX, **extras)
    with caplog.at_level("DEBUG"):
        load_detectron_weight(Net(), path)
    assert caplog.messages == [
        f"{path}: 2 parameters loaded, 0 skipped, 2 missing, 0 mismatched; 1 entries unused",
        f"{path}: loaded: Box_Outs.weight (cls_score_w), Box_Outs.bias (cls_score_b)",
        f"{path}: constant, not loaded: Upsample.weight, Upsample.bias",
        f"{path}: missing, left as initialised: Mask_Head.weight (_[mask]_res5_0_w), "
        "Mask_Head.bias (_[mask]_res5_0_b)",
        f"{path}: unused: fc1000_w",
    ]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MODEL: {TYPE: generalized_rcnn}", (1.0, 1.0, 1.0, 1.0)),
        ("NUM_GPUS: 8", (1.0, 1.0, 1.0, 1.0)),
        ("MODEL: {BBOX_REG_WEIGHTS: [10, 10, 5, 5]}", (10.0, 10.0, 5.0, 5.0)),
        (None, (10.0, 10.0, 5.0, 5.0)),
    ],
)
def test_models_older_than_the_box_weights_had_none(cfg, tmp_path, text, expected, frozen):
    cfg.freeze(frozen)
    report = load_detectron_weight(Net(), write(tmp_path / "m.pkl", text, **BOX, **MASK))
    use_box_weights_of(report)
    assert expected == cfg.MODEL.BBOX_REG_WEIGHTS
    assert cfg.MODEL.is_frozen() == cfg.is_frozen() == frozen


def test_a_published_model_is_loaded_by_name(cfg, tmp_path):
    cfg.DATA_DIR = str(tmp_path)
    (tmp_path / "detectron_models").mkdir()
    write(tmp_path / "detectron_models/e2e_mask_rcnn_R-50-FPN_1x.pkl", **BOX, **MASK)
    report = load_detectron_weight(Net(), "zoo://e2e_mask_rcnn_R-50-FPN_1x")
    assert len(report.loaded) == 4


@pytest.mark.parametrize(
    "stem",
    [
        "baselines/e2e_mask_rcnn_R-50-C4_1x",
        "baselines/e2e_mask_rcnn_R-50-FPN_1x",
        "gn_baselines/e2e_mask_rcnn_R-50-FPN_2x_gn",
    ],
)
def test_a_whole_detectron_model_loads(shared, cfg, tmp_path, stem):
    from core.config import assert_and_infer_cfg, merge_cfg_from_file
    from modeling.model_builder import Generalized_RCNN

    spec = json.loads((shared / f"spec/blobs/{stem.split('/')[1]}.json").read_text())
    names = {n: b for n, b in spec["detectron"].items() if b}
    # One number a blob tells where it went.
    values = {blob: float(i + 1) for i, blob in enumerate(sorted(set(names.values())))}
    blobs = {b: np.full(spec["params"][n], values[b], np.float32) for n, b in names.items()}
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    merge_cfg_from_file(f"{cfg.ROOT_DIR}/configs/{stem}.yaml")
    cfg.MODEL.NUM_CLASSES, cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS = 81, False
    assert_and_infer_cfg()
    model = Generalized_RCNN()
    report = load_detectron_weight(model, path)
    assert report.missing == []
    for name, value in model.state_dict().items():
        if name in names:
            assert value.min() == value.max() == values[names[name]], name
