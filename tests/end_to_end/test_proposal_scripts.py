"""From an RPN to Fast R-CNN by way of a proposal file, with the scripts, on real images."""

from __future__ import annotations

import importlib
import json
import pickle
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_scripts import ROOT, run

from core.config import reset_cfg
from scripts import test_net_script

RPN = ROOT / "configs/demo/overfit_rpn_R-50-FPN_gn.yaml"
FAST = ROOT / "configs/demo/overfit_fast_rcnn_R-50-FPN_gn.yaml"
# The demo configs at their smallest: these tests are about the scripts, not about learning.
SMALL = [
    *("TRAIN.SCALES", "(96,)", "TRAIN.MAX_SIZE", 128, "TEST.SCALE", 96, "TEST.MAX_SIZE", 128),
    *("FPN.DIM", 16, "GROUP_NORM.NUM_GROUPS", 4, "TRAIN.IMS_PER_BATCH", 2),
    *("RESNETS.WIDTH_PER_GROUP", 8, "RESNETS.STEM_OUT_CHANNELS", 8),
    *("RESNETS.RES2_OUT_CHANNELS", 16, "TEST.RPN_POST_NMS_TOP_N", 50, "SOLVER.MAX_ITER", 2),
    *("FAST_RCNN.CONV_HEAD_DIM", 16, "FAST_RCNN.MLP_HEAD_DIM", 32, "TEST.SCORE_THRESH", 0.001),
]


def train(config: Path, dataset: Path, folder: str, *options: object):
    flags = ("--cfg", config, "--dataset", dataset, "--nw", 0, "--no_cuda")
    settings = ("--set", *SMALL, *options)
    out = dataset.parent / folder
    return run("train_net_step.py", *flags, "--output_dir", out, *settings, cwd=dataset.parent)


def test(config: Path, dataset: Path, weights: str, *args: object, options: tuple = ()):
    flags = ("--cfg", config, "--dataset", dataset, "--load_ckpt", dataset.parent / weights)
    settings = ("--device", "cpu", "--set", *SMALL, *options)
    return run("test_net.py", *flags, *args, *settings, cwd=dataset.parent)


test.__test__ = False


