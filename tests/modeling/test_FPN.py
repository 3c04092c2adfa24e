"""The pyramid's levels above the backbone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_train_step import build  # noqa: F401  (a fixture)

from core.config import ConfigError

RPN_ONLY = {
    "MODEL.RPN_ONLY": True,
    "MODEL.FASTER_RCNN": False,
    "MODEL.MASK_ON": False,
    "FPN.MULTILEVEL_ROIS": False,
}
TO_SEVEN = RPN_ONLY | {
    "FPN.EXTRA_CONV_LEVELS": True,
    "FPN.RPN_MIN_LEVEL": 3,
    "FPN.RPN_MAX_LEVEL": 7,
    "FPN.COARSEST_STRIDE": 128,
}


def test_extra_levels_are_convolved_from_the_backbone(build):  # noqa: F811
    body = build(TO_SEVEN).Conv_Body
    data = torch.randn(2, 3, 128, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = body(data)
        c5 = body.conv_body(data)
        p6_conv, p7_conv = body.extra_pyramid_modules
        p6 = F.conv2d(c5, p6_conv.weight, p6_conv.bias, stride=2, padding=1)
        p7 = F.conv2d(p6.clamp(min=0), p7_conv.weight, p7_conv.bias, stride=2, padding=1)
    assert body.spatial_scale == [1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8]
    assert [m.shape[2:] for m in maps] == [(1, 2), (2, 4), (4, 8), (8, 16), (16, 32)]
    torch.testing.assert_close(maps[0], p7)
    torch.testing.assert_close(maps[1], p6)  # the heads see it before it is rectified
    assert (p6 < 0).any()
    # GN is for the other levels; Xavier's bound is sqrt(3 / fan in).
    assert p6_conv.bias is not None and (p6_conv.bias == 0).all()
    fan_in = p6_conv.in_channels * 9
    assert p6_conv.weight.abs().max().item() == pytest.approx((3 / fan_in) ** 0.5, rel=0.01)
    assert p6_conv.in_channels == c5.shape[1] and p7_conv.in_channels == p6.shape[1]


def test_stages_below_the_finest_level_get_no_lateral(build):  # noqa: F811
    model = build(TO_SEVEN)
    blobs = set(model.detectron_weight_mapping[0].values())
    assert {"fpn_6_w", "fpn_6_b", "fpn_7_w", "fpn_7_b", "fpn_res3_3_sum_w"} <= blobs
    assert not any(blob.startswith(("fpn_res2", "fpn_inner_res2")) for blob in blobs)


def test_extra_levels_without_a_level_above_five_change_nothing(build):  # noqa: F811
    options = {"FPN.EXTRA_CONV_LEVELS": True, "FPN.RPN_MAX_LEVEL": 5}
    body = build(RPN_ONLY | options).Conv_Body
    assert len(body.extra_pyramid_modules) == 0 and len(body(torch.zeros(1, 3, 64, 64))) == 4


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"FPN.RPN_MAX_LEVEL": 7}, "FPN.RPN_MAX_LEVEL"),
        ({"FPN.RPN_MIN_LEVEL": 1}, "FPN.RPN_MIN_LEVEL"),
        ({"FPN.ROI_MIN_LEVEL": 6, "FPN.ROI_MAX_LEVEL": 6}, "FPN.ROI_MIN_LEVEL"),
    ],
)
def test_levels_that_cannot_be_are_named(options, key, build):  # noqa: F811
    with pytest.raises(ConfigError, match=key):
        build(options)
