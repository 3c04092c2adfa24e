"""The demo's detector at its smallest, with random weights in a file: for tests of what is done
with detections, not of the detections."""

from __future__ import annotations

from pathlib import Path

import torch

CONFIG = Path(__file__).resolve().parent.parent / "configs/demo/e2e_mask_rcnn_R-50-FPN_gn_demo.yaml"
OPTIONS = [
    *("TEST.SCALE", 96, "TEST.MAX_SIZE", 128, "TEST.SCORE_THRESH", 0.2, "FPN.DIM", 16),
    *("MRCNN.DIM_REDUCED", 16, "FAST_RCNN.MLP_HEAD_DIM", 32, "GROUP_NORM.NUM_GROUPS", 4),
    *("DATA_LOADER.NUM_THREADS", 2),
]
KEYPOINTS = [
    *("MODEL.MASK_ON", False, "MODEL.KEYPOINTS_ON", True, "KRCNN.NUM_KEYPOINTS", 17),
    *("KRCNN.ROI_KEYPOINTS_HEAD", "keypoint_rcnn_heads.roi_pose_head_v1convX"),
    *("KRCNN.NUM_STACKED_CONVS", 1, "KRCNN.CONV_HEAD_DIM", 16, "KRCNN.HEATMAP_SIZE", 28),
    *("KRCNN.ROI_XFORM_METHOD", "RoIAlign", "KRCNN.ROI_XFORM_RESOLUTION", 7),
    *("KRCNN.USE_DECONV_OUTPUT", True, "KRCNN.UP_SCALE", 2),
]


def save_small_model(path: Path, num_classes: int = 4, extra: list | None = None) -> list:
    """Write a checkpoint of such a model; returns the options (as for `--set`) that it needs."""
    from core.config import (
        assert_and_infer_cfg,
        cfg,
        merge_cfg_from_file,
        merge_cfg_from_list,
        reset_cfg,
    )
    from modeling.model_builder import Generalized_RCNN

    options = [*OPTIONS, *(extra or [])]
    reset_cfg()
    merge_cfg_from_file(CONFIG)
    merge_cfg_from_list(options)
    cfg.MODEL.NUM_CLASSES = num_classes
    assert_and_infer_cfg()
    torch.manual_seed(0)
    model = Generalized_RCNN()
    # As initialised, all classes score alike; spread them, so that there is something to find.
    torch.nn.init.normal_(model.Box_Outs.cls_score.weight, std=0.5)
    torch.save({"model": model.state_dict()}, path)
    reset_cfg()
    return options
