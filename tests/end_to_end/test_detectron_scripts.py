"""One of Detectron's own configs, as it is, in every script; and its weights there and back."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch

import export_weights
import infer_simple
import train_net_step
from datasets.demo_shapes import make_demo_data
from detectron_configs import config_table, detectron_yaml
from scripts import test_net_script

STEM = "scratch_e2e_mask_rcnn_R-50-FPN_3x_gn"
SMALL = [
    *("TRAIN.SCALES", "(64,)", "TRAIN.MAX_SIZE", 96, "TEST.SCALE", 64, "TEST.MAX_SIZE", 96),
    *("FPN.DIM", 16, "MRCNN.DIM_REDUCED", 16, "FAST_RCNN.MLP_HEAD_DIM", 32),
    *("FAST_RCNN.CONV_HEAD_DIM", 16, "GROUP_NORM.NUM_GROUPS", 4, "RESNETS.WIDTH_PER_GROUP", 8),
    *("RESNETS.STEM_OUT_CHANNELS", 8, "RESNETS.RES2_OUT_CHANNELS", 32),
    *("TRAIN.BATCH_SIZE_PER_IM", 16, "TEST.DETECTIONS_PER_IM", 5, "SOLVER.MAX_ITER", 1),
    *("DATA_LOADER.NUM_THREADS", 0, "TEST.SCORE_THRESH", 0.0),
]

SOURCES = ("from_pkl", "from_pth")


@pytest.fixture
def run(tmp_path, cfg, monkeypatch):
    """Run a script on Detectron's file, in this process."""
    from core.config import reset_cfg

    if not config_table():
        pytest.skip("no reference data: the folder shared/ is not beside this checkout")
    make_demo_data(tmp_path, num_train=2, num_val=1)
    (tmp_path / f"{STEM}.yaml").write_text(detectron_yaml(STEM))
    monkeypatch.chdir(tmp_path)
    handlers = list(logging.getLogger().handlers)

    def run(script, *args):
        reset_cfg()
        options = [*SMALL, "DATA_DIR", tmp_path]
        return script.main([*map(str, [*args, "--cfg", f"{STEM}.yaml", "--set", *options])])

    yield run
    for handler in set(logging.getLogger().handlers) - set(handlers):
        logging.getLogger().removeHandler(handler)


def test_every_script_takes_it_unmodified(run, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data, device = ("--dataset", "demo.yaml"), ("--device", "cpu")
    flags = ("--bs", 1, "--no_lr_scaling", "--output_dir", "run")
    assert run(train_net_step, *data, *device, *flags) == 0
    said = [m for m in caplog.messages if m.startswith(f"{STEM}.yaml: ")]
    assert len(said) == len(set(said)) >= 4
    assert any("MODEL.CONV_BODY FPN.add_fpn_ResNet50_conv5_body is " in m for m in said)
    assert any("TRAIN.FREEZE_AT 0 is taken as RESNETS.FREEZE_AT 0" in m for m in said)

    checkpoint = "run/ckpt/model_step0.pth"
    assert run(export_weights, "model.pkl", "--load_ckpt", checkpoint) == 0
    trained = torch.load(checkpoint, weights_only=True)["model"]
    with open("model.pkl", "rb") as file:
        blobs = pickle.load(file, encoding="latin1")["blobs"]
    assert len(blobs) == len(trained)

    weights = ("--load_detectron", "model.pkl")
    assert run(test_net_script, *data, *device, *weights, "--output_dir", SOURCES[0]) == 0
    assert (
        run(test_net_script, *data, *device, "--load_ckpt", checkpoint, "--output_dir", SOURCES[1])
        == 0
    )
    found = [(tmp_path / source / "detections.pkl").read_bytes() for source in SOURCES]
    assert found[0] == found[1]
    assert any(len(boxes) for of_class in pickle.loads(found[0])["all_boxes"] for boxes in of_class)
    pictures = ("--image_dir", "images/val", "--output_dir", "drawn", "--format", "png")
    assert run(infer_simple, *data, *device, *weights, *pictures) == 0
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 1
