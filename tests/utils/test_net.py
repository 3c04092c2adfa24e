"""Parameter groups, momentum at a change of the rate, checkpoints."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import utils.net as net_utils
from core.errors import UserError


def solver(**changes):
    values = {
        "TYPE": "SGD",
        "BASE_LR": 0.1,
        "MOMENTUM": 0.9,
        "WEIGHT_DECAY": 0.01,
        "WEIGHT_DECAY_GN": 0.002,
        "BIAS_DOUBLE_LR": True,
        "BIAS_WEIGHT_DECAY": False,
    }
    return SimpleNamespace(**{**values, **changes})


class Detector(nn.Module):
    """Names and kinds of layers of a detector, very small."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.Conv_Body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.GroupNorm(2, 4))
        self.Frozen = nn.Linear(2, 2).requires_grad_(False)
        self.Box_Outs = nn.ModuleDict(
            {"cls_score": nn.Linear(4, num_classes), "bbox_pred": nn.Linear(4, 4 * num_classes)}
        )


def step(model, optimizer):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def save(path, model, optimizer, number=7):
    net_utils.save_ckpt(
        path, step=number, train_size=10, batch_size=2, model=model, optimizer=optimizer
    )


@pytest.mark.parametrize("name", ["R-50-C4_1x", "R-50-FPN_1x", "R-50-FPN_2x_gn"])
def test_groups_are_those_of_the_original_in_its_order(shared, cfg, name):
    from core.config import assert_and_infer_cfg, merge_cfg_from_file
    from modeling.model_builder import Generalized_RCNN

    stem = f"e2e_mask_rcnn_{name}"
    folder = "gn_baselines" if name.endswith("gn") else "baselines"
    merge_cfg_from_file(f"{cfg.ROOT_DIR}/configs/{folder}/{stem}.yaml")
    cfg.MODEL.NUM_CLASSES, cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS = 81, False
    assert_and_infer_cfg()
    with torch.device("meta"):
        model = Generalized_RCNN()
    expected = json.loads((shared / "golden/extra/param_groups.json").read_text())[stem]
    groups = net_utils.param_groups(model)
    assert groups["weights"] == expected["nonbias"]
    assert groups["biases"] == expected["bias"]
    assert groups["gn_weights"] == expected["gn"]


def test_rates_and_decays_of_the_groups():
    model = Detector()
    optimizer = net_utils.build_optimizer(model, solver(), iter_size=3)
    groups = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert groups == [(3, 0.1, pytest.approx(0.03)), (3, 0.2, 0.0), (1, 0.1, pytest.approx(0.006))]
    decoupled = net_utils.build_optimizer(model, solver(TYPE="AdamW"), iter_size=3)
    assert [g["weight_decay"] for g in decoupled.param_groups] == [0.01, 0.0, 0.002]
    with pytest.raises(UserError, match="SOLVER.TYPE .*'LARS'"):
        net_utils.build_optimizer(model, solver(TYPE="LARS"))


def detectron_steps(rates, momentum=0.9, threshold=1.1, twice=False):
    """Detectron's update of one weight with gradient 1: V holds the rate; no decay."""
    weight, velocity, previous = 0.0, 0.0, None
    for rate in rates:
        if previous is not None and previous != rate:
            ratio = rate / previous
            if max(ratio, 1 / ratio) > threshold and previous > 1e-7:
                velocity *= ratio * (ratio if twice else 1)
        velocity = momentum * velocity + rate
        weight -= velocity
        previous = rate
    return weight


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(
    "rates",
    [
        [0.1, 0.105, 0.11, 0.115, 0.115],  # warm-up: velocity is left alone
        [0.1, 0.1, 0.01, 0.01],  # a decay: velocity follows
        [0.01, 0.02, 0.021, 0.0021],  # both
    ],
)
def test_momentum_follows_the_rate_as_in_detectron(rates, twice):
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = net_utils.build_optimizer(model, solver(WEIGHT_DECAY=0.0))
    for rate in rates:
        current = net_utils.current_lr(optimizer)
        if rate is rates[0]:
            current = rate
        net_utils.update_learning_rate(optimizer, current, rate, twice=twice)
        step(model, optimizer)
    assert model.weight.item() == pytest.approx(detectron_steps(rates, twice=twice), rel=1e-5)


