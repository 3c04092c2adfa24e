"""Heat maps: which layers the keys ask for, their size and blobs."""

from __future__ import annotations

import itertools

import pytest
import torch

from core.errors import UserError


@pytest.fixture
def outputs(cfg):
    def build(deconv, deconv_output, up_scale, size):
        from modeling.keypoint_rcnn_heads import keypoint_outputs

        cfg.KRCNN.NUM_KEYPOINTS, cfg.KRCNN.DECONV_DIM = 17, 6
        cfg.KRCNN.USE_DECONV, cfg.KRCNN.USE_DECONV_OUTPUT = deconv, deconv_output
        cfg.KRCNN.UP_SCALE, cfg.KRCNN.HEATMAP_SIZE = up_scale, size
        cfg.KRCNN.ROI_KEYPOINTS_HEAD = "keypoint_rcnn_heads.roi_pose_head_v1convX"
        return keypoint_outputs(5)

    return build


@pytest.mark.parametrize(
    ("deconv", "deconv_output", "up_scale"),
    list(itertools.product([False, True], [False, True], [-1, 2, 4])),
)
def test_every_combination_enlarges_by_its_factors(deconv, deconv_output, up_scale, outputs):
    size = 7 * (2 if deconv else 1) * (2 if deconv_output else 1) * max(up_scale, 1)
    module = outputs(deconv, deconv_output, up_scale, size)
    assert module(torch.randn(2, 5, 7, 7)).shape == (2, 17, size, size)
    mapping, _ = module.detectron_weight_mapping()
    state = module.state_dict()
    shapes = {blob: tuple(state[name].shape) for name, blob in mapping.items() if blob}
    dim = 6 if deconv else 5
    score = "kps_score" if up_scale == -1 else "kps_score_lowres"
    expected = {
        f"{score}_w": (dim, 17, 4, 4) if deconv_output else (17, dim, 1, 1),
        f"{score}_b": (17,),
    }
    if deconv:
        expected |= {"kps_deconv_w": (5, 6, 4, 4), "kps_deconv_b": (6,)}
    assert shapes == expected
    fixed = {name for name, blob in mapping.items() if blob is None}
    assert fixed == {name for name, p in module.named_parameters() if not p.requires_grad}


def test_heat_maps_of_another_size_than_their_targets_are_named(outputs):
    module = outputs(False, True, 2, 56)
    with pytest.raises(UserError, match=r"HEATMAP_SIZE is 56, but the heat maps are 28x28"):
        module(torch.zeros(1, 5, 7, 7))


@pytest.mark.parametrize(("dilation", "side"), [(1, 7), (2, 14)])
def test_the_res5_head_has_a_stage_of_its_own(dilation, side, cfg):
    from modeling.keypoint_rcnn_heads import ResNet_roi_conv5_head_for_keypoints

    cfg.KRCNN.DILATION, cfg.KRCNN.ROI_XFORM_RESOLUTION = dilation, 14
    cfg.RESNETS.WIDTH_PER_GROUP, cfg.RESNETS.RES2_OUT_CHANNELS = 4, 8
    head = ResNet_roi_conv5_head_for_keypoints(32, lambda x, rpn_ret, **options: x, 1 / 16)
    assert head(torch.zeros(2, 32, 14, 14), {}).shape == (2, head.dim_out, side, side)
    mapping, _ = head.detectron_weight_mapping()
    assert mapping["res5.0.conv1.weight"] == "_[pose]_res5_0_branch2a_w"
    assert set(mapping) == set(head.state_dict())
