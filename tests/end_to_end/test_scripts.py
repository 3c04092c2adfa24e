"""The scripts as a user runs them: train, test, infer; and what they say to bad input."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pypdf import PdfReader

from datasets.demo_shapes import make_demo_data

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/demo/e2e_mask_rcnn_R-50-FPN_gn_demo.yaml"
# The demo's detector at its smallest: these tests are about the scripts, not about learning.
SMALL = [
    *("TRAIN.SCALES", "(96,)", "TRAIN.MAX_SIZE", 128, "TEST.SCALE", 96, "TEST.MAX_SIZE", 128),
    *("FPN.DIM", 16, "MRCNN.DIM_REDUCED", 16, "FAST_RCNN.MLP_HEAD_DIM", 32),
    *("GROUP_NORM.NUM_GROUPS", 4, "TRAIN.IMS_PER_BATCH", 2),
]
WEIGHTS = "ckpt/model_step1.pth"


def run(script: str, *args: object, cwd: Path) -> subprocess.CompletedProcess:
    """Run a script of tools/ on the CPU, in a folder of its own."""
    command = [sys.executable, str(ROOT / "tools" / script), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def train(
    dataset: object, cwd: Path, *args: object, options: tuple = ()
) -> subprocess.CompletedProcess:
    flags = ("--nw", 0, "--no_cuda", "--cfg", CONFIG, "--dataset", dataset)
    folder = ("--output_dir", cwd / "run")
    options = ("SOLVER.MAX_ITER", 2, *SMALL, *options)
    return run("train_net_step.py", *flags, *folder, *args, "--set", *options, cwd=cwd)


def test(dataset: object, weights: Path, cwd: Path, *args: object) -> subprocess.CompletedProcess:
    flags = ("--cfg", CONFIG, "--dataset", dataset, "--load_ckpt", weights, "--device", "cpu")
    return run("test_net.py", *flags, *args, "--set", *SMALL, "TEST.SCORE_THRESH", 0.2, cwd=cwd)


def infer(dataset: object, weights: Path, cwd: Path, *args: object) -> subprocess.CompletedProcess:
    flags = ("--cfg", CONFIG, "--dataset", dataset, "--load_ckpt", weights, "--no_cuda")
    options = (*SMALL, "TEST.SCORE_THRESH", 0.2, "DATA_LOADER.NUM_THREADS", 0)
    return run("infer_simple.py", *flags, *args, "--set", *options, cwd=cwd)


test.__test__ = False


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a data set (demo.yaml) and a detector trained on it for two steps (run/)."""
    home = tmp_path_factory.mktemp("home")
    make_demo_data(home, num_train=6, num_val=3)
    done = train(home / "demo.yaml", home)
    assert done.returncode == 0, done.stderr
    return home


def test_training_leaves_a_checkpoint(home):
    checkpoint = torch.load(home / "run" / WEIGHTS, weights_only=True)
    assert {"step", "model", "optimizer"} <= set(checkpoint)
    assert checkpoint["step"] == 1


def test_testing_writes_detections_and_scores(home):
    done = test(home / "demo.yaml", home / "run" / WEIGHTS, home, "--bs", 2)
    assert done.returncode == 0, done.stderr
    # The default place: test/ beside the folder of the checkpoint.
    folder = home / "run/test"
    with (folder / "detections.pkl").open("rb") as file:
        detections = pickle.load(file)
    assert [len(per_image) for per_image in detections["all_boxes"]] == [3] * 4
    for task in ("bbox", "segmentations"):
        (file,) = folder.glob(f"{task}_*_results.json")
        assert isinstance(json.loads(file.read_text()), list)
    assert "AP50" in done.stdout
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["demo_val"]) == ["box", "mask"]
    assert "<h2>Misses</h2>" in (folder / "report.html").read_text()


def test_inference_draws_every_image_and_merges_the_pages(home):
    images = sorted((home / "images/val").iterdir())
    done = infer(
        *(home / "demo.yaml", home / "run" / WEIGHTS, home),
        *("--image_dir", home / "images/val", "--output_dir", home / "pages", "--thresh", 0.2),
    )
    assert done.returncode == 0, done.stderr
    expected = {f"{image.stem}.pdf" for image in images} | {"results.pdf"}
    assert {file.name for file in (home / "pages").iterdir()} == expected
    assert len(PdfReader(home / "pages/results.pdf").pages) == len(images)


def test_unreadable_files_are_listed_and_the_rest_is_drawn(home, tmp_path):
    good = sorted((home / "images/val").iterdir())[0]
    text, missing = tmp_path / "text.jpg", tmp_path / "missing.jpg"
    text.write_text("not an image")
    done = infer(
        *(home / "demo.yaml", home / "run" / WEIGHTS, tmp_path),
        *("--images", text, good, missing, "--format", "png"),
    )
    assert done.returncode != 0
    assert str(text) in done.stdout
    assert str(missing) in done.stdout
    assert "2 of 3 images" in done.stderr
    (picture,) = (tmp_path / "infer_outputs").iterdir()
    assert picture.name == f"{good.stem}.png"
    assert cv2.imread(str(picture)) is not None


