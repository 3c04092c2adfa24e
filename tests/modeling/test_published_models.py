"""Every model that Detectron published is built from its own file, with its very parameters."""

from __future__ import annotations

import json

import pytest
import torch

from core.config import assert_and_infer_cfg, merge_cfg_from_file
from detectron_configs import detectron_yaml, table_stems

# Models whose blobs were not recorded, and one with the same.
SAME_BLOBS = {
    "e2e_keypoint_rcnn_X-101-64x4d-FPN_s1x": "e2e_keypoint_rcnn_X-101-64x4d-FPN_1x",
    "keypoint_rcnn_X-101-32x8d-FPN_1x": "keypoint_rcnn_X-101-32x8d-FPN_s1x",
    "mask_rcnn_R-50-C4_1x": "mask_rcnn_R-50-C4_2x",
    "retinanet_X-101-64x4d-FPN_1x": "retinanet_X-101-64x4d-FPN_2x",
    "rpn_X-101-32x8d-FPN_1x": "rpn_person_only_X-101-32x8d-FPN_1x",
    "scratch_e2e_mask_rcnn_R-101-FPN_3x_gn": "e2e_mask_rcnn_R-101-FPN_2x_gn",
}
# Frozen bilinear upsampling, which Detectron stores and nobody loads.
CONSTANT_BLOBS = {"kps_score_w", "kps_score_b"}


def recorded_shapes(stem, shared):
    """{blob: shape} of a model as Detectron makes it."""
    path = shared / f"spec/detectron_blobs/{SAME_BLOBS.get(stem, stem)}.json"
    if path.exists():
        return json.loads(path.read_text())
    spec = json.loads((shared / f"spec/blobs/{stem}.json").read_text())
    return {blob: spec["params"][name] for name, blob in spec["detectron"].items() if blob}


@pytest.mark.parametrize("stem", table_stems())
def test_parameters_have_detectrons_blobs(stem, shared, cfg, tmp_path):
    from modeling.model_builder import Generalized_RCNN

    path = tmp_path / f"{stem}.yaml"
    path.write_text(detectron_yaml(stem))
    merge_cfg_from_file(path)
    cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS = False
    # Proposal files are given for data sets, which come with --dataset.
    cfg.TRAIN.DATASETS, cfg.TEST.DATASETS = (), ()
    assert_and_infer_cfg()
    with torch.device("meta"):
        model = Generalized_RCNN()
    mapping, _ = model.detectron_weight_mapping
    state = model.state_dict()
    assert set(mapping) == set(state)
    shapes = {blob: list(state[name].shape) for name, blob in mapping.items() if blob}
    expected = recorded_shapes(stem, shared)
    assert shapes == {b: s for b, s in expected.items() if b not in CONSTANT_BLOBS}
