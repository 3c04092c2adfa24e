"""Trainings on GPUs: resumed bit for bit, on two by DataParallel and by two processes."""

from __future__ import annotations

import pytest
import torch

import nn as mynn
from core.train_engine import place_model
from core.train_job import CPU_INPUTS
from datasets.dataset_catalog import resolve_dataset
from datasets.demo_shapes import make_demo_data
from datasets.roidb import combined_roidb_for_training
from forked import CONFIG, SMALL, exit_codes, start_ranks, train_demo
from modeling.model_builder import Generalized_RCNN
from roi_data.loader import build_train_loader

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def weights(folder, step):
    return torch.load(folder / f"ckpt/model_step{step}.pth", weights_only=True)["model"]


def test_resuming_on_a_gpu_changes_no_bit(tmp_path):
    make_demo_data(tmp_path, num_train=6, num_val=2)
    flags = ("--bs", 2, "--auto_resume", "--device", "cuda:0")
    for output, steps in (("whole", 4), ("resumed", 2), ("resumed", 4)):
        options = ("SOLVER.MAX_ITER", steps, "DETERMINISTIC", True, "SOLVER.LR_POLICY", "step")
        ended = exit_codes(start_ranks(1, train_demo, tmp_path, output, flags, options))
        assert ended == [0]
    whole, resumed = weights(tmp_path / "whole", 3), weights(tmp_path / "resumed", 3)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_recorded_steps_train_as_others_do(tmp_path):
    make_demo_data(tmp_path, num_train=6, num_val=2)
    for recorded in (True, False):
        options = ("SOLVER.MAX_ITER", 9, "DETERMINISTIC", True, "MODEL.CUDA_GRAPHS", recorded)
        flags = ("--bs", 2, "--device", "cuda:0")
        ended = exit_codes(
            start_ranks(1, train_demo, tmp_path, f"recorded_{recorded}", flags, options)
        )
        assert ended == [0]
    recorded, plain = (weights(tmp_path / f"recorded_{r}", 8) for r in (True, False))
    for name, value in plain.items():
        torch.testing.assert_close(recorded[name], value, rtol=1e-4, atol=1e-5, msg=name)


@two_gpus
def test_two_processes_train_and_resume_on_two_gpus(tmp_path):
    make_demo_data(tmp_path, num_train=6, num_val=2)
    flags = ("--bs", 4, "--auto_resume", "--eval_period", 2, "--amp", "bf16")
    for steps in (2, 4):
        options = ("SOLVER.MAX_ITER", steps)
        ended = exit_codes(start_ranks(2, train_demo, tmp_path, "run", flags, options))
        assert ended == [0, 0]
    assert (tmp_path / "run/ckpt/model_best.pth").is_file()


@two_gpus
def test_two_processes_record_their_steps_and_part(tmp_path):
    make_demo_data(tmp_path, num_train=6, num_val=2)
    options = ("SOLVER.MAX_ITER", 24)  # the first dozen are not recorded
    assert exit_codes(start_ranks(2, train_demo, tmp_path, "run", ("--bs", 4), options)) == [0, 0]
    assert "replayed one of" in (tmp_path / "run/log.txt").read_text()


@two_gpus
def test_replicas_have_the_losses_and_gradients_of_one_gpu(cfg, tmp_path, monkeypatch):
    from core.config import assert_and_infer_cfg, merge_cfg_from_file, merge_cfg_from_list

    merge_cfg_from_file(CONFIG)
    merge_cfg_from_list([*map(str, SMALL), "DATA_DIR", str(tmp_path)])
    dataset = resolve_dataset(str(make_demo_data(tmp_path, num_train=6, num_val=1)))
    cfg.MODEL.NUM_CLASSES, cfg.CUDA, cfg.NUM_GPUS = dataset.num_classes, True, 2
    cfg.TRAIN.IMS_PER_BATCH = 2
    assert_and_infer_cfg()
    loader = build_train_loader(*combined_roidb_for_training(dataset.train_names), 4, 0)
    batch = next(iter(loader))
    model = place_model(Generalized_RCNN(), torch.device("cuda", 0)).train()
    two = mynn.DataParallel(model, [0, 1], cpu_keywords=CPU_INPUTS, minibatch=True)
    # Rounding decides which of many alike proposals an untrained model keeps.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)  # both GPUs draw the same numbers
    together = two(**batch)["losses"]
    sum(v.mean() for v in together.values()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    one = mynn.DataParallel(model, [0], cpu_keywords=CPU_INPUTS, minibatch=True)
    for number in range(2):
        torch.manual_seed(0)
        alone = one(**{key: [parts[number]] for key, parts in batch.items()})["losses"]
        (sum(alone.values()) / 2).backward()
        for name, value in alone.items():
            torch.testing.assert_close(together[name][number], value, rtol=0.02, atol=1e-3)
    for name, parameter in model.named_parameters():
        difference = (gradients[name] - parameter.grad).norm()
        assert difference <= 0.05 * parameter.grad.norm() + 1e-4, name