def assert_refused(done: subprocess.CompletedProcess, folder: Path, *named: str) -> None:
    """One sentence with these words in it, exit code 2, and no file in the folder."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in named:
        assert word in lines[0], lines[0]
    left = [file for file in folder.rglob("*") if file.suffix != ".txt"] if folder.exists() else []
    assert left == [], f"left behind: {left}"


def edited_data(folder: Path, edit) -> Path:
    """A new data set whose training annotations went through edit(content); its YAML file."""
    data = make_demo_data(folder, num_train=4, num_val=2)
    file = folder / "annotations/train.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    return data


def test_missing_annotations_are_named(tmp_path):
    file = tmp_path / "nowhere.json"
    done = train(f"{file}:{tmp_path}", tmp_path)
    assert_refused(done, tmp_path / "run", str(file))


def test_a_missing_image_directory_is_named(home, tmp_path):
    shutil.copytree(home / "annotations", tmp_path / "annotations")
    shutil.copy(home / "demo.yaml", tmp_path)
    done = train(tmp_path / "demo.yaml", tmp_path)
    assert_refused(done, tmp_path / "run", str(tmp_path / "images/train"))


def test_missing_imagenet_weights_give_command_and_key(home, tmp_path):
    key = "MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS"
    weights = tmp_path / "resnet50_caffe.pth"
    options = (key, True, "RESNETS.IMAGENET_PRETRAINED_WEIGHTS", weights)
    done = train(home / "demo.yaml", tmp_path, options=options)
    assert_refused(done, tmp_path / "run", str(weights), "download_imagenet_weights.py", key)


def test_an_unreadable_training_image_is_named(tmp_path):
    data = make_demo_data(tmp_path, num_train=2, num_val=2)
    for image in (tmp_path / "images/train").iterdir():
        image.write_bytes(image.read_bytes()[:20])
    done = train(data, tmp_path)
    assert_refused(done, tmp_path / "run/ckpt", str(tmp_path / "images/train"))


def test_a_box_outside_its_image_is_named(tmp_path):
    def move_away(content):
        content["annotations"][0]["bbox"][0] += 5000

    done = train(edited_data(tmp_path, move_away), tmp_path)
    assert_refused(done, tmp_path / "run", "train.json", "5")


def test_an_unknown_config_key_is_named_with_its_neighbour(home, tmp_path):
    done = train(home / "demo.yaml", tmp_path, options=("SOLVER.BASE_RL", 1))
    assert_refused(done, tmp_path / "run", "SOLVER.BASE_RL", "SOLVER.BASE_LR")


@pytest.mark.parametrize("script", [train, test, infer])
def test_a_checkpoint_of_another_model_is_named(script, home, tmp_path):
    checkpoint = torch.load(home / "run" / WEIGHTS, weights_only=True)
    name = next(n for n in checkpoint["model"] if n.startswith("Mask_Head"))
    del checkpoint["model"][name]
    weights = tmp_path / "other.pth"
    torch.save(checkpoint, weights)
    out = tmp_path / "out"
    if script is train:
        done = train(home / "demo.yaml", tmp_path, "--load_ckpt", weights)
        out = tmp_path / "run"
    elif script is test:
        done = test(home / "demo.yaml", weights, tmp_path, "--output_dir", out)
    else:
        args = ("--image_dir", home / "images/val", "--output_dir", out)
        done = infer(home / "demo.yaml", weights, tmp_path, *args)
    assert_refused(done, out, str(weights))


def test_an_unreadable_test_image_is_named(home, tmp_path):
    data = make_demo_data(tmp_path, num_train=2, num_val=2)
    broken = sorted((tmp_path / "images/val").iterdir())[0]
    broken.write_bytes(b"")
    out = tmp_path / "out"
    done = test(data, home / "run" / WEIGHTS, tmp_path, "--output_dir", out)
    assert_refused(done, out, str(broken))


def test_an_empty_folder_of_images_is_named(home, tmp_path):
    (tmp_path / "empty").mkdir()
    args = ("--image_dir", tmp_path / "empty", "--output_dir", tmp_path / "out")
    done = infer(home / "demo.yaml", home / "run" / WEIGHTS, tmp_path, *args)
    assert_refused(done, tmp_path / "out", str(tmp_path / "empty"))


def test_only_unreadable_images_leave_no_merged_pdf(home, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_text("text")
    args = ("--image_dir", tmp_path / "photos", "--output_dir", tmp_path / "out")
    done = infer(home / "demo.yaml", home / "run" / WEIGHTS, tmp_path, *args)
    assert_refused(done, tmp_path / "out", "a.jpg")


def test_real_photographs_go_all_the_way(shared, tmp_path):
    """A few real images with everything COCO has: crowds, small objects, 80 classes."""
    coco = shared / "data/coco"
    content = json.loads((coco / "annotations/instances_val2017.json").read_text())
    crowded = {a["image_id"] for a in content["annotations"] if a["iscrowd"]}
    images = sorted(content["images"], key=lambda image: image["id"] not in crowded)[:4]
    kept = {image["id"] for image in images}
    content["images"] = images
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (tmp_path / "few.json").write_text(json.dumps(content))
    dataset = f"{tmp_path / 'few.json'}:{coco / 'images/val2017'}"

    done = train(dataset, tmp_path)
    assert done.returncode == 0, done.stderr
    done = test(dataset, tmp_path / "run" / WEIGHTS, tmp_path, "--output_dir", tmp_path / "test")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "test/detections.pkl").open("rb") as file:
        assert len(pickle.load(file)["all_boxes"]) == 81
    photo = next((shared / "data/demo_images").glob("*_k.jpg"))
    args = ("--images", photo, "--format", "jpg", "--thresh", 0)
    done = infer("coco2017", tmp_path / "run" / WEIGHTS, tmp_path, *args)
    assert done.returncode == 0, done.stderr
    picture = cv2.imread(str(tmp_path / f"infer_outputs/{photo.stem}.jpg"))
    assert picture.shape == cv2.imread(str(photo)).shape
    assert np.isfinite(picture).all()
