"""What predicts a mask: convolution, fully connected layer, bilinear enlargement."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core.errors import UserError

DIM, CLASSES, SIZE = 5, 4, 8


@pytest.fixture
def outputs(cfg):
    def build(**options):
        from modeling.mask_rcnn_heads import mask_rcnn_outputs

        cfg.MODEL.NUM_CLASSES, cfg.MRCNN.RESOLUTION = CLASSES, SIZE
        for key, value in options.items():
            cfg.MRCNN[key] = value
        torch.manual_seed(0)
        module = mask_rcnn_outputs(DIM)
        for parameter in module.classify.parameters():
            torch.nn.init.normal_(parameter)
        return module

    return build


def bilinear(x, factor):
    """Enlarged by a deconvolution of a triangle of weights, pixel by pixel of the input."""
    kernel = 2 * factor
    triangle = 1 - np.abs(np.arange(kernel) - (kernel - 1) / 2) / factor
    height, width = x.shape
    out = np.zeros((height * factor + factor, width * factor + factor))
    for i in range(height):
        for j in range(width):
            window = out[i * factor : i * factor + kernel, j * factor : j * factor + kernel]
            window += x[i, j] * np.outer(triangle, triangle)
    return out[factor // 2 : -(factor // 2), factor // 2 : -(factor // 2)]


@pytest.mark.parametrize("options", [
    {},
    {"UPSAMPLE_RATIO": 2},
    {"UPSAMPLE_RATIO": 4},
    {"USE_FC_OUTPUT": True},
    {"USE_FC_OUTPUT": True, "UPSAMPLE_RATIO": 2},
])  # fmt: skip
@pytest.mark.parametrize("specific", [True, False])
def test_predictions_are_those_of_the_formula(options, specific, outputs):
    module = outputs(CLS_SPECIFIC_MASK=specific, **options)
    ratio, side = options.get("UPSAMPLE_RATIO", 1), SIZE // options.get("UPSAMPLE_RATIO", 1)
    masks = CLASSES if specific else 1
    x = torch.randn(3, DIM, side, side)
    weight, bias = module.classify.weight.detach(), module.classify.bias.detach()
    if "USE_FC_OUTPUT" in options:
        assert weight.shape == (masks * SIZE**2, DIM * side**2)
        expected = (x.reshape(3, -1) @ weight.T + bias).reshape(3, masks, SIZE, SIZE)
    else:
        assert weight.shape == (masks, DIM, 1, 1)
        expected = torch.einsum("rdhw,cd->rchw", x, weight[:, :, 0, 0]) + bias.view(1, -1, 1, 1)
        if ratio > 1:
            maps = expected.reshape(-1, side, side).double().numpy()
            expected = torch.from_numpy(np.stack([bilinear(m, ratio) for m in maps])).float()
            expected = expected.view(3, masks, SIZE, SIZE)
    torch.testing.assert_close(module(x), expected.sigmoid(), atol=1e-5, rtol=1e-4)
    labels = torch.tensor([2, 0, 3])
    own = expected[torch.arange(3), labels if specific else 0]
    torch.testing.assert_close(module.of_class(x, labels), own, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rois", [40, 0])
def test_the_gradient_of_one_class_an_roi_is_that_of_all_masks(rois, outputs):
    module = outputs().double()
    x = torch.randn(rois, DIM, SIZE, SIZE, dtype=torch.double, requires_grad=True)
    labels = torch.randint(CLASSES, (rois,))
    given = torch.randn(rois, SIZE, SIZE, dtype=torch.double)
    every = F.conv2d(x, module.classify.weight, module.classify.bias)
    inputs = (x, module.classify.weight, module.classify.bias)
    found = torch.autograd.grad(module.of_class(x, labels), inputs, given.float())
    wanted = torch.autograd.grad(every[torch.arange(rois), labels], inputs, given)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_only_the_predictor_has_a_blob_and_is_trained(outputs):
    module = outputs(UPSAMPLE_RATIO=2)
    mapping, _ = module.detectron_weight_mapping()
    assert mapping == {
        "classify.weight": "mask_fcn_logits_w",
        "classify.bias": "mask_fcn_logits_b",
        "upsample.upconv.weight": None,
        "upsample.upconv.bias": None,
    }
    assert set(mapping) == set(module.state_dict())
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {"classify.weight", "classify.bias"}


@pytest.mark.parametrize("fc", [True, False])
def test_a_class_agnostic_predictor_starts_from_a_narrow_gaussian(fc, outputs, cfg):
    from modeling.mask_rcnn_heads import mask_rcnn_outputs

    cfg.MRCNN.CONV_INIT, cfg.MRCNN.USE_FC_OUTPUT = "MSRAFill", fc
    cfg.MRCNN.CLS_SPECIFIC_MASK = False
    weight = mask_rcnn_outputs(400).classify.weight
    assert weight.std().item() == pytest.approx(0.001, rel=0.2)


def test_features_of_another_size_are_named(outputs, cfg):
    module = outputs()
    cfg.MRCNN.ROI_MASK_HEAD = "mask_rcnn_heads.mask_rcnn_fcn_head_v1up"
    message = r"v1up makes maps of 14x14, but MRCNN.RESOLUTION 8 .* needs 8x8"
    for call in (module, lambda x: module.of_class(x, torch.zeros(2, dtype=torch.long))):
        with pytest.raises(UserError, match=message):
            call(torch.zeros(2, DIM, 14, 14))


def test_the_loss_of_a_class_agnostic_mask_is_a_mean_over_its_pixels(outputs):
    from modeling.mask_rcnn_heads import mask_rcnn_loss

    module = outputs(CLS_SPECIFIC_MASK=False)
    x, labels = torch.randn(3, DIM, SIZE, SIZE), torch.tensor([1, 3, 2])
    targets = torch.randint(0, 2, (3, SIZE, SIZE), dtype=torch.uint8)
    valid = torch.tensor([True, False, True])
    loss = mask_rcnn_loss(module.of_class(x, labels), targets, valid, 2.0)
    p = module(x)[valid, 0]
    expected = 2 * F.binary_cross_entropy(p, targets[valid].float())
    torch.testing.assert_close(loss, expected)
