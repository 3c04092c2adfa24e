"""ResNet and pyramid bodies: strides, dilation, what P2only keeps, and the RPN's stride."""

from __future__ import annotations

import pytest
import torch

from core.errors import UserError

NARROW = {
    "RESNETS.STEM_OUT_CHANNELS": 8,
    "RESNETS.WIDTH_PER_GROUP": 4,
    "RESNETS.RES2_OUT_CHANNELS": 16,
    "FPN.DIM": 8,
}
PYRAMID = {"FPN.FPN_ON": True, "FPN.MULTILEVEL_ROIS": True, "FPN.MULTILEVEL_RPN": True}


@pytest.fixture
def body(cfg):
    from core.config import merge_cfg_from_list

    def build(name, options=None):
        from modeling.model_builder import get_func

        options = NARROW | (options or {})
        merge_cfg_from_list([x for pair in options.items() for x in pair])
        torch.manual_seed(0)
        return get_func(name)().eval()

    return build


DETECTRONS_NAMES = {
    "MODEL.CONV_BODY": [
        *(f"ResNet.add_ResNet{depth}_conv4_body" for depth in (50, 101)),
        *(f"ResNet.add_ResNet{depth}_conv5_body" for depth in (50, 101, 152)),
        *(f"FPN.add_fpn_ResNet{depth}_conv5_body" for depth in (50, 101, 152)),
        *(f"FPN.add_fpn_ResNet{depth}_conv5_P2only_body" for depth in (50, 101, 152)),
        "VGG16.add_VGG16_conv5_body",
        "VGG_CNN_M_1024.add_VGG_CNN_M_1024_conv5_body",
    ],
    "FAST_RCNN.ROI_BOX_HEAD": [
        "fast_rcnn_heads.add_roi_2mlp_head",
        "fast_rcnn_heads.add_roi_Xconv1fc_head",
        "fast_rcnn_heads.add_roi_Xconv1fc_gn_head",
        "ResNet.add_ResNet_roi_conv5_head",
        "VGG16.add_VGG16_roi_fc_head",
        "VGG_CNN_M_1024.add_VGG_CNN_M_1024_roi_fc_head",
        "head_builder.add_roi_2mlp_head",
    ],
    "MRCNN.ROI_MASK_HEAD": [
        *(
            f"mask_rcnn_heads.{prefix}mask_rcnn_fcn_head_{kind}"
            for prefix in ("", "ResNet_")
            for kind in ("v1up4convs", "v1up", "v0upshare", "v0up")
        ),
        "mask_rcnn_heads.mask_rcnn_fcn_head_v1up4convs_gn",
    ],
    "KRCNN.ROI_KEYPOINTS_HEAD": [
        "keypoint_rcnn_heads.add_roi_pose_head_v1convX",
        "keypoint_rcnn_heads.add_ResNet_roi_conv5_head_for_keypoints",
    ],
}


@pytest.mark.parametrize("key", DETECTRONS_NAMES)
def test_every_body_and_head_of_detectrons_is_here(key, cfg):
    from core.config import merge_cfg_from_list
    from modeling.model_builder import get_func

    group, name = key.split(".")
    for function in DETECTRONS_NAMES[key]:
        merge_cfg_from_list([key, function])
        assert callable(get_func(cfg[group][name])), function


@pytest.mark.parametrize("depth", [50, 101, 152])
@pytest.mark.parametrize(("dilation", "stride"), [(1, 32), (2, 16)])
def test_dilation_of_res5_stands_in_for_its_stride(depth, dilation, stride, body):
    resnet = body(f"ResNet.ResNet{depth}_conv5_body", {"RESNETS.RES5_DILATION": dilation})
    assert resnet.spatial_scale == 1 / stride
    assert resnet(torch.zeros(1, 3, 64, 96)).shape == (1, 128, 64 // stride, 96 // stride)
    assert {block.conv2.dilation for block in resnet.res5} == {(dilation, dilation)}
    assert {block.conv2.dilation for block in resnet.res4} == {(1, 1)}


@pytest.mark.parametrize("depth", [50, 101, 152])
def test_p2only_is_the_finest_level_of_the_whole_pyramid(depth, body):
    alone = body(f"FPN.fpn_ResNet{depth}_conv5_P2only_body")
    whole = body(f"FPN.fpn_ResNet{depth}_conv5_body", PYRAMID)
    names = {name: p.shape for name, p in whole.state_dict().items()}
    assert {name: p.shape for name, p in alone.state_dict().items()} == names
    assert alone.detectron_weight_mapping() == whole.detectron_weight_mapping()
    alone.load_state_dict(whole.state_dict())
    x = torch.randn(1, 3, 64, 96)
    assert torch.equal(alone(x), whole(x)[-1])
    assert alone.spatial_scale == whole.spatial_scale[-1] == 1 / 4
    still = {n for n, p in alone.named_parameters() if n.startswith("posthoc") and p.requires_grad}
    assert still == {"posthoc_modules.3.weight", "posthoc_modules.3.bias"}


def test_images_of_a_p2only_body_are_padded_as_its_pyramid_needs(cfg):
    from utils.blob import coarsest_stride

    cfg.MODEL.CONV_BODY = "FPN.fpn_ResNet50_conv5_P2only_body"
    assert coarsest_stride() == 32
    cfg.MODEL.CONV_BODY = "ResNet.ResNet50_conv4_body"
    assert coarsest_stride() == 1


def test_anchors_of_another_stride_than_the_features_are_refused(cfg):
    from modeling.rpn_heads import generic_rpn_outputs

    cfg.MODEL.CONV_BODY = "ResNet.ResNet50_conv5_body"
    with pytest.raises(UserError, match="RPN.STRIDE is 16, .* stride 32: set it to that"):
        generic_rpn_outputs(8, 1 / 32)
    cfg.RPN.STRIDE = 32
    assert generic_rpn_outputs(8, 1 / 32).strides == [32]


@pytest.mark.parametrize("multilevel", [False, True])
def test_the_rpns_hidden_layer_has_the_width_that_the_config_says(multilevel, cfg):
    from modeling.rpn_heads import generic_rpn_outputs

    cfg.FPN.FPN_ON = cfg.FPN.MULTILEVEL_RPN = multilevel
    for own, out_dim, width in ((True, 12, 8), (False, 12, 12)):
        cfg.RPN.OUT_DIM_AS_IN_DIM, cfg.RPN.OUT_DIM = own, out_dim
        rpn = generic_rpn_outputs(8, 1 / 16)
        conv = getattr(rpn, f"{rpn.prefix}_conv")
        assert (conv.in_channels, conv.out_channels) == (8, width)
