"""The training loop on a tiny model: steps, precision, checkpoints, failures."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import nn as mynn
import utils.net as net_utils
from core import checkpoints
from core.errors import UserError
from core.train_engine import Evaluation, TrainSettings, train
from utils.training_stats import NonFiniteLossError, TrainingStats

SOLVER = SimpleNamespace(
    TYPE="SGD",
    BASE_LR=0.1,
    MOMENTUM=0.9,
    WEIGHT_DECAY=0.01,
    WEIGHT_DECAY_GN=0.0,
    BIAS_DOUBLE_LR=True,
    BIAS_WEIGHT_DECAY=False,
)


class Tiny(nn.Module):
    """Two losses, means over the images of a pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 2)

    def forward(self, data, image_ids=None):
        out = self.fc(data)
        return {
            "losses": {"loss_cls_fpn2": out[:, 0].pow(2).mean(), "loss_b": out[:, 1].mean().exp()},
            "metrics": {"accuracy_cls": (out[:, 0] > 0).float().mean()},
        }


def batches(count, size=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(count, size, 4, generator=generator)
    return [{"data": [d], "image_ids": [[10 * i, 10 * i + 1]]} for i, d in enumerate(data)]


def run(
    tmp_path=None,
    loader=None,
    model=None,
    lr=0.1,
    optimizer=None,
    stats=None,
    evaluate=None,
    restored=None,
    **settings,
):
    module = model or Tiny()
    settings = TrainSettings(**{"max_iter": 4, "ckpt_dir": tmp_path, **settings})
    optimizer = optimizer or net_utils.build_optimizer(module, SOLVER, settings.iter_size)
    parallel = mynn.DataParallel(module, cpu_keywords=["image_ids"], minibatch=True)
    stats = stats or TrainingStats(settings.max_iter)
    loader = batches(8) if loader is None else loader
    train(
        parallel,
        optimizer,
        loader,
        lambda step: lr,
        settings,
        stats,
        restored=restored,
        evaluate=evaluate,
    )
    return module, optimizer


def test_two_summed_passes_are_one_pass_over_both_batches():
    # Summed gradients of means: the rate of one pass is twice as large over twice the images.
    halves = batches(8)
    wholes = [
        {"data": [torch.cat([a["data"][0], b["data"][0]])], "image_ids": [[]]}
        for a, b in zip(halves[::2], halves[1::2], strict=True)
    ]

    class Linear(Tiny):
        def forward(self, data, image_ids=None):
            return {"losses": {"a": self.fc(data).pow(2).mean()}, "metrics": {}}

    accumulated, _ = run(loader=halves, model=Linear(), iter_size=2, lr=0.1)
    at_once, _ = run(loader=wholes, model=Linear(), lr=0.2)
    torch.testing.assert_close(accumulated.fc.weight, at_once.fc.weight)
    torch.testing.assert_close(accumulated.fc.bias, at_once.fc.bias)


def test_checkpoints_come_periodically_and_at_the_end(tmp_path):
    module, _ = run(tmp_path / "ckpt", max_iter=5, snapshot_period=2, train_size=8, batch_size=2)
    names = sorted(p.name for p in (tmp_path / "ckpt").iterdir())
    steps = ["model_step1.pth", "model_step3.pth", "model_step4.pth"]
    assert names == ["last_checkpoint", *steps]
    assert (tmp_path / "ckpt/last_checkpoint").read_text().strip() == "model_step4.pth"
    last = net_utils.read_ckpt(tmp_path / "ckpt/model_step4.pth")
    assert (last["step"], last["train_size"], last["batch_size"]) == (4, 8, 2)
    assert torch.equal(last["model"]["fc.weight"], module.fc.weight)


def test_resuming_goes_on_where_the_training_stopped(tmp_path):
    uninterrupted, _ = run(loader=batches(4))
    run(tmp_path, loader=batches(4), max_iter=2)
    checkpoint = net_utils.read_ckpt(tmp_path / "model_step1.pth")
    module = Tiny()
    optimizer = net_utils.build_optimizer(module, SOLVER)
    net_utils.load_ckpt(module, checkpoint)
    net_utils.load_optimizer_state(optimizer, checkpoint["optimizer"])
    run(model=module, optimizer=optimizer, loader=batches(4)[2:], start_step=2)
    assert torch.equal(module.fc.weight, uninterrupted.fc.weight)
    with pytest.raises(UserError, match="nothing to train.*SOLVER.MAX_ITER"):
        run(start_step=4)


def test_a_loss_that_is_not_finite_is_named_and_nothing_is_saved(tmp_path):
    bad = batches(8)
    bad[2]["data"][0][0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"loss_cls_fpn2 is nan at step 2 .*20, 21"):
        run(tmp_path / "ckpt", loader=bad, max_iter=8, snapshot_period=4)
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_bad_steps_up_to_a_number_are_left_out(tmp_path, caplog, optimizer, amp):
    good = batches(6)
    bad = [*good[:2], *batches(2, seed=5), *good[2:]]
    for batch in bad[2:4]:
        batch["data"][0][1, 2] = float("inf")

    def trained(loader, steps, **stats):
        module = Tiny()
        solver = SimpleNamespace(**{**vars(SOLVER), "TYPE": optimizer})
        built = net_utils.build_optimizer(module, solver)
        restored = {"scaler": {**SCALER, "scale": 8.0}} if amp == "fp16" else {}
        run(
            tmp_path / "ckpt",
            loader=loader,
            model=module,
            optimizer=built,
            max_iter=steps,
            stats=TrainingStats(steps, **stats),
            restored=restored,
            amp=amp,
        )
        return module.state_dict()

    with pytest.raises(NonFiniteLossError, match=r"at step 3 .*20, 21|at step 3 .*10, 11"):
        trained(bad, 8, max_bad_steps=1)
    assert not (tmp_path / "ckpt").exists()
    with caplog.at_level(logging.WARNING):
        left_out = trained(bad, 8, max_bad_steps=2)
    assert "loss_cls_fpn2 is inf at step 2" in caplog.text
    for name, value in trained(good, 6).items():
        if amp == "off":
            assert torch.equal(left_out[name], value), name
        else:  # the loss scale was halved twice
            torch.testing.assert_close(left_out[name], value, atol=1e-3, rtol=1e-2)


SCALER = {
    "scale": 65536.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2000,
    "_growth_tracker": 0,
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(tmp_path, number):
    class Signalled(Tiny):
        def forward(self, data, image_ids=None):
            if image_ids == [20, 21]:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # a launcher repeats what it was sent
            return super().forward(data)

    before = signal.getsignal(number)
    module, optimizer = run(tmp_path, model=Signalled(), snapshot_period=100)
    assert [p.name for p in tmp_path.glob("*.pth")] == ["model_step2.pth"]
    assert signal.getsignal(number) == before
    saved = net_utils.read_ckpt(tmp_path / "model_step2.pth")
    assert torch.equal(saved["model"]["fc.weight"], module.fc.weight)
    assert saved["sampler"] == {"batches": 3, "batch_size": 0}


def test_the_exit_tells_which_signal(tmp_path):
    settings = TrainSettings(max_iter=2)
    module = Tiny()

    def loader():
        os.kill(os.getpid(), signal.SIGUSR1)
        yield from batches(2)

    model = mynn.DataParallel(module, cpu_keywords=["image_ids"], minibatch=True)
    optimizer = net_utils.build_optimizer(module, SOLVER)
    stats = TrainingStats(2)
    assert train(model, optimizer, loader(), lambda s: 0.1, settings, stats) == signal.SIGUSR1
    assert train(model, optimizer, batches(2), lambda s: 0.1, settings, stats) == 0


def test_the_best_checkpoint_is_kept(tmp_path, caplog):
    scores = iter([0.3, 0.5, 0.4])
    drawn = []

    def evaluate(model):
        drawn.append(torch.rand(1))  # must not change what the training draws
        return Evaluation("coco/box/AP", {"coco/box/AP": next(scores), "coco/box/AP50": 0.9})

    class Drawing(Tiny):
        def forward(self, data, image_ids=None):
            return super().forward(data + torch.rand(data.shape))

    def trained(folder, **settings):
        torch.manual_seed(2)
        stats = TrainingStats(6, folder)
        return run(folder / "ckpt", model=Drawing(), max_iter=6, stats=stats, **settings)[0]

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    scored = trained(tmp_path / "a", eval_period=2, evaluate=evaluate, keep=1)
    assert torch.equal(scored.fc.weight, trained(tmp_path / "b").fc.weight)
    folder = tmp_path / "a/ckpt"
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["last_checkpoint", "model_best.pth", "model_step5.pth"]
    best, last = (net_utils.read_ckpt(folder / n) for n in names[1:])
    assert best["step"] == 3
    assert best["best"] == last["best"] == {"metric": "coco/box/AP", "value": 0.5, "step": 3}
    entries = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert [e["coco/box/AP"] for e in entries if "coco/box/AP" in e] == [0.3, 0.5, 0.4]


def test_an_evaluation_that_fails_loses_no_step(tmp_path, caplog):
    def evaluate(model):
        raise IndexError("an odd annotation")

    with pytest.raises(IndexError, match="odd"):
        run(tmp_path, max_iter=6, eval_period=4, evaluate=evaluate)
    assert net_utils.read_ckpt(tmp_path / "model_step3.pth")["step"] == 3
    assert (tmp_path / "last_checkpoint").read_text().strip() == "model_step3.pth"
    assert "evaluation after step 4 failed: IndexError: an odd annotation" in caplog.text
    assert "stopped in step 3 by IndexError; its checkpoint is written" in caplog.text


def test_an_evaluation_that_fails_on_a_full_disk_is_told(tmp_path, caplog, monkeypatch):
    def evaluate(model):
        raise IndexError("an odd annotation")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_torch_file", full)
    with pytest.raises(UserError, match="cannot write a checkpoint"):
        run(tmp_path, max_iter=6, eval_period=4, evaluate=evaluate)
    assert "evaluation after step 4 failed: IndexError: an odd annotation" in caplog.text
    assert "is written" not in caplog.text


def test_a_full_gpu_and_a_dead_loader_process_are_one_sentence():
    class Full(Tiny):
        def forward(self, data, image_ids=None, blob_size=None):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    loader = [{**b, "blob_size": [(800, 1344)]} for b in batches(1)]
    with pytest.raises(UserError, match=r"16 images .* 1344x800: lower --bs"):
        run(model=Full(), loader=loader, batch_size=16)

    class Explaining(list):
        def explained(self, error):
            return UserError(f"a loader process died: {error}")

    class Interrupted(Tiny):
        def forward(self, data, image_ids=None):
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(UserError, match="a loader process died: .*pid 7"):
        run(model=Interrupted(), loader=Explaining(batches(1)))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    class BrokenGradient(Tiny):
        def forward(self, data, image_ids=None):
            loss = self.fc(data).sum()
            loss.register_hook(lambda g: g * float("inf"))
            return {"losses": {"a": loss}, "metrics": {}}

    with pytest.raises(NonFiniteLossError, match="weights are not finite after step 0"):
        run(tmp_path / "ckpt", model=BrokenGradient(), max_iter=1)
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("worker died")])
def test_an_interruption_saves_nothing_and_is_passed_on(tmp_path, error):
    def loader():
        yield from batches(2)
        raise error

    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        run(tmp_path / "ckpt", loader=loader(), snapshot_period=100)
    assert not (tmp_path / "ckpt").exists()


