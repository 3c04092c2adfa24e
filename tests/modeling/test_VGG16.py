"""VGG16 and VGG_CNN_M_1024 against layer-by-layer arithmetic, and their names."""

from __future__ import annotations

import numpy as np
import pytest
import torch

VGG16_CONVS = {
    "conv1_1": (64, 3), "conv1_2": (64, 64), "conv2_1": (128, 64), "conv2_2": (128, 128),
    "conv3_1": (256, 128), "conv3_2": (256, 256), "conv3_3": (256, 256), "conv4_1": (512, 256),
    "conv4_2": (512, 512), "conv4_3": (512, 512), "conv5_1": (512, 512), "conv5_2": (512, 512),
    "conv5_3": (512, 512),
}  # fmt: skip
VGG_M_CONVS = {
    "conv1": (96, 3, 7), "conv2": (256, 96, 5), "conv3": (512, 256, 3), "conv4": (512, 512, 3),
    "conv5": (512, 512, 3),
}  # fmt: skip


def conv(x, layer, stride, pad):
    """Convolution of x (C, H, W) from its definition, pixel by pixel of the kernel, then ReLU."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    side = weight.shape[2]
    height, width = ((n - side) // stride + 1 for n in x.shape[1:])
    out = np.tile(bias.astype(np.float64)[:, None, None], (1, height, width))
    for dy in range(side):
        for dx in range(side):
            shifted = x[:, dy : dy + stride * height : stride, dx : dx + stride * width : stride]
            out += np.einsum("oc,chw->ohw", weight[:, :, dy, dx], shifted[:, :height, :width])
    return np.maximum(out, 0)


def max_pool(x, side, stride):
    height, width = ((n - side) // stride + 1 for n in x.shape[1:])
    out = np.zeros((len(x), height, width))
    for i in range(height):
        for j in range(width):
            window = x[:, i * stride : i * stride + side, j * stride : j * stride + side]
            out[:, i, j] = window.max(axis=(1, 2))
    return out


def response_norm(x):
    """x / (2 + 5e-4 / 5 * sum of squares over 5 channels) ** 0.75."""
    out = np.zeros_like(x)
    for c in range(len(x)):
        squares = (x[max(0, c - 2) : c + 3] ** 2).sum(axis=0)
        out[c] = x[c] / (2 + 5e-4 / 5 * squares) ** 0.75
    return out


@pytest.fixture
def body(cfg):
    def build(name):
        from modeling.model_builder import get_func

        torch.manual_seed(0)
        module = get_func(f"{name}.{name}_conv5_body")()
        for parameter in module.parameters():
            if parameter.dim() == 1:  # biases are 0 at first, which would prove nothing
                torch.nn.init.normal_(parameter, std=0.1)
        return module

    return build


def test_vgg16_is_five_blocks_of_3x3_convolutions_with_pooling_between(body):
    vgg = body("VGG16")
    x = torch.randn(1, 3, 40, 52)
    out = vgg(x)
    expected = x[0].double().numpy()
    for name in VGG16_CONVS:
        if name.endswith("_1") and name != "conv1_1":
            expected = max_pool(expected, 2, 2)
        expected = conv(expected, getattr(vgg, name), stride=1, pad=1)
    assert out.shape == (1, vgg.dim_out, 40 // 16, 52 // 16)
    assert vgg.spatial_scale == 1 / 16
    np.testing.assert_allclose(out[0].detach().numpy(), expected, rtol=1e-3, atol=1e-5)


def test_vgg_m_has_response_normalisation_and_does_not_pad_at_first(body):
    vgg = body("VGG_CNN_M_1024")
    x = torch.randn(1, 3, 90, 111) * 50
    out = vgg(x)
    expected = x[0].double().numpy()
    for name, stride, pad in (("conv1", 2, 0), ("conv2", 2, 0)):
        expected = response_norm(conv(expected, getattr(vgg, name), stride, pad))
        expected = max_pool(expected, 3, 2)
    for name in ("conv3", "conv4", "conv5"):
        expected = conv(expected, getattr(vgg, name), stride=1, pad=1)
    assert vgg.spatial_scale == 1 / 16 and vgg.dim_out == 512
    np.testing.assert_allclose(out[0].detach().numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "convs", "frozen"),
    [
        ("VGG16", VGG16_CONVS, {"conv1_1", "conv1_2", "conv2_1", "conv2_2"}),
        ("VGG_CNN_M_1024", VGG_M_CONVS, {"conv1"}),
    ],
)
@pytest.mark.parametrize("freeze_at", [0, 2])
def test_bodies_have_detectrons_blobs_and_always_freeze_their_first_layers(
    name, convs, frozen, freeze_at, cfg
):
    from modeling.model_builder import get_func

    cfg.RESNETS.FREEZE_AT = freeze_at
    with torch.device("meta"):
        module = get_func(f"{name}.{name}_conv5_body")()
    mapping, _ = module.detectron_weight_mapping()
    shapes = {mapping[n]: tuple(p.shape) for n, p in module.state_dict().items()}
    expected = {}
    for conv_name, (dim_out, dim_in, *side) in convs.items():
        side = side[0] if side else 3
        expected |= {f"{conv_name}_w": (dim_out, dim_in, side, side), f"{conv_name}_b": (dim_out,)}
    assert shapes == expected
    still = {n.split(".")[0] for n, p in module.named_parameters() if not p.requires_grad}
    assert still == frozen


@pytest.mark.parametrize(
    ("name", "side", "dims"), [("VGG16", 7, (4096, 4096)), ("VGG_CNN_M_1024", 6, (4096, 1024))]
)
def test_heads_pool_to_their_own_grid_whatever_the_resolution_says(name, side, dims, cfg):
    from modeling.model_builder import get_func

    cfg.FAST_RCNN.ROI_XFORM_RESOLUTION = 14
    asked = {}

    def pool(x, rpn_ret, **options):
        asked.update(options)
        return x

    with torch.device("meta"):
        head = get_func(f"{name}.{name}_roi_fc_head")(512, pool, 1 / 16)
        out = head(torch.zeros(3, 512, side, side), {})
    assert asked["resolution"] == side and out.shape == (3, head.dim_out) == (3, dims[1])
    mapping, _ = head.detectron_weight_mapping()
    shapes = {mapping[n]: tuple(p.shape) for n, p in head.state_dict().items()}
    assert shapes == {
        "fc6_w": (dims[0], 512 * side * side),
        "fc6_b": (dims[0],),
        "fc7_w": (dims[1], dims[0]),
        "fc7_b": (dims[1],),
    }


def test_the_head_is_two_rectified_layers_without_dropout(cfg):
    from modeling import VGG16

    class SmallHead(VGG16.VGG_fc_head):
        resolution, fc_dims = 2, (6, 5)

    head = SmallHead(3, lambda x, rpn_ret, **options: x, 1 / 16).train()
    x = torch.randn(4, 3, 2, 2)
    hidden = (x.reshape(4, 12) @ head.fc6.weight.T + head.fc6.bias).clamp(min=0)
    expected = (hidden @ head.fc7.weight.T + head.fc7.bias).clamp(min=0)
    torch.testing.assert_close(head(x, {}), expected)
