"""roi_crop: against affine_grid and grid_sample."""

import pytest
import torch
import torch.nn.functional as F
from roi_cases import LAYOUTS, random_rois

from ops import roi_crop


def reference(feature, rois, size, scale, max_pool):
    """Each RoI by Detectron.pytorch's affine transformation."""
    fine = 2 * size if max_pool else size
    height, width = feature.shape[2:]
    crops = []
    for roi in rois:
        x1, y1, x2, y2 = (roi[1:].double() * scale).tolist()
        theta = torch.tensor(
            [
                [(x2 - x1) / (width - 1), 0, (x1 + x2 - width + 1) / (width - 1)],
                [0, (y2 - y1) / (height - 1), (y1 + y2 - height + 1) / (height - 1)],
            ],
            dtype=torch.float64,
        )
        grid = F.affine_grid(theta[None], [1, 1, fine, fine], align_corners=True)
        image = feature[int(roi[0])].double()[None]
        crop = F.grid_sample(image, grid, padding_mode="zeros", align_corners=True)
        crops.append(F.max_pool2d(crop, 2, 2) if max_pool else crop)
    return torch.cat(crops)


@pytest.mark.parametrize("max_pool", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_the_affine_grid(layout, max_pool):
    g = torch.Generator().manual_seed(0)
    feature = torch.randn(2, 9, 16, 20, generator=g).contiguous(memory_format=LAYOUTS[layout])
    rois = random_rois(40, extent=150.0)
    rois[0, 3:] = rois[0, 1:3]  # a point
    rois[1, 3] = rois[1, 1] - 30  # mirrored
    rois[2] = torch.tensor([1, 0, 0, 19 * 8, 15 * 8])  # the whole map
    weight = torch.randn(40, 9, 5, 5, generator=g)
    ours, theirs = (feature.detach().clone().requires_grad_() for _ in range(2))
    out = roi_crop(ours, rois, 5, 1 / 8, max_pool=max_pool)
    expected = reference(theirs, rois, 5, 1 / 8, max_pool)
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4, check_stride=False)
    # A point's samples are equal and those off the map too: which one the maximum takes does not
    # matter to the gradient.
    out.backward(weight)
    expected.backward(weight.double())
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-3, rtol=1e-3, check_stride=False)


def test_corners_are_samples_and_a_single_value_is_the_middle():
    feature = torch.arange(20.0).view(1, 1, 4, 5)
    roi = torch.tensor([[0, 2, 2, 8, 6.0]])  # columns 1 to 4, rows 1 to 3
    out = roi_crop(feature, roi, (2, 4), 0.5)
    assert out.tolist() == [[[[6, 7, 8, 9], [16, 17, 18, 19]]]]
    assert roi_crop(feature, roi, 1, 0.5).item() == 12.5
    # with max_pool the largest of 2 x 2 points: the bottom right corner
    assert roi_crop(feature, roi, 1, 0.5, max_pool=True).item() == 19


def test_pixels_outside_the_map_count_as_zeros():
    feature = torch.full((1, 1, 3, 3), 4.0)
    roi = torch.tensor([[0, -1, 1, 3, 1.0]])
    out = roi_crop(feature, roi, (1, 9), 1.0)
    assert out.flatten().tolist() == [0, 2, 4, 4, 4, 4, 4, 2, 0]