def test_an_empty_loader_is_one_sentence():
    with pytest.raises(UserError, match="fewer images than a batch"):
        run(loader=[])


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_runs_the_forward_in_its_type_and_trains(amp):
    seen = []

    class Spy(Tiny):
        def forward(self, data, image_ids=None):
            seen.append(self.fc(data).dtype)
            return super().forward(data)

    # fp16 leaves out its first steps, until the loss scale fits.
    module, _ = run(model=Spy(), amp=amp, max_iter=60, lr=0.01)
    assert set(seen) == {{"bf16": torch.bfloat16, "fp16": torch.float16}[amp]}
    assert module.fc.weight.dtype == torch.float32
    data = batches(1)[0]["data"][0]

    def loss(model):
        return sum(model(data)["losses"].values()).item()

    assert loss(module) < 0.8 * loss(Tiny())


def test_reports_have_every_value_on_one_line_and_in_json(tmp_path, caplog):
    module = Tiny()
    stats = TrainingStats(4, tmp_path)
    with caplog.at_level(logging.INFO):
        train(
            mynn.DataParallel(module, cpu_keywords=["image_ids"], minibatch=True),
            net_utils.build_optimizer(module, SOLVER),
            batches(2),
            lambda step: 0.1,
            TrainSettings(max_iter=4, disp_interval=2),
            stats,
        )
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("step ")]
    assert [line.split(" | ")[0] for line in lines] == ["step 1/4", "step 2/4", "step 4/4"]
    for part in ("loss ", "loss_cls_fpn2 ", "loss_cls ", "loss_b ", "accuracy_cls ", "lr 0.1",
                 "eta 0:00:00", " s/step", "data ", "memory "):  # fmt: skip
        assert part in lines[-1]
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries] == [0, 1, 3]
    assert entries[0]["loss"] == pytest.approx(entries[0]["loss_cls"] + entries[0]["loss_b"])


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu():
    module = Tiny().cuda()
    optimizer = net_utils.build_optimizer(module, SOLVER)
    model = mynn.DataParallel(module, [0], cpu_keywords=["image_ids"], minibatch=True)
    settings = TrainSettings(max_iter=8, disp_interval=100)

    class Stats(TrainingStats):
        def report(self, step, lr):
            torch.cuda.set_sync_debug_mode("default" if step == 7 else "error")
            if step == 7:
                super().report(step, lr)

    loader = [
        {"data": [b["data"][0].pin_memory()], "image_ids": b["image_ids"]} for b in batches(8)
    ]
    try:
        train(model, optimizer, loader, lambda step: 0.1 / (step + 1), settings, Stats(8))
    finally:
        torch.cuda.set_sync_debug_mode("default")
