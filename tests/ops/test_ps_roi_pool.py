"""ps_roi_pool: against the definition."""

import math

import pytest
import torch
from roi_cases import LAYOUTS, random_rois

from ops import ps_roi_pool


def half_away(v):
    return math.copysign(math.floor(abs(v) + 0.5), v)


def reference(feature, roi, g, scale):
    """The definition for one RoI, cell by cell; differentiable."""
    x1, y1, x2, y2 = (half_away(v) for v in roi.tolist()[1:])
    starts = y1 * scale, x1 * scale
    ends = (y2 + 1) * scale, (x2 + 1) * scale
    sizes = [max(end - start, 0.1) for start, end in zip(starts, ends, strict=True)]
    out = torch.zeros(feature.shape[1] // g**2, g, g, dtype=feature.dtype)
    for py in range(g):
        for px in range(g):
            rows, columns = (
                slice(
                    min(max(math.floor(p * size / g + start), 0), extent),
                    min(max(math.ceil((p + 1) * size / g + start), 0), extent),
                )
                for start, size, p, extent in zip(
                    starts, sizes, (py, px), feature.shape[2:], strict=True
                )
            )
            cell = feature[int(roi[0]), py * g + px :: g * g, rows, columns]
            if cell.numel() > 0:
                out[:, py, px] = cell.mean(dim=(1, 2))
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_the_mean_of_each_cell_in_its_own_channels(layout):
    # float64: 1/3 of a size is rounded differently in float32
    feature = torch.randn(2, 45, 16, 20, generator=torch.Generator().manual_seed(0)).double()
    feature = feature.contiguous(memory_format=LAYOUTS[layout])
    rois = random_rois(40, extent=150.0).double()
    rois[0, 3:] = rois[0, 1:3]  # small
    rois[1, 3:] = rois[1, 1:3] - 30  # inverted
    ours, theirs = (feature.detach().clone().requires_grad_() for _ in range(2))
    out = ps_roi_pool(ours, rois, 3, 1 / 8)
    assert out.shape == (40, 5, 3, 3)
    expected = torch.stack([reference(theirs, roi, 3, 1 / 8) for roi in rois])
    torch.testing.assert_close(out, expected, check_stride=False)
    weight = torch.randn(40, 5, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    out.backward(weight)
    expected.backward(weight)
    torch.testing.assert_close(ours.grad, theirs.grad, check_stride=False)


def test_halves_are_rounded_away_from_zero_before_scaling():
    feature = torch.arange(10.0).view(1, 1, 1, 10)
    out = ps_roi_pool(feature, torch.tensor([[0, 4.5, 0, 6.5, 1.0]]), 1, 0.5)
    # from 5 / 2 to (7 + 1) / 2: pixels 2 and 3
    assert out.item() == 2.5


def test_channels_that_do_not_fit_the_grid_are_named():
    with pytest.raises(ValueError, match="10 channels cannot be shared by 9 cells"):
        ps_roi_pool(torch.zeros(1, 10, 4, 4), torch.zeros(1, 5), 3, 1.0)
