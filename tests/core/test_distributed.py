"""Several processes train as one process that runs their mini-batches in turn would."""

from __future__ import annotations

import json
import logging
import os
import signal
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import core.distributed as ranks
import nn as mynn
import utils.net as net_utils
from core.distributed import Launch, device_of, first_host, launch_from_environment
from core.errors import UserError
from core.train_engine import TrainSettings, place_model, train
from datasets.demo_shapes import make_demo_data
from forked import exit_codes, start_ranks, train_demo
from roi_data.loader import BatchSampler, MinibatchSampler
from utils.training_stats import NonFiniteLossError, TrainingStats

SOLVER = SimpleNamespace(
    TYPE="SGD",
    BASE_LR=0.05,
    MOMENTUM=0.9,
    WEIGHT_DECAY=0.01,
    WEIGHT_DECAY_GN=0.0,
    BIAS_DOUBLE_LR=True,
    BIAS_WEIGHT_DECAY=False,
)
STEPS = 4


class Detector(nn.Module):
    """Convolutions in channels_last, a frozen layer, draws, and a loss over its own number.

    trained: which of its parameters, by their dimensions.
    """

    def __init__(self, trained=range(5)):
        super().__init__()
        torch.manual_seed(5)
        self.stem = nn.Conv2d(3, 4, 1).requires_grad_(False)
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1))
        self.fc = nn.Linear(4, 3)
        for parameter in (*self.body.parameters(), *self.fc.parameters()):
            parameter.requires_grad_(parameter.dim() in trained)

    def forward(self, data, image_ids=None):
        features = self.body(self.stem(data)).relu()
        drawn = torch.rand(len(data), device=data.device) < 0.7
        out = self.fc(features.mean(dim=(2, 3)))[drawn]
        return {
            "losses": {
                "loss_a": out.pow(2).sum() / max(1, int(drawn.sum())),
                "loss_b": features.mean().exp() * 1e-2,
            },
            "metrics": {"share": drawn.float().mean()},
        }


def mini_batch(step, rank):
    """Of another size and number of images on every rank."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(2 + rank % 2, 3, 6 + rank, 8, generator=generator)


def train_as_rank(
    folder, iter_size=1, bad_rank=None, max_bad_steps=0, trouble=None, trained=range(5)
):
    launch = launch_from_environment()
    ranks.join(launch)
    module = place_model(Detector(trained), torch.device("cpu"))
    if launch.rank:
        nn.init.zeros_(module.fc.weight)  # rank 0's weights count
    torch.manual_seed(launch.rank)

    def loader():
        for step in range(STEPS * iter_size):
            if trouble == "error" and (step, launch.rank) == (2, 1):
                raise KeyError("rank 1 fails")
            if trouble == "signal" and (step, launch.rank) == (1, 1):
                os.kill(os.getpid(), signal.SIGTERM)
            data = mini_batch(step, launch.rank)
            if (step, launch.rank) == (2, bad_rank):
                data[0, 0, 0, 0] = float("nan")
            yield {"data": [data], "image_ids": [[f"image {step}.{launch.rank}"]]}

    model = mynn.DataParallel(ranks.distribute(module), cpu_keywords=["image_ids"], minibatch=True)
    settings = TrainSettings(
        max_iter=STEPS, iter_size=iter_size, disp_interval=1, ckpt_dir=folder, snapshot_period=1
    )
    stats = TrainingStats(
        STEPS,
        folder if launch.rank == 0 else None,
        max_bad_steps=max_bad_steps,
        gather=ranks.gather_objects,
    )
    optimizer = net_utils.build_optimizer(module, SOLVER, iter_size)
    try:
        number = train(model, optimizer, loader(), lambda step: 0.05, settings, stats)
    except NonFiniteLossError as error:
        (folder / f"error_{launch.rank}").write_text(str(error))
        os._exit(3)
    torch.save(module.state_dict(), folder / f"rank_{launch.rank}.pth")
    ranks.leave()
    raise SystemExit(128 + number if number else 0)


def in_turn(world_size, iter_size, trained):
    """Weights after every step, and the values logged, of one process with everyone's batches."""
    model = Detector(trained)
    optimizer = net_utils.build_optimizer(model, SOLVER, iter_size)
    states = []
    for rank in range(world_size):
        torch.manual_seed(rank)
        states.append(torch.get_rng_state())
    for step in range(STEPS):
        values = {"loss_a": 0.0, "loss_b": 0.0, "share": 0.0}
        for rank in range(world_size):
            torch.set_rng_state(states[rank])
            for number in range(iter_size):
                output = model(mini_batch(step * iter_size + number, rank))
                (sum(output["losses"].values()) / world_size).backward()
                for name, value in {**output["losses"], **output["metrics"]}.items():
                    values[name] += value.item() / world_size / iter_size
            states[rank] = torch.get_rng_state()
        optimizer.step()
        optimizer.zero_grad()
        yield {n: v.clone() for n, v in model.state_dict().items()}, values


