"""Whose time a training step's operators are counted to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

import modeling.model_builder as model_builder
from core import benchmark_models, benchmark_train
from core import benchmark_stages as stages
from core.benchmark_stages import RANGE, StageTime

CONFIGS = Path(__file__).resolve().parents[2] / "configs/baselines"
SMALL = ["TRAIN.SCALES", "(96,)", "TRAIN.MAX_SIZE", "160", "RESNETS.WIDTH_PER_GROUP", "4"]
SMALL += ["TRAIN.BATCH_SIZE_PER_IM", "8", "TRAIN.RPN_POST_NMS_TOP_N", "50", "FPN.DIM", "32"]
SMALL += ["FAST_RCNN.MLP_HEAD_DIM", "64", "MRCNN.DIM_REDUCED", "16", "KRCNN.CONV_HEAD_DIM", "16"]
CPU = torch.device("cpu")
REGIONS = {"images", "backbone", "RPN head", "RPN targets", "proposals", "losses", "optimizer"}
REGIONS |= {"everything else"}
BOXES = REGIONS | {"RoI sampling", "box head"}
TRAINED = {"backbone", "FPN", "RPN head", "RetinaNet head", "box head", "mask head"}
TRAINED |= {"keypoint head", "losses"}  # what has a backward pass


def tiny_trainer(
    config: str, monkeypatch: pytest.MonkeyPatch, device: torch.device = CPU
) -> benchmark_train.OwnTrainer:
    monkeypatch.setattr(benchmark_train, "BATCHES", 1)
    monkeypatch.setattr(benchmark_train, "NEAR", 7)
    benchmark_models.configure(CONFIGS / config, SMALL)
    return benchmark_train.warm_trainer(device, benchmark_train.TrainCases((1,), ("off",)))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("e2e_mask_rcnn_R-50-FPN_1x", BOXES | {"FPN", "mask targets", "mask head"}),
        ("e2e_keypoint_rcnn_R-50-FPN_1x", BOXES | {"FPN", "keypoint targets", "keypoint head"}),
        ("e2e_mask_rcnn_R-50-C4_1x", BOXES | {"mask targets", "mask head"}),
        (
            "retinanet_R-50-FPN_1x",
            {"images", "backbone", "FPN", "RetinaNet head", "RetinaNet targets", "losses"}
            | {"optimizer", "everything else"},
        ),
        ("rpn_R-50-FPN_1x", (REGIONS | {"FPN"}) - {"proposals"}),
    ],
)
def test_the_stages_of_a_step_make_up_its_time(cfg, monkeypatch, config, expected):
    trainer = tiny_trainer(f"{config}.yaml", monkeypatch)
    events = stages.record(trainer, 1)
    assert sum(e.name.startswith("Optimizer.step#") for e in events) == 1
    found = stages.summed(events, 1, CPU)
    assert {s.name for s in found} == expected
    assert [s.name for s in found] == [name for name in stages.STAGES if name in expected]
    (whole,) = (e for e in events if e.name == RANGE + stages.OTHER)
    total = sum(s.forward_ms + s.backward_ms for s in found)
    assert total == pytest.approx(1e-3 * whole.time_range.elapsed_us(), rel=1e-6)
    assert sum(s.share for s in found) == pytest.approx(1)
    for stage in found:
        assert stage.forward_ms > 0 and stage.forward_calls > 0
        if stage.name in TRAINED:
            assert stage.backward_ms > 0 and stage.backward_calls > 0
        elif stage.name != stages.OTHER:  # whose are the sums of losses
            assert stage.backward_ms == stage.backward_calls == 0
    # Almost all operators are known to be some stage's.
    other = found[-1]
    calls = sum(s.forward_calls + s.backward_calls for s in found)
    assert other.forward_calls + other.backward_calls < 0.2 * calls


def test_nothing_stays_patched(cfg, monkeypatch):
    trainer = tiny_trainer("e2e_faster_rcnn_R-50-FPN_1x.yaml", monkeypatch)
    parts = [trainer.model, trainer.model.RPN, trainer.model.Conv_Body, model_builder]
    before = [dict(vars(part)) for part in parts]
    with pytest.raises(RuntimeError, match="stop"), stages.ranges(trainer.model):
        assert vars(model_builder) != before[-1]
        raise RuntimeError("stop")
    assert [dict(vars(part)) for part in parts] == before


def test_backward_goes_to_the_stage_whose_operator_it_is_of():
    x = torch.randn(5, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        with record_function(RANGE + "first"):
            y = x.sin()
            y.detach()  # shows the sequence number of the next node, which is the other stage's
        with record_function(RANGE + "second"):
            torch.zeros(3).cos()
            z = y.exp()
        z.sum().backward()
    events = recorded.events()
    place = dict(zip((e.name for e in events), stages._places(events), strict=True))
    assert place["aten::sin"] == ("first", False)
    assert place["aten::exp"] == ("second", False)
    assert place["SinBackward0"] == ("first", True)
    assert place["aten::cos"] == ("first", True)  # the last of that name is sin's derivative
    assert place["ExpBackward0"] == ("second", True)
    assert place["SumBackward0"] == ("everything else", True)
    assert place["torch::autograd::AccumulateGrad"] == ("first", True)


def event(name: str, start: int, end: int, **options) -> FunctionEvent:
    defaults = {"id": start, "thread": 1, "use_device": "cuda", "device_type": DeviceType.CPU}
    return FunctionEvent(name=name, start_us=start, end_us=end, **(defaults | options))


def test_kernels_go_to_the_stage_that_launched_them():
    head = event(RANGE + "box head", 0, 50, is_user_annotation=True)
    linear = event("aten::linear", 10, 20, sequence_nr=4)
    node = event(f"{stages.NODE}LinearBackward0", 60, 90, thread=2, fwd_thread=1, sequence_nr=4)
    product = event("aten::mm", 70, 80, thread=2)
    linear.append_kernel("gemm", 0, 3000)
    product.append_kernel("gemm", 0, 4000)
    product.append_kernel("gemm", 0, 2000)
    on_device = {"device_type": DeviceType.CUDA}
    kernels = [
        event(RANGE + "box head", 100, 13000, is_user_annotation=True, **on_device),
        event("gemm", 200, 3200, **on_device),
        event("gemm", 4000, 8000, **on_device),
        event("gemm", 8000, 10000, **on_device),
        event("unknown", 11000, 12000, **on_device),
    ]
    events = EventList([head, linear, node, product, *kernels], use_device="cuda")
    events._build_tree()
    assert stages.summed(events, 2, torch.device("cuda")) == [
        StageTime("box head", 1.5, 3.0, 0.5, 1.0, 0.9),
        StageTime("everything else", 0.5, 0.0, 0.5, 0.0, 0.1),
    ]


class Compiled(nn.Module):
    """Of a model only what ranges() needs, with a compiled backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv_Body = nn.ReLU()
        self.Conv_Body.conv_body = nn.Identity()
        self.Conv_Body.compile(backend="eager")

    def _mask_loss(self, x: Tensor) -> Tensor:
        return x

    _keypoint_loss = _mask_loss


