"""The training script: a short real training, resuming it, and what it says to bad input."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import yaml

import train_net
import train_net_step
from core import train_job
from datasets.demo_shapes import make_demo_data

DEMO = "configs/demo/e2e_mask_rcnn_R-50-FPN_gn_demo.yaml"
SMALL = ["TRAIN.SCALES", "(64,)", "TRAIN.MAX_SIZE", "96", "SOLVER.MAX_ITER", "2",
         "SOLVER.WARM_UP_ITERS", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_demo_data(tmp_path_factory.mktemp("demo"), num_train=6, num_val=1)


@pytest.fixture
def run(cfg, dataset, tmp_path, monkeypatch):
    """Run the script in an empty folder, its caches beside; returns the exit code."""
    from core.config import reset_cfg

    root = cfg.ROOT_DIR
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    handlers = list(logging.getLogger().handlers)

    def run(*args, options=(), config=DEMO, data=dataset, script=train_net_step):
        reset_cfg()
        flags = ["--dataset", data, "--cfg", f"{root}/{config}", "--no_cuda", "--nw", 0,
                 *args, "--set", *SMALL, "DATA_DIR", tmp_path, *options]  # fmt: skip
        return script.main([*map(str, flags)])

    yield run
    for handler in set(logging.getLogger().handlers) - set(handlers):
        logging.getLogger().removeHandler(handler)


def test_a_training_writes_checkpoints_settings_and_reports_and_can_be_resumed(run, tmp_path):
    folder = tmp_path / "out"
    flags = ["--bs", 2, "--no_lr_scaling", "--disp_interval", 1]
    whole = ["--output_dir", folder, "--use_tfboard", *flags]
    assert run(*whole, options=["TRAIN.SNAPSHOT_ITERS", 1]) == 0
    assert sorted(p.name for p in (folder / "ckpt").iterdir()) == [
        "last_checkpoint",
        "model_step0.pth",
        "model_step1.pth",
    ]
    saved = yaml.safe_load((folder / "config_and_args.yaml").read_text())
    assert saved["cfg"]["TRAIN"]["IMS_PER_BATCH"] == 2
    assert saved["cfg"]["MODEL"]["NUM_CLASSES"] == 4
    assert saved["args"]["disp_interval"] == 1
    reports = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in reports] == [0, 1]
    assert {"loss_cls", "loss_bbox", "loss_mask", "loss_rpn_cls_fpn2", "lr"} <= reports[0].keys()
    assert "saved" in (folder / "log.txt").read_text()
    assert list(folder.glob("events.out.tfevents*"))

    first = folder / "ckpt/model_step0.pth"
    resumed = tmp_path / "resumed"
    assert run("--output_dir", resumed, "--load_ckpt", first, "--resume", *flags) == 0
    assert [p.name for p in (resumed / "ckpt").glob("*.pth")] == ["model_step1.pth"]
    expected, got = (
        torch.load(f / "ckpt/model_step1.pth", weights_only=True)["model"]
        for f in (folder, resumed)
    )
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_auto_resume_goes_on_evaluates_and_knows_the_end(run, tmp_path, caplog, monkeypatch):
    folder = tmp_path / "out"
    flags = ["--output_dir", folder, "--auto_resume", "--bs", 2, "--no_lr_scaling"]
    flags += ["--eval_period", 1, "--use_tfboard"]
    options = ["TEST.SCALE", 64, "TEST.MAX_SIZE", 96]
    assert run(*flags, options=[*options, "SOLVER.MAX_ITER", 1]) == 0
    assert run(*flags, options=options) == 0
    ckpt = folder / "ckpt"
    assert {p.stem for p in ckpt.glob("*.pth")} == {"model_best", "model_step0", "model_step1"}
    reports = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in reports if "demo_val/mask/AP" in r] == [0, 1]
    assert (folder / "eval/detections.pkl").is_file()
    checkpoint = torch.load(ckpt / "model_step1.pth", weights_only=True)
    assert checkpoint["best"]["metric"] == "demo_val/mask/AP"
    assert checkpoint["config"]["FPN"]["RPN_COLLECT_SCALE"] == 0.25  # training's, not the test's
    assert checkpoint["schedule"]["max_iter"] == 2
    assert checkpoint["versions"]["torch"] == torch.__version__
    before = (ckpt / "model_step1.pth").stat().st_mtime_ns
    assert run(*flags, options=options) == 0
    assert "nothing is left to do" in caplog.text
    assert (ckpt / "model_step1.pth").stat().st_mtime_ns == before
    assert "checkpoints of another training" not in caplog.text
    again = ["--resume", "--load_ckpt", ckpt / "model_step0.pth", "--output_dir", folder]
    assert run(*again, "--bs", 2, "--no_lr_scaling", options=options) == 0
    assert "checkpoints of another training" not in caplog.text
    monkeypatch.setattr(train_job, "train", lambda *_: 0)
    assert run("--output_dir", folder, "--bs", 2, options=options) == 0
    assert "checkpoints of another training" in caplog.text


def test_epochs_are_counted_in_steps(run, tmp_path):
    flags = ["--epochs", 2, "--lr_decay_epochs", 1, "--ckpt_num_per_epoch", 2, "--bs", 4]
    flags += ["--lr", 0.01, "--disp_interval", 1, "--output_dir", tmp_path / "out"]
    assert run(*flags, script=train_net) == 0
    # 12 images with the mirrored ones: 3 steps an epoch, a checkpoint every 2.
    steps = {p.stem for p in (tmp_path / "out/ckpt").glob("*.pth")}
    assert steps == {"model_step1", "model_step3", "model_step5"}
    reports = (tmp_path / "out/log.jsonl").read_text().splitlines()
    rates = [json.loads(line)["lr"] for line in reports]
    assert rates == pytest.approx([0.01] * 3 + [0.001] * 3)


def test_another_batch_size_adapts_the_place_in_the_schedule(run, tmp_path, caplog, monkeypatch):
    options = ["SOLVER.MAX_ITER", 4, "TRAIN.SNAPSHOT_ITERS", 2]
    assert run("--bs", 4, "--output_dir", tmp_path / "out", options=options) == 0  # 8 steps
    seen = {}
    fake = lambda *args: seen.update(settings=args[4]) or 0  # noqa: E731
    monkeypatch.setattr(train_job, "train", fake)
    resume = ["--resume", "--load_ckpt", tmp_path / "out/ckpt/model_step3.pth", "--no_save"]
    assert run(*resume, "--bs", 2, options=options) == 0
    assert (seen["settings"].start_step, seen["settings"].max_iter) == (8, 16)
    assert seen["settings"].first_batch == 8
    assert "took 4 x 1 images a step, now it is 2 x 1" in caplog.text
    assert run(*resume, "--bs", 2, "--iter_size", 2, options=options) == 0
    assert (seen["settings"].start_step, seen["settings"].max_iter) == (4, 8)
    assert run(*resume, "--bs", 2, "--no_lr_scaling", options=options) == 0
    assert seen["settings"].start_step == 4


def test_the_default_folder_is_named_after_config_and_time_and_no_save_writes_none(run, tmp_path):
    flags = ["--bs", 2, "--no_lr_scaling"]
    assert run(*flags, "--no_save", options=["SOLVER.MAX_ITER", 1]) == 0
    assert list((tmp_path / "work").iterdir()) == []
    assert run(*flags, options=["SOLVER.MAX_ITER", 1]) == 0
    stem = "e2e_mask_rcnn_R-50-FPN_gn_demo"
    (checkpoint,) = (tmp_path / "work/Outputs" / stem).glob("*_step/ckpt/model_step0.pth")
    assert checkpoint.is_file()


def test_flags_override_the_config_and_the_schedule_follows_the_batch(run, cfg, monkeypatch):
    seen = {}
    fake = lambda *args: seen.update(settings=args[4], rate=args[3]) or 0  # noqa: E731
    monkeypatch.setattr(train_job, "train", fake)
    options = ["SOLVER.MAX_ITER", 100, "SOLVER.BASE_LR", 0.1, "SOLVER.LR_POLICY",
               "steps_with_decay", "SOLVER.STEPS", "[0, 50]"]  # fmt: skip
    flags = ["--bs", 4, "--iter_size", 4, "--o", "SGD", "--no_save", "--lr_decay_gamma", 0.5]
    assert run(*flags, options=options) == 0
    # 16 images a step instead of 8; the rate follows the pass: 4 instead of 8.
    assert seen["settings"].max_iter == 50
    assert (cfg.SOLVER.TYPE, cfg.SOLVER.STEPS) == ("SGD", [0, 25])
    assert [seen["rate"](s) for s in (0, 25)] == pytest.approx([0.05, 0.025])
    assert run(*flags, "--lr", 0.3, options=options) == 0
    assert seen["rate"](0) == pytest.approx(0.3)


@pytest.mark.parametrize(("given", "warned"), [(7, True), (4, False), (None, False)])
def test_a_number_of_classes_that_is_not_the_datas_is_pointed_out(
    run, cfg, monkeypatch, caplog, given, warned
):
    monkeypatch.setattr(train_job, "train", lambda *args: 0)
    options = [] if given is None else ["MODEL.NUM_CLASSES", given]
    assert run("--no_save", options=options) == 0
    lines = [m for m in caplog.messages if "NUM_CLASSES" in m]
    sentence = "MODEL.NUM_CLASSES is 4, the number of --dataset with the background, not 7"
    assert lines == [sentence] * warned
    assert cfg.MODEL.NUM_CLASSES == 4


def test_bad_input_is_one_sentence_and_leaves_nothing_behind(run, tmp_path, capsys):
    baseline = "configs/baselines/e2e_mask_rcnn_R-50-FPN_1x.yaml"
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"PK\x03\x04 cut off")
    images = tmp_path / "images"
    images.mkdir()
    cases = [
        (["--bs", 0], {}, "--bs 0 cannot be divided"),
        (["--resume"], {}, "--resume needs --load_ckpt"),
        (["--auto_resume", "--no_save"], {}, "--auto_resume needs checkpoints"),
        (["--eval_period", 2, "--no_save"], {}, "--eval_period needs checkpoints"),
        (["--eval_period", -2], {}, "--eval_period must be at least 0"),
        (["--disp_interval", 0], {}, "--disp_interval must be at least 1"),
        (["--start_step", -1], {}, "--start_step must be at least 0"),
        (["--nw", -1], {}, "DATA_LOADER.NUM_THREADS (--nw) must be at least 0"),
        (["--lr", -1], {}, "SOLVER.BASE_LR (--lr) must be a finite number of at least 0"),
        (["--lr", "nan"], {}, "SOLVER.BASE_LR (--lr) must be a finite number of at least 0"),
        (["--lr", "inf"], {}, "SOLVER.BASE_LR (--lr) must be a finite number of at least 0"),
        ([], {"options": ["SOLVER.BASE_LR", -1]}, "SOLVER.BASE_LR (--lr) must be a finite"),
        (["--output_dir", bad / "run"], {}, f"cannot make the folder {bad / 'run'}"),
        (["--device", "cuda:9"], {}, "--device cuda:9"),
        (["--load_ckpt", bad], {}, "bad.pth is damaged"),
        (["--load_detectron", "absent.pkl"], {}, "there is no weight file absent.pkl"),
        ([], {"options": ["SOLVER.MAX_STEPS", "3"]}, "unknown config key SOLVER.MAX_STEPS"),
        ([], {"data": "coco2015"}, "coco2015"),
        ([], {"data": f"{tmp_path}/no.json:{images}"}, "no.json"),
        ([], {"config": baseline, "data": "coco2017"}, "tools/download_imagenet_weights.py -t"),
    ]
    for flags, changes, message in cases:
        assert run(*flags, **changes) != 0, message
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert message in error
        assert list((tmp_path / "work").iterdir()) == [], message


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_written(run, tmp_path, capsys):
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    assert run("--load_ckpt", tmp_path / "other.pth") == 2
    error = capsys.readouterr().err
    assert "other.pth is not a checkpoint of this model: it lacks" in error
    assert "it has fc.weight" in error
    assert list((tmp_path / "work").iterdir()) == []
