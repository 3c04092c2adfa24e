"""RetinaNet and RPNs on real photographs: training, testing, drawing."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from test_scripts import run

from retinanet_models import CONFIG, NARROW

WEIGHTS = "ckpt/model_step1.pth"
SMALL = {
    **NARROW,
    "TRAIN.SCALES": "(96,)",
    "TRAIN.MAX_SIZE": 160,
    "TRAIN.IMS_PER_BATCH": 2,
    "TEST.SCALE": 96,
    "TEST.MAX_SIZE": 160,
    "SOLVER.MAX_ITER": 2,
    "DATA_LOADER.NUM_THREADS": 0,
}
RPN_FPN = {
    "MODEL.TYPE": "rpn",
    "MODEL.RPN_ONLY": True,
    "RETINANET.RETINANET_ON": False,
    "FPN.EXTRA_CONV_LEVELS": False,
    "FPN.RPN_MIN_LEVEL": 2,
    "FPN.RPN_MAX_LEVEL": 6,
}
RPN_C4 = {
    **RPN_FPN,
    "MODEL.CONV_BODY": "ResNet.ResNet50_conv4_body",
    "FPN.FPN_ON": False,
    "FPN.MULTILEVEL_RPN": False,
}


def flat(options: dict) -> list:
    return [x for pair in options.items() for x in pair]


@pytest.fixture(scope="module")
def coco(shared, tmp_path_factory) -> str:
    """Four photographs, those with crowd regions first, as --dataset."""
    folder = shared / "data/coco"
    content = json.loads((folder / "annotations/instances_val2017.json").read_text())
    crowded = {a["image_id"] for a in content["annotations"] if a["iscrowd"]}
    images = sorted(content["images"], key=lambda image: image["id"] not in crowded)[:4]
    kept = {image["id"] for image in images}
    annotations = [a for a in content["annotations"] if a["image_id"] in kept]
    few = tmp_path_factory.mktemp("coco") / "few.json"
    few.write_text(json.dumps({**content, "images": images, "annotations": annotations}))
    return f"{few}:{folder / 'images/val2017'}"


def train(dataset: str, cwd: Path, options: dict) -> tuple[dict, str]:
    """Two steps; returns the last values of the log and all that was said."""
    flags = ("--dataset", dataset, "--cfg", CONFIG, "--no_cuda", "--output_dir", cwd / "run")
    settings = flat({**SMALL, **options})
    done = run("train_net_step.py", *flags, "--disp_interval", 1, "--set", *settings, cwd=cwd)
    assert done.returncode == 0, done.stderr
    last = (cwd / "run/log.jsonl").read_text().splitlines()[-1]
    return json.loads(last), done.stdout + done.stderr


def test_retinanet_goes_all_the_way(coco, shared, tmp_path):
    line, _ = train(coco, tmp_path, {})
    names = [f"{kind}_fpn{k}" for kind in ("retnet_loss_bbox", "fl") for k in range(3, 8)]
    assert all(math.isfinite(line[name]) for name in names)
    assert line["fl"] > 0 and line["retnet_loss_bbox"] > 0 and line["retnet_fg_num"] > 2
    flags = ("--cfg", CONFIG, "--load_ckpt", tmp_path / "run" / WEIGHTS)
    done = run(
        *("test_net.py", *flags, "--dataset", coco, "--device", "cpu", "--bs", 2),
        *("--output_dir", tmp_path / "test", "--set", *flat(SMALL)),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "test/detections.pkl").open("rb") as file:
        boxes = pickle.load(file)["all_boxes"]
    assert len(boxes) == 81
    # The coarsest level shows whatever it finds, so that there is something in every image.
    assert all(0 < sum(len(of_class[i]) for of_class in boxes) <= 100 for i in range(4))
    photo = next((shared / "data/demo_images").glob("*_k.jpg"))
    done = run(
        *("infer_simple.py", *flags, "--dataset", "coco2017", "--no_cuda", "--images", photo),
        *("--format", "jpg", "--thresh", 0, "--set", *flat(SMALL)),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"infer_outputs/{photo.stem}.jpg").is_file()


@pytest.mark.parametrize("options", [RPN_FPN, RPN_C4], ids=["FPN", "C4"])
def test_an_rpn_alone_trains(options, shared, tmp_path):
    """On people with keypoints: an RPN needs no visible point in an image, only a person."""
    folder = shared / "data/coco"
    people = f"{folder / 'annotations/person_keypoints_val2017.json'}:{folder / 'images/val2017'}"
    line, said = train(people, tmp_path, options)
    levels = [f"_fpn{k}" for k in range(2, 7)] if options is RPN_FPN else [""]
    names = [f"loss_rpn_{kind}{level}" for kind in ("cls", "bbox") for level in levels]
    assert all(math.isfinite(line[name]) for name in names)
    assert line["loss"] == pytest.approx(sum(line[name] for name in names), rel=1e-4)
    assert "27 without objects" in said and "visible keypoint" not in said
    weights = torch.load(tmp_path / "run" / WEIGHTS, weights_only=True)["model"]
    assert {name.partition(".")[0] for name in weights} == {"Conv_Body", "RPN"}