def test_a_compiled_backbone_is_a_stage():
    model = Compiled()
    with stages.ranges(model), profile(activities=[ProfilerActivity.CPU]) as recorded:
        model.Conv_Body(torch.randn(3))
    events = recorded.events()
    found = dict(zip((e.name for e in events), stages._places(events), strict=True))
    assert found["aten::relu"] == ("backbone", False)


def test_the_table_ends_with_the_sum():
    rows = [StageTime("backbone", 3, 5, 40, 60, 0.8), StageTime("optimizer", 2, 0, 7, 0, 0.2)]
    lines = stages.table(rows, torch.device("cuda")).splitlines()
    assert lines[0].split("  ")[-1].strip() == "backward" and "kernels" in lines[0]
    assert " ".join(lines[1].split()) == "backbone 3.00 5.00 8.00 80.0 % 40 60"
    assert " ".join(lines[-1].split()) == "a step 5.00 5.00 10.00 100.0 % 47 60"


@pytest.mark.gpu
def test_a_gpus_kernels_are_all_counted(cfg, monkeypatch):
    device = torch.device("cuda:0")
    trainer = tiny_trainer("e2e_mask_rcnn_R-50-FPN_1x.yaml", monkeypatch, device)
    events = stages.record(trainer, 2)
    found = {s.name: s for s in stages.summed(events, 2, device)}
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    calls = sum(s.forward_calls + s.backward_calls for s in found.values())
    milliseconds = sum(s.forward_ms + s.backward_ms for s in found.values())
    busy = 1e-3 * sum(e.time_range.elapsed_us() for e in kernels)
    assert calls == len(kernels) / 2
    assert milliseconds == pytest.approx(busy / 2)
    for name in ("backbone", "FPN", "RPN head", "box head", "mask head", "losses"):
        assert found[name].forward_ms > 0 and found[name].backward_ms > 0
    assert found["optimizer"].forward_calls > 0
    assert found["everything else"].share < 0.2
