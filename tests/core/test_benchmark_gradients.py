"""The gradients' comparison with the plain path, on networks and images small enough for a test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core import benchmark_gradients, benchmark_models, benchmark_train
from core.benchmark_gradients import compare, gradient_checks
from core.benchmark_train import TrainCases
from core.errors import UserError

MASK_RCNN = Path(__file__).resolve().parents[2] / "configs/baselines/e2e_mask_rcnn_R-50-FPN_1x.yaml"
SMALL = ["TRAIN.SCALES", "(64,)", "TRAIN.MAX_SIZE", "96", "RESNETS.WIDTH_PER_GROUP", "8"]
SMALL += ["TRAIN.BATCH_SIZE_PER_IM", "16", "FPN.DIM", "32", "MRCNN.DIM_REDUCED", "16"]
SMALL += ["FAST_RCNN.MLP_HEAD_DIM", "32"]
CPU = torch.device("cpu")
BF16 = TrainCases(batch_sizes=(1,), precisions=("off", "bf16"))


@pytest.fixture
def small(cfg, monkeypatch):
    monkeypatch.setattr(benchmark_train, "BATCHES", 1)
    monkeypatch.setattr(benchmark_train, "NEAR", 7)
    benchmark_models.configure(MASK_RCNN, SMALL)


def test_two_vectors_are_compared_by_angle_and_length():
    plain = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    check = compare("x", [2 * g for g in plain], plain)
    assert (check.cosine, check.norm_change, check.distance) == pytest.approx((1, 1, 1))
    turned = compare("x", [torch.tensor([0.0, 3.0]), torch.tensor([[4.0]])], plain)
    assert turned.cosine == pytest.approx(16 / 25) and turned.norm_change == pytest.approx(0)


def test_bf16_has_the_gradients_of_the_plain_path(small):
    (check,) = gradient_checks(CPU, BF16)  # plain fp32 on a CPU is what it is compared with
    assert "bf16" in str(check)
    assert 0.99 < check.cosine < 1 and 0 < check.distance < 0.1


def test_wrong_gradients_end_the_benchmark(small, monkeypatch):
    backward = benchmark_train.OwnTrainer.gradients

    def wrong(self) -> list[torch.Tensor]:
        found = backward(self)
        return found if self._amp == "off" else [-g for g in found]

    monkeypatch.setattr(benchmark_gradients.OwnTrainer, "gradients", wrong)
    with pytest.raises(UserError, match="bf16.*cosine -0.*more than rounding"):
        list(gradient_checks(CPU, BF16))