def test_a_checkpoint_restores_weights_and_optimizer(tmp_path):
    model = Detector()
    optimizer = net_utils.build_optimizer(model, solver())
    step(model, optimizer)
    save(tmp_path / "a.pth", model, optimizer)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]
    other = Detector()
    other_optimizer = net_utils.build_optimizer(other, solver(WEIGHT_DECAY=0.5))
    checkpoint = net_utils.read_ckpt(tmp_path / "a.pth")
    assert checkpoint["step"] == 7
    net_utils.load_ckpt(other, checkpoint)
    net_utils.load_optimizer_state(other_optimizer, checkpoint["optimizer"])
    assert other_optimizer.param_groups[0]["weight_decay"] == 0.5
    for group in other_optimizer.param_groups:
        group["weight_decay"] = {0.5: 0.01}.get(group["weight_decay"], group["weight_decay"])
    step(model, optimizer)
    step(other, other_optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_checkpoints_of_detectron_pytorch_load(tmp_path):
    # Written by torch 0.4: legacy format, parameters numbered by their id(), rates perhaps numpy.
    model = Detector()
    names = net_utils.param_groups(model)
    parameters = dict(model.named_parameters())
    ids, groups, state = iter(range(10**12, 10**13, 977)), [], {}
    for group in ("weights", "biases", "gn_weights"):
        numbers = [next(ids) for _ in names[group]]
        for number, name in zip(numbers, names[group], strict=True):
            state[number] = {"momentum_buffer": torch.full_like(parameters[name], len(state))}
        groups.append({"params": numbers, "lr": np.float64(0.02), "momentum": 0.9, "dampening": 0,
                       "weight_decay": 0.0001, "nesterov": False})  # fmt: skip
    content = {
        "step": 1999,
        "train_size": 236574,
        "batch_size": 8,
        "model": {n: torch.zeros_like(v) for n, v in model.state_dict().items()},
        "optimizer": {"state": state, "param_groups": groups},
    }
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    checkpoint = net_utils.read_ckpt(tmp_path / "old.pth")
    net_utils.load_ckpt(model, checkpoint)
    assert not any(v.any() for v in model.state_dict().values())
    optimizer = net_utils.build_optimizer(model, solver())
    net_utils.load_optimizer_state(optimizer, checkpoint["optimizer"])
    assert net_utils.current_lr(optimizer) == 0.02
    buffers = [
        optimizer.state[parameters[n]]["momentum_buffer"].flatten()[0].item()
        for n in names["weights"] + names["biases"] + names["gn_weights"]
    ]
    assert buffers == list(range(len(buffers)))
    step(model, optimizer)


def test_a_checkpoint_of_another_model_is_one_sentence(tmp_path):
    model = Detector()
    save(tmp_path / "a.pth", model, net_utils.build_optimizer(model, solver()))
    other = Detector()
    other.Mask_Outs = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"a.pth is not .* lacks Mask_Outs.weight, Mask_Outs.bias:"):
        net_utils.load_ckpt(other, tmp_path / "a.pth")
    del other.Mask_Outs, other.Frozen
    with pytest.raises(UserError, match=r"it has Frozen.weight, Frozen.bias, which the model"):
        net_utils.load_ckpt(other, tmp_path / "a.pth")


def test_other_classes_are_an_error_unless_fine_tuning(tmp_path, caplog):
    source = Detector(num_classes=5)
    save(tmp_path / "a.pth", source, net_utils.build_optimizer(source, solver()))
    model = Detector(num_classes=3)
    before = model.Box_Outs["cls_score"].weight.clone()
    with pytest.raises(UserError, match="another number of classes"):
        net_utils.load_ckpt(model, tmp_path / "a.pth")
    with caplog.at_level("INFO"):
        report = net_utils.load_ckpt(model, tmp_path / "a.pth", new_classes=True)
    assert len(report.skipped) == 4
    assert set(report.loaded) == {n for n in model.state_dict() if "_Outs" not in n}
    assert torch.equal(model.Conv_Body[0].weight, source.Conv_Body[0].weight)
    assert torch.equal(model.Box_Outs["cls_score"].weight, before)
    assert "skipped, made for another number of classes: Box_Outs.cls_score.weight" in caplog.text


def test_box_regression_of_another_kind_is_named(tmp_path):
    source, model = Detector(num_classes=5), Detector(num_classes=5)
    save(tmp_path / "a.pth", source, net_utils.build_optimizer(source, solver()))
    model.Box_Outs["bbox_pred"] = nn.Linear(model.Box_Outs["bbox_pred"].in_features, 8)
    with pytest.raises(UserError, match=r"set MODEL\.CLS_AGNOSTIC_BBOX_REG"):
        net_utils.load_ckpt(model, tmp_path / "a.pth")


def test_fine_tuning_onto_other_keypoints_skips_their_layers(tmp_path):
    class Points(nn.Module):
        def __init__(self, count):
            super().__init__()
            self.Keypoint_Head = nn.Conv2d(8, 8, 3)
            self.Keypoint_Outs = nn.ModuleDict(
                {
                    "classify": nn.ConvTranspose2d(8, count, 4),
                    "upsample": nn.ConvTranspose2d(count, count, 4),
                }
            )

    source, model = Points(17), Points(5)
    torch.save({"model": source.state_dict()}, tmp_path / "a.pth")
    report = net_utils.load_ckpt(model, tmp_path / "a.pth", new_classes=True)
    assert report.loaded == ["Keypoint_Head.weight", "Keypoint_Head.bias"]
    assert len(report.skipped) == 4
    with pytest.raises(UserError, match="another number of classes"):
        net_utils.load_ckpt(model, tmp_path / "a.pth")


def test_the_state_of_another_optimizer_is_refused():
    model = Detector()
    adam = net_utils.build_optimizer(model, solver(TYPE="Adam"))
    step(model, adam)
    sgd = net_utils.build_optimizer(model, solver())
    with pytest.raises(UserError, match="not SGD: set SOLVER.TYPE"):
        net_utils.load_optimizer_state(sgd, adam.state_dict())
    swapped = sgd.state_dict()
    swapped["state"][0], swapped["state"][2] = swapped["state"][2], swapped["state"][0]
    with pytest.raises(UserError, match="of other parameters"):
        net_utils.load_optimizer_state(sgd, swapped)
    model.Frozen.requires_grad_(True)
    with pytest.raises(UserError, match="trained 7 parameters, this model has 9"):
        net_utils.load_optimizer_state(net_utils.build_optimizer(model, solver()), sgd.state_dict())


def test_resuming_another_training_is_pointed_out(caplog):
    net_utils.warn_of_another_training({"train_size": 10}, train_size=10, batch_size=4)
    assert caplog.messages == []
    checkpoint = {"train_size": 10, "batch_size": 8}
    net_utils.warn_of_another_training(checkpoint, train_size=10, batch_size=4)
    (message,) = caplog.messages
    assert "batch_size 8, this one has 4" in message
