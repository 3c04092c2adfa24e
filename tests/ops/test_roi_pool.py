"""roi_pool: against the definition, torchvision and golden values."""

import math

import numpy as np
import pytest
import torch
import torchvision
from roi_cases import LAYOUTS, pool_and_differentiate, random_rois

from ops import roi_pool


def half_away(v):
    return math.copysign(math.floor(abs(v) + 0.5), v)


def reference(feature, roi, size, scale):
    """The definition for one RoI, cell by cell."""
    x1, y1, x2, y2 = (half_away(v * scale) for v in roi.tolist()[1:])
    bins = max(y2 - y1 + 1, 1) / size, max(x2 - x1 + 1, 1) / size
    out = torch.zeros(feature.shape[1], size, size)
    for py in range(size):
        for px in range(size):
            rows, columns = (
                range(
                    max(int(start + math.floor(p * b)), 0),
                    min(int(start + math.ceil((p + 1) * b)), extent),
                )
                for start, p, b, extent in zip(
                    (y1, x1), (py, px), bins, feature.shape[2:], strict=True
                )
            )
            if rows and columns:
                cell = feature[int(roi[0]), :, rows.start : rows.stop, columns.start : columns.stop]
                out[:, py, px] = cell.amax(dim=(1, 2))
    return out


def test_is_the_largest_value_of_each_cell():
    feature = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    # a scale and cells without rounding: the reference works in float64
    rois = random_rois(40, extent=150.0)
    rois[0, 3:] = rois[0, 1:3] + 0.5  # smaller than a feature pixel
    rois[1, 3:] = rois[1, 1:3] - 30  # inverted
    out = roi_pool(feature, rois, 4, 1 / 8)
    for row, roi in zip(out, rois, strict=True):
        assert torch.equal(row, reference(feature, roi, 4, 1 / 8))


def test_halves_are_rounded_away_from_zero():
    feature = torch.arange(10.0).view(1, 1, 1, 10) + 10
    for x1, x2, expected in (
        (0.5, 0.5, 11),  # pixel 1; to even would be pixel 0
        (2.5, 2.5, 13),
        (0, 4.5, 15),
        (-0.5, -0.5, 0),  # pixel -1: off the map
    ):
        out = roi_pool(feature, torch.tensor([[0, x1, 0, x2, 0.0]]), 1, 1.0)
        assert out.item() == expected


def test_golden_values(shared):
    golden = np.load(shared / "golden" / "units" / "layers.npz")
    feature, rois = torch.from_numpy(golden["ra_feat"]), torch.from_numpy(golden["ra_rois"])
    out = roi_pool(feature, rois, 7, 1 / 16)
    np.testing.assert_array_equal(out.numpy(), golden["roi_pool_7"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 2, 33])
def test_output_and_gradient_agree_with_torchvision(channels, layout):
    g = torch.Generator().manual_seed(0)
    feature = torch.randn(2, channels, 40, 50, generator=g)
    feature = feature.contiguous(memory_format=LAYOUTS[layout])
    rois, weight = random_rois(60, extent=400.0), torch.randn(60, channels, 7, 7, generator=g)

    def pool(features, rois, levels, scales):
        return roi_pool(features, rois, 7, scales, levels)

    out, (grad,) = pool_and_differentiate(pool, [feature], rois, None, [1 / 8], weight)
    other = feature.detach().clone().requires_grad_()
    expected = torchvision.ops.roi_pool(other, rois, 7, 1 / 8)
    expected.backward(weight)
    assert torch.equal(out, expected.detach())
    torch.testing.assert_close(grad, other.grad, check_stride=False)


def test_the_first_of_equal_values_gets_the_gradient():
    feature = torch.zeros(1, 1, 4, 4, requires_grad=True)
    roi_pool(feature, torch.tensor([[0, 1, 1, 3, 3.0]]), 1, 1.0).backward()
    assert feature.grad[0, 0, 1, 1] == 1 and feature.grad.sum() == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_large_cells_of_many_channels_too(layout):
    g = torch.Generator().manual_seed(0)
    feature = torch.randint(0, 50, (1, 20, 60, 70), generator=g).float()
    feature = feature.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    roi_pool(feature, torch.tensor([[0, 0, 0, 69, 59.0]]), 2, 1.0).sum().backward()
    expected = torch.zeros(feature.shape)
    for rows in (slice(30), slice(30, 60)):
        for columns in (slice(35), slice(35, 70)):
            cell = feature.detach()[0, :, rows, columns].flatten(1)
            first = torch.from_numpy(cell.numpy().argmax(1))  # numpy's is the first
            gradient = torch.zeros_like(cell).scatter_(1, first[:, None], 1)
            expected[0, :, rows, columns] = gradient.view(20, 30, 35)
    assert torch.equal(feature.grad, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 18])
def test_nan_and_infinite_features(channels, layout):
    feature = torch.zeros(1, channels, 1, 6).contiguous(memory_format=LAYOUTS[layout])
    feature[..., 1], feature[..., 2:4], feature[..., 4] = float("nan"), -float("inf"), 1e9
    rois = torch.tensor([[0, 0, 0, 1, 0.0], [0, 2, 0, 3, 0], [0, 0, 0, 5, 0]])
    nan, low, both = roi_pool(feature.requires_grad_(), rois, 1, 1.0).flatten(1)
    assert nan.isnan().all() and both.isnan().all() and (low == -float("inf")).all()
    (nan + both).sum().backward()
    assert (feature.grad[..., 1] == 2).all()  # the NaN is what was taken
