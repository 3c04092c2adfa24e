"""The learning rate is a function of the step; the schedule follows the batch size."""

from __future__ import annotations

import json
import math

import pytest

from core.errors import UserError
from utils.lr_policy import (
    adapt_schedule,
    format_schedule_changes,
    learning_rate,
    schedule_from_solver,
)

# Recorded bugs of the original: see SEMANTICS, 'Solver'.
RECORDED_BUGS = {
    "decay_inside_warmup",
    "start_step_65000_without_optimizer_state",
    "start_step_60000_without_optimizer_state",
}


def test_every_recorded_step_has_the_original_rate(shared):
    cases = json.loads((shared / "golden/units/lr.json").read_text())
    for name in cases.keys() - RECORDED_BUGS:
        args = cases[name]["args"]
        for step, expected, *_ in cases[name]["rows"]:
            rate = learning_rate(
                step,
                policy="steps_with_decay",
                base_lr=args["base"],
                gamma=args["gamma"],
                steps=args["steps"],
                warm_up_iters=args["warm_iters"],
                warm_up_factor=args["warm_factor"],
                warm_up_method=args["method"],
            )
            assert rate == pytest.approx(expected, rel=1e-9), (name, step)


def test_a_decay_inside_warm_up_multiplies_both():
    rate = learning_rate(
        10,
        policy="steps_with_decay",
        base_lr=0.01,
        steps=[0, 10, 30],
        warm_up_iters=20,
        warm_up_factor=0.1,
    )
    assert rate == pytest.approx(0.01 * 0.1 * (0.1 * 0.5 + 0.5))


def test_policies_follow_their_formulas():
    def rate(step, policy, **kwargs):
        return learning_rate(step, policy=policy, base_lr=0.4, max_iter=100, **kwargs)

    assert rate(29, "step", step_size=10, gamma=0.5) == pytest.approx(0.4 * 0.25)
    assert rate(30, "step", step_size=10, gamma=0.5) == pytest.approx(0.4 * 0.125)
    lrs = {"steps": [0, 5, 8], "lrs": [0.3, 0.2, 0.1]}
    assert [rate(s, "steps_with_lrs", **lrs) for s in (0, 4, 5, 7, 8, 99)] == [
        0.3, 0.3, 0.2, 0.2, 0.1, 0.1
    ]  # fmt: skip
    assert rate(25, "cosine_decay") == pytest.approx(0.2 * (1 + math.cos(math.pi / 4)))
    assert rate(100, "cosine_decay") == pytest.approx(0.0, abs=1e-12)
    assert rate(50, "exp_decay", gamma=0.01) == pytest.approx(0.04)
    assert rate(25, "cosine") == rate(25, "cosine_decay")
    assert rate(50, "exp", gamma=0.01) == rate(50, "exp_decay", gamma=0.01)


def test_adapting_agrees_with_the_original(shared, cfg):
    from core.config import merge_cfg_from_cfg, reset_cfg

    for case in json.loads((shared / "golden/units/adaptive.json").read_text()):
        flat = json.loads((shared / f"spec/flat_config/{case['config']}.json").read_text())
        reset_cfg()
        for key in (
            "NUM_GPUS",
            "TRAIN.IMS_PER_BATCH",
            "FPN.FPN_ON",
            "SOLVER.BASE_LR",
            "SOLVER.STEPS",
            "SOLVER.MAX_ITER",
        ):
            value = flat[key]["value"]
            for name in reversed(key.split(".")):
                value = {name: value}
            merge_cfg_from_cfg(value)
        if "error" in case:
            with pytest.raises(UserError):
                adapt_schedule(cfg, case["num_gpus"], case["bs"], case["iter_size"])
            continue
        adapt_schedule(cfg, case["num_gpus"], case["bs"], case["iter_size"])
        solver, train, fpn = cfg.SOLVER, cfg.TRAIN, cfg.FPN
        assert case["num_gpus"] == cfg.NUM_GPUS
        assert case["IMS_PER_BATCH"] == train.IMS_PER_BATCH, case
        assert case["BASE_LR"] == pytest.approx(solver.BASE_LR), case
        assert (case["STEPS"], case["MAX_ITER"]) == (solver.STEPS, solver.MAX_ITER), case
        assert case["RPN_COLLECT_SCALE"] == pytest.approx(fpn.RPN_COLLECT_SCALE), case


def test_scaling_can_be_switched_off_and_is_shown_as_a_table(cfg):
    cfg.NUM_GPUS, cfg.TRAIN.IMS_PER_BATCH = 8, 2
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR = 100, 0.02
    adapt_schedule(cfg, num_gpus=1, batch_size=4, scale_lr=False)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.TRAIN.IMS_PER_BATCH) == (100, 0.02, 4)
    table = format_schedule_changes(adapt_schedule(cfg, num_gpus=1, batch_size=8))
    assert ["SOLVER.MAX_ITER", "100", "50"] in [line.split() for line in table.splitlines()]
    assert ["SOLVER.BASE_LR", "0.02", "0.04"] in [line.split() for line in table.splitlines()]


def test_a_batch_that_cannot_be_divided_is_one_sentence(cfg):
    with pytest.raises(UserError, match=r"--bs 6 .* 4 GPU.*such as 4"):
        adapt_schedule(cfg, num_gpus=4, batch_size=6)


def test_the_schedule_of_a_config_uses_all_its_keys(cfg):
    solver = cfg.SOLVER
    solver.LR_POLICY, solver.BASE_LR, solver.STEPS, solver.GAMMA = (
        "steps_with_decay",
        0.02,
        [0, 60, 80],
        0.5,
    )
    solver.WARM_UP_ITERS, solver.WARM_UP_FACTOR, solver.WARM_UP_METHOD = 10, 0.1, "constant"
    schedule = schedule_from_solver(solver)
    assert [schedule(s) for s in (0, 9, 10, 60, 80)] == pytest.approx(
        [0.002, 0.002, 0.02, 0.01, 0.005]
    )