@pytest.mark.parametrize(
    ("world_size", "iter_size", "trained"),
    # The gradients of vectors are not exchanged with those of the rest.
    [(2, 1, range(5)), (2, 2, range(5)), (4, 1, range(5)), (2, 1, (1,)), (2, 1, (2, 4))],
)
def test_every_step_equals_that_of_one_process(tmp_path, world_size, iter_size, trained):
    args = (tmp_path, iter_size, None, 0, None, trained)
    assert set(exit_codes(start_ranks(world_size, train_as_rank, *args))) == {0}
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    seen = {name: [] for name in ("loss_a", "loss_b", "share")}
    for step, (weights, values) in enumerate(in_turn(world_size, iter_size, trained)):
        saved = net_utils.read_ckpt(tmp_path / f"model_step{step}.pth")
        for name, value in weights.items():
            torch.testing.assert_close(saved["model"][name], value, atol=1e-5, rtol=1e-5)
        for name, value in values.items():
            seen[name].append(value)
            logged = entries[step][name]
            assert logged == pytest.approx(statistics.median(seen[name]), abs=1e-5), name
    assert len(saved["rng"]) == world_size
    states = [torch.load(p, weights_only=True) for p in sorted(tmp_path.glob("rank_*.pth"))]
    for state in states:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())


def test_a_bad_loss_of_one_rank_stops_or_is_left_out_by_all(tmp_path):
    stopped, left_out = tmp_path / "stopped", tmp_path / "left_out"
    stopped.mkdir()
    left_out.mkdir()
    both = (
        start_ranks(2, train_as_rank, stopped, 1, 1),
        start_ranks(2, train_as_rank, left_out, 1, 1, 1),
    )
    assert exit_codes(both[0]) == [3, 3]
    for rank in range(2):
        message = (stopped / f"error_{rank}").read_text()
        assert "loss_a is nan at step 2 (images: image 2.1)" in message
    assert exit_codes(both[1]) == [0, 0]
    before, after = (net_utils.read_ckpt(left_out / f"model_step{n}.pth") for n in (1, 2))
    assert torch.equal(before["model"]["fc.weight"], after["model"]["fc.weight"])


def test_a_failing_rank_ends_all_and_a_signal_to_one_stops_all(tmp_path):
    failed, stopped = tmp_path / "failed", tmp_path / "stopped"
    failed.mkdir()
    stopped.mkdir()
    failing = start_ranks(2, train_as_rank, failed, 1, None, 0, "error")
    signalled = start_ranks(2, train_as_rank, stopped, 1, None, 0, "signal")
    assert exit_codes(failing) == [1, 1]
    assert exit_codes(signalled) == [128 + signal.SIGTERM] * 2
    assert (stopped / "last_checkpoint").read_text().strip() in (
        "model_step1.pth",
        "model_step2.pth",
    )


class OnGpu(Detector):
    """Waits for nothing, so that its steps are recorded."""

    def forward(self, images, image_ids=None):
        features = self.body(self.stem(images)).relu()
        return {
            "losses": {"loss_a": self.fc(features.mean(dim=(2, 3))).pow(2).mean()},
            "metrics": {},
        }


