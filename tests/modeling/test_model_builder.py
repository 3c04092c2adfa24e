"""Every parameter's name, shape and Detectron blob, and what a config can get wrong."""

from __future__ import annotations

import json

import pytest
import torch

from core.errors import UserError
from golden_weights import CONFIGS, golden_cfg

# The 40 that Detectron.pytorch published; test_published_models.py has Detectron's own.
FOLDERS = ("baselines", "gn_baselines", "getting_started")
STEMS = sorted(path.stem for name in FOLDERS for path in (CONFIGS / name).glob("*e2e_*.yaml"))


def build():
    from modeling.model_builder import Generalized_RCNN

    with torch.device("meta"):
        return Generalized_RCNN()


@pytest.mark.parametrize("stem", STEMS)
def test_parameters_and_blobs_are_the_family_s(stem, shared, cfg):
    path = shared / f"spec/blobs/{stem}.json"
    if not path.exists():
        pytest.skip("its names and shapes were not recorded")
    spec = json.loads(path.read_text())
    golden_cfg(stem, shared)
    model = build()
    shapes = {name: list(p.shape) for name, p in model.state_dict().items()}
    assert shapes == spec["params"]
    mapping, orphans = model.detectron_weight_mapping
    assert mapping == spec["detectron"]
    assert set(orphans) == set(spec["orphans"])
    # Optimizer states of the family go by this order.
    assert [name for name, _ in model.named_parameters()] == spec["named_parameters_order"]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {name for name, flag in spec["requires_grad"].items() if flag}
    if stem.startswith("scratch"):  # published with a frozen random stem, a bug
        assert trainable == set(spec["requires_grad"])
    else:
        assert trainable == expected


def test_frozen_conv_body_freezes_the_pyramid_too(shared, cfg):
    golden_cfg("e2e_mask_rcnn_R-50-FPN_1x", shared, ["TRAIN.FREEZE_CONV_BODY", True])
    model = build()
    assert not any(p.requires_grad for p in model.Conv_Body.parameters())
    assert all(p.requires_grad for p in model.Box_Head.parameters())


def test_head_builder_is_an_alias(shared, cfg):
    golden_cfg(
        "e2e_mask_rcnn_R-50-FPN_1x",
        shared,
        ["FAST_RCNN.ROI_BOX_HEAD", "head_builder.roi_2mlp_head"],
    )
    assert build().Box_Head.dim_out == 1024


@pytest.mark.parametrize("name", ["fast_rcnn_heads.no_such_head", "no_such_file.head", "head"])
def test_an_unknown_head_is_named(name, shared, cfg):
    golden_cfg("e2e_faster_rcnn_R-50-FPN_1x", shared, ["FAST_RCNN.ROI_BOX_HEAD", name])
    with pytest.raises(UserError, match=name):
        build()


def pooled(method, crop_max_pool, shared):
    """The level and the x coordinates that RoIs of four sizes are pooled from, coarse to fine."""
    options = ["CROP_RESIZE_WITH_MAX_POOL", crop_max_pool]
    golden_cfg("e2e_faster_rcnn_R-50-FPN_1x", shared, options)
    maps = []
    for level in (5, 4, 3, 2):
        x = torch.arange(1024 >> level, dtype=torch.float32).expand(1024 >> level, -1) * 2**level
        maps.append(torch.stack([torch.full_like(x, level), x])[None])
    sides = torch.tensor([500.0, 240, 120, 40])
    zeros = torch.zeros(4)
    rois = torch.stack([zeros, zeros + 160, zeros + 160, 160 + sides, 160 + sides], dim=1)
    scales = [1 / 32, 1 / 16, 1 / 8, 1 / 4]
    out = build().roi_feature_transform(
        maps, {"rois": rois}, method=method, resolution=4, spatial_scale=scales, sampling_ratio=2
    )
    return out[:, 0], out[:, 1, 0], sides


@pytest.mark.parametrize("method", ["RoIAlign", "RoIPoolF", "RoICrop"])
def test_every_method_pools_an_roi_from_the_level_of_its_size(method, shared, cfg):
    levels, x, sides = pooled(method, True, shared)
    assert torch.equal(levels, torch.tensor([5.0, 4, 3, 2]).view(4, 1, 1).expand(4, 4, 4))
    stride = torch.tensor([32.0, 16, 8, 4]).view(4, 1)
    low, high = 160 + sides[:, None] / 4 * torch.arange(4), sides[:, None] / 4
    assert (x >= low - stride).all() and (x <= low + high + stride).all()


def test_crops_have_the_max_pool_that_the_config_says(shared, cfg):
    _, x, sides = pooled("RoICrop", False, shared)
    thirds = torch.tensor([0, 1 / 3, 2 / 3, 1])
    torch.testing.assert_close(x, 160 + sides[:, None] * thirds)
    _, x, _ = pooled("RoICrop", True, shared)
    sevenths = torch.tensor([1, 3, 5, 7]) / 7  # the second of each two of eight points
    torch.testing.assert_close(x, 160 + sides[:, None] * sevenths)


def test_an_unknown_pooling_method_is_named(shared, cfg):
    with pytest.raises(UserError, match="ROI_XFORM_METHOD 'RoIPool' is not"):
        pooled("RoIPool", True, shared)