def succeeded(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def home(shared, tmp_path_factory) -> Path:
    """Four crowded COCO images as plain.yaml, their RPN trained for two steps, its proposals (in
    two parts, joined), and data.yaml, which names the proposal file."""
    home = tmp_path_factory.mktemp("home")
    coco = shared / "data/coco"
    content = json.loads((coco / "annotations/instances_val2017.json").read_text())
    crowded = {a["image_id"] for a in content["annotations"] if a["iscrowd"]}
    images = sorted(content["images"], key=lambda image: image["id"] not in crowded)[:4]
    kept = {image["id"] for image in images}
    content["images"] = images
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (home / "few.json").write_text(json.dumps(content))
    part = {"annotations": "few.json", "images": str(coco / "images/val2017")}
    (home / "plain.yaml").write_text(yaml.safe_dump({"train": part, "val": part}))
    part["proposals"] = "rpn/test/rpn_proposals.pkl"
    (home / "data.yaml").write_text(yaml.safe_dump({"train": part, "val": part}))

    succeeded(train(RPN, home / "plain.yaml", "rpn"))
    options = ("NUM_GPUS", 2)
    tested = test(RPN, home / "plain.yaml", "rpn/ckpt/model_step1.pth", "--multi-gpu-testing",
                  options=options)  # fmt: skip
    assert "AR@100" in succeeded(tested).stdout
    succeeded(train(FAST, home / "data.yaml", "fast"))
    return home


def test_an_rpn_leaves_proposals_and_their_recall(home):
    folder = home / "rpn/test"
    assert sorted(p.name for p in folder.iterdir()) == [
        "metrics.json",
        "rpn_proposal_recall.pkl",
        "rpn_proposals.pkl",
    ]
    with (folder / "rpn_proposals.pkl").open("rb") as file:
        content = pickle.load(file)
    ids = sorted(image["id"] for image in json.loads((home / "few.json").read_text())["images"])
    assert content["ids"] == ids
    assert all(0 < len(boxes) <= 50 for boxes in content["boxes"])


def test_fast_rcnn_is_tested_on_the_proposals(home):
    done = succeeded(test(FAST, home / "data.yaml", "fast/ckpt/model_step1.pth", "--bs", 2))
    assert "AP50" in done.stdout
    with (home / "fast/test/detections.pkl").open("rb") as file:
        all_boxes = pickle.load(file)["all_boxes"]
    assert len(all_boxes) == 81 and len(all_boxes[0]) == 4
    assert sum(len(boxes) for per_image in all_boxes for boxes in per_image) > 20


@pytest.fixture
def main(cfg, home, monkeypatch, capsys, caplog):
    """The main() of a script in this process, which needs no time to start: exit code, output."""
    monkeypatch.chdir(home)
    handler = signal.getsignal(signal.SIGTERM)

    def main(script: str, *args: object) -> tuple[int, str]:
        reset_cfg()
        caplog.clear()
        # By the name test_net, the tests of utils.net would be found.
        found = test_net_script if script == "test_net" else importlib.import_module(script)
        code = found.main([str(arg) for arg in args])
        return code, caplog.text + capsys.readouterr().err

    yield main
    signal.signal(signal.SIGTERM, handler)


def test_expected_results_decide_the_exit_code(home, main):
    file = home / "fast/test/detections.pkl"
    if not file.exists():  # the test above has made it, unless this one runs alone
        succeeded(test(FAST, home / "data.yaml", "fast/ckpt/model_step1.pth"))
    flags = ("--dataset", "data.yaml", "--eval_only", file, "--output_dir", "scored")

    def score(wanted: object) -> tuple[int, str]:
        expected = [["data_val", "box", "AP", wanted]]
        return main("test_net", *flags, "--set", "EXPECTED_RESULTS", expected)

    code, output = score([0.0, 0.05])
    assert code == 0 and "PASS: data_val > box > AP" in output
    code, output = score(0.9)
    assert code == 1 and "FAIL: data_val > box > AP" in output
    code, output = score("high")
    assert code == 2 and "'high'] is not [data set, task, metric, value]" in output


def test_a_range_of_proposals_and_scoring_a_file_again(main, home):
    flags = ("--cfg", RPN, "--dataset", "plain.yaml", "--output_dir", "again")
    options = ("--device", "cpu", "--set", *SMALL, "DATA_LOADER.NUM_THREADS", 0)
    weights = ("--load_ckpt", "rpn/ckpt/model_step1.pth")
    code, output = main("test_net", *flags, *weights, "--range", 1, 3, *options)
    assert code == 0, output
    assert [p.name for p in (home / "again").iterdir()] == ["rpn_proposals_range_1_3.pkl"]
    code, output = main("test_net", *flags, "--eval_only", "rpn/test/rpn_proposals.pkl")
    assert code == 0 and "AR@1000" in output


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ("()", ["TRAIN.PROPOSAL_FILES must name one file", "not 0"]),
        ("('nowhere.pkl',)", ["nowhere.pkl cannot be read"]),
        ("('other.pkl',)", ["other.pkl lacks 4 of 4 images"]),
        ("('few.json',)", ["few.json is not a file of proposals"]),
    ],
)
def test_what_is_wrong_with_proposal_files_is_said(main, home, files, parts):
    other = {"boxes": [np.zeros((0, 4))], "scores": [np.zeros(0)], "ids": [1]}
    (home / "other.pkl").write_bytes(pickle.dumps(other))
    flags = ("--cfg", FAST, "--dataset", "plain.yaml", "--nw", 0, "--no_cuda", "--no_save")
    code, output = main("train_net_step", *flags, "--set", *SMALL, "TRAIN.PROPOSAL_FILES", files)
    assert code == 2
    (sentence,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert all(part in sentence for part in parts)


def test_what_an_evaluation_will_lack_is_said_before_the_training(main):
    flags = ("--cfg", FAST, "--dataset", "plain.yaml", "--nw", 0, "--no_cuda", "--eval_period", 1)
    options = ("TRAIN.PROPOSAL_FILES", "('rpn/test/rpn_proposals.pkl',)", "TEST.PROPOSAL_FILES", ())
    code, output = main("train_net_step", *flags, "--set", *SMALL, *options)
    assert code == 2 and "TEST.PROPOSAL_FILES must name one file" in output
