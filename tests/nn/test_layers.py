"""Layers that torch lacks, against torch's own arithmetic and the original's records."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import nn as mynn


def test_affine_is_a_frozen_scale_and_shift():
    layer = mynn.AffineChannel2d(3)
    layer.weight.data, layer.bias.data = torch.tensor([1.0, 2, 3]), torch.tensor([0.0, -1, 5])
    x = torch.randn(2, 3, 4, 5)
    expected = x * torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1) + layer.bias.view(1, 3, 1, 1)
    torch.testing.assert_close(layer(x), expected)
    assert not any(p.requires_grad for p in layer.parameters())


def test_folding_the_affine_changes_neither_output_nor_gradient():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=False)
    norm = mynn.AffineChannel2d(8)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 9, 9, requires_grad=True)
    grads = []
    for out in (norm(conv(x)), mynn.conv_norm(conv, norm, x)):
        grads.append([out, *torch.autograd.grad(out.square().sum(), [conv.weight, x])])
    for plain, folded in zip(*grads, strict=True):
        torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-4)


def test_bilinear_upsampling_agrees_with_the_original(shared):
    golden = np.load(shared / "golden/units/layers.npz")
    layer = mynn.BilinearInterpolation2d(3, 2)
    np.testing.assert_allclose(layer.upconv.weight[1, 1].numpy(), golden["bil_w"], atol=1e-6)
    out = layer(torch.from_numpy(golden["bil_x"]))
    np.testing.assert_allclose(out.numpy(), golden["bil_y"], atol=1e-5)


def test_bilinear_upsampling_is_the_deconvolution_of_its_weights():
    layer = mynn.BilinearInterpolation2d(4, 4)
    x = torch.randn(2, 4, 5, 6)
    full = F.conv_transpose2d(x, layer.upconv.weight, stride=4, padding=2)
    torch.testing.assert_close(layer(x), full)
    with pytest.raises(ValueError, match="even"):
        mynn.BilinearInterpolation2d(4, 3)


def test_fillers_have_caffe2_s_spread():
    torch.manual_seed(0)
    weight = torch.empty(256, 64, 3, 3)
    bound = (3 / (64 * 9)) ** 0.5
    assert mynn.init.XavierFill(weight).abs().max() == pytest.approx(bound, rel=1e-2)
    assert mynn.init.MSRAFill(weight).std() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=1e-2)
    with pytest.raises(ValueError, match="NoSuchFill"):
        mynn.init.conv_fill("NoSuchFill", 0.1)


def test_enlarging_keeps_its_precision_under_autocast():
    layer, x = mynn.BilinearInterpolation2d(2, 2), torch.randn(1, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, layer(x))