def train_on_gpus_until_one_fails(folder, disp_interval, environment):
    os.environ.update(environment)
    launch = launch_from_environment()
    logging.basicConfig(filename=folder / f"log_{launch.rank}", level=logging.INFO)
    device = torch.device("cuda", launch.rank)
    torch.cuda.set_device(device)
    ranks.join(launch)
    module = place_model(OnGpu(), device)

    def loader():
        for step in range(40):
            if (step, launch.rank) == (30, 1):
                raise KeyError("rank 1 fails")
            yield {"images": [torch.ones(2, 3, 6, 8)], "image_ids": [[step]]}

    model = mynn.DataParallel(
        ranks.distribute(module), [device], cpu_keywords=["image_ids"], minibatch=True
    )
    settings = TrainSettings(max_iter=40, disp_interval=disp_interval)
    optimizer = net_utils.build_optimizer(module, SOLVER)
    stats = TrainingStats(40, quiet=True, gather=ranks.gather_objects)
    train(model, optimizer, loader(), lambda step: 0.05, settings, stats)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("network", "disp_interval"), [(False, 40), (True, 40), (False, 1)])
def test_a_failing_rank_ends_one_whose_gpu_waits_for_it(tmp_path, network, disp_interval):
    as_if_on_two_machines = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
    environment = as_if_on_two_machines if network else {}
    args = (tmp_path, disp_interval, environment)
    processes = start_ranks(2, train_on_gpus_until_one_fails, *args)
    ended = exit_codes(processes, 60)
    for process in processes:
        process.kill()
    assert ended == [1, 1]
    assert "replayed one of 1 recorded" in (tmp_path / "log_0").read_text()


def test_the_script_trains_evaluates_and_resumes_with_two_processes(tmp_path):
    make_demo_data(tmp_path, num_train=4, num_val=2)
    flags = ("--no_cuda", "--bs", 2, "--auto_resume", "--eval_period", 1)
    for output, steps in (("whole", 2), ("resumed", 1), ("resumed", 2)):
        options = ("SOLVER.MAX_ITER", steps)
        ended = exit_codes(start_ranks(2, train_demo, tmp_path, output, flags, options))
        assert ended == [0, 0]
    whole, resumed = (
        torch.load(tmp_path / name / "ckpt/model_step1.pth", weights_only=True)
        for name in ("whole", "resumed")
    )
    assert len(whole["rng"]) == 2
    assert whole["num_gpus"] == 2
    assert whole["batch_size"] == 2
    for name, value in whole["model"].items():
        assert torch.equal(resumed["model"][name], value), name
    assert (tmp_path / "whole/ckpt/model_best.pth").is_file()


def test_ranks_share_each_batch_in_whole_groups(cfg):
    cfg.TRAIN.IMS_PER_BATCH = 2

    def batches(*share):
        sampler = MinibatchSampler(np.linspace(0.5, 2, 23), np.arange(23))
        return list(BatchSampler(sampler, 8, True, *share))

    whole = batches()
    assert len(whole) == 2  # the 7 images that fill no batch are left out everywhere
    for number, batch in enumerate(whole):
        parts = [batches(rank, 4)[number] for rank in range(4)]
        assert [item for part in parts for item in part] == batch
        for part in parts:
            assert len({ratio for _, ratio, _ in part}) == 1


def test_who_started_the_process():
    assert launch_from_environment({}) == Launch(0, 1, 0)
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "SLURM_STEP_NUM_TASKS": "2"}
    assert launch_from_environment(torchrun) == Launch(3, 4, 1)
    srun = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    assert launch_from_environment(srun) == Launch(5, 8, 1)
    batch_script = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert launch_from_environment(batch_script) == Launch(0, 1, 0)
    with pytest.raises(UserError, match="WORLD_SIZE but no usable 'RANK'"):
        launch_from_environment({"WORLD_SIZE": "2"})


def test_the_first_host_of_a_list_of_slurm():
    assert first_host("node[03-05,9],other1") == "node03"
    assert first_host("gpu7") == "gpu7"
    assert first_host("a,b") == "a"


def test_every_process_has_a_gpu_of_its_own():
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert device_of(Launch(), gpus) == gpus
    assert device_of(Launch(3, 4, 1), gpus) == gpus[1:]
    with pytest.raises(UserError, match="process 2 of this machine has no GPU"):
        device_of(Launch(2, 4, 2), gpus)
