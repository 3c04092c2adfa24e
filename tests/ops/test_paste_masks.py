"""Pasting masks: the original's pixels, whatever the box does at the border of the image."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch

import utils.boxes as box_utils
from ops import masks_to_rles, paste_masks


def decode(rles: list[dict]) -> np.ndarray:
    """(n, h, w) uint8 planes."""
    return mask_util.decode(rles).transpose(2, 0, 1)


def paste_slowly(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """One mask, resized by cv2 and copied into an empty image: what the original does."""
    padded = np.pad(mask, 1)
    scale = (mask.shape[0] + 2.0) / mask.shape[0]
    x1, y1, x2, y2 = box_utils.expand_boxes(box[None], scale)[0].astype(np.int32).tolist()
    w, h = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
    resized = (cv2.resize(padded, (w, h)) > 0.5).astype(np.uint8)
    image = np.zeros((height, width), np.uint8)
    top, bottom, left, right = max(y1, 0), min(y1 + h, height), max(x1, 0), min(x1 + w, width)
    if bottom > top and right > left:
        image[top:bottom, left:right] = resized[top - y1 : bottom - y1, left - x1 : right - x1]
    return image


def random_instances(
    n: int, height: int, width: int, side: int = 28
) -> tuple[np.ndarray, np.ndarray]:
    """Blobby maps (n, side, side) and boxes (n, 4) of every size, many of them partly or wholly
    outside."""
    rng = np.random.default_rng(height)
    centre = rng.uniform([-20, -20], [width + 20, height + 20], (n, 2))
    extent = np.exp(rng.uniform(-1, np.log(max(height, width)), (n, 2)))
    boxes = np.concatenate([centre - extent / 2, centre + extent / 2], 1).astype(np.float32)
    maps = cv2.GaussianBlur(rng.random((side, side, n)).astype(np.float32), (5, 5), 0)
    return np.ascontiguousarray(maps.transpose(2, 0, 1) - 0.5) * 4 + 0.5, boxes


def test_agrees_with_the_original(shared):
    golden = np.load(shared / "golden/units/segms.npz")
    expected_rles = json.loads((shared / "golden/units/segms.json").read_text())["rles"]
    masks, boxes = torch.from_numpy(golden["masks_cls"]), torch.from_numpy(golden["boxes"])

    expected = np.unpackbits(golden["pasted_packed"], axis=2)[:, :, :400]
    np.testing.assert_array_equal(paste_masks(masks, boxes, 300, 400, 0.5).numpy(), expected)
    assert masks_to_rles(masks, boxes, 300, 400, 0.5) == expected_rles


@pytest.mark.parametrize("size", [(480, 640), (60, 50), (900, 30), (1, 1)])
def test_agrees_with_cv2_resize(size):
    masks, boxes = random_instances(60, *size)
    pasted = paste_masks(torch.from_numpy(masks), torch.from_numpy(boxes), *size, 0.5).numpy()
    for mask, box, plane in zip(masks, boxes, pasted, strict=True):
        # cv2 may fuse a multiplication and an addition: a pixel within a rounding of the threshold
        # may differ.
        assert (plane != paste_slowly(mask, box, *size)).sum() <= 1


@pytest.mark.parametrize("size", [(480, 640), (60, 50), (33, 900), (1, 1), (1, 40), (40, 1)])
@pytest.mark.parametrize("side", [1, 14, 28])
def test_rles_are_what_pycocotools_makes_of_the_planes(size, side):
    masks, boxes = map(torch.from_numpy, random_instances(40, *size, 28))
    masks = masks[:, :side, :side]
    planes = paste_masks(masks, boxes, *size, 0.5).numpy()
    for plane, rle in zip(planes, masks_to_rles(masks, boxes, *size, 0.5), strict=True):
        encoded = mask_util.encode(np.asfortranarray(plane))
        assert rle == {"size": list(size), "counts": encoded["counts"].decode()}


def test_full_and_empty_masks_are_encoded_as_pycocotools_does():
    whole = torch.tensor([[0.0, 0.0, 39.0, 29.0]]).repeat(2, 1)
    # Expanded by 30/28 the map's border of zeros falls outside; a full map covers every pixel.
    masks = torch.stack([torch.full((28, 28), 1.0), torch.zeros(28, 28)])
    full, empty = masks_to_rles(masks, whole, 30, 40, 0.5)
    for rle, value in ((full, 1), (empty, 0)):
        plane = np.full((30, 40), value, np.uint8, order="F")
        assert rle["counts"] == mask_util.encode(plane)["counts"].decode()


def test_no_instances_give_no_masks():
    assert masks_to_rles(torch.zeros(0, 28, 28), torch.zeros(0, 4), 10, 10, 0.5) == []
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), 10, 12, 0.5).shape == (0, 10, 12)


STRANGE = torch.tensor(
    [
        [float("nan"), 0, 9, 9],
        [-1e30, -1e30, 1e30, 1e30],
        [float("-inf"), 0, float("inf"), 9],
        [9, 9, 2, 2],  # inverted: one pixel
        [1e9, 1e9, 2e9, 2e9],
    ]
)


def test_strange_boxes_do_no_harm():
    pasted = paste_masks(torch.ones(5, 4, 4), STRANGE, 20, 20, 0.5)
    assert not pasted[[0, 2, 4]].any()
    assert pasted[1].all() and pasted[3].sum() <= 1


def test_other_dtypes_and_views_give_the_same():
    masks, boxes = map(torch.from_numpy, random_instances(20, 50, 60))
    masks = masks.half()
    expected = paste_masks(masks.float(), boxes, 50, 60, 0.5)
    wide = torch.cat([torch.zeros(20, 1), boxes], dim=1)
    assert torch.equal(paste_masks(masks, wide[:, 1:], 50, 60, 0.5), expected)
    turned = masks.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(paste_masks(turned, boxes.double(), 50, 60, 0.5), expected)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"masks must be \(n, M, M\)"):
        paste_masks(torch.zeros(2, 3, 4), torch.zeros(2, 4), 5, 5, 0.5)
    with pytest.raises(ValueError, match=r"boxes must be \(n, 4\) with n = 2"):
        masks_to_rles(torch.zeros(2, 3, 3), torch.zeros(1, 4), 5, 5, 0.5)
    with pytest.raises(TypeError, match="masks must be floating point"):
        masks_to_rles(torch.zeros(2, 3, 3).long(), torch.zeros(2, 4), 5, 5, 0.5)


def test_opcheck():
    masks, boxes = map(torch.from_numpy, random_instances(5, 20, 30))
    args = (masks, boxes, 20, 30, 0.5)
    torch.library.opcheck(torch.ops.detectron.paste_masks.default, args)
    torch.library.opcheck(torch.ops.detectron.encode_masks.default, args)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(480, 640), (64, 50), (33, 900), (1, 1), (900, 30)])
@pytest.mark.parametrize("side", [1, 14, 28])
def test_the_gpu_pastes_the_same_pixels(size, side):
    masks, boxes = map(torch.from_numpy, random_instances(100, *size, 28))
    masks = masks[:, :side, :side]
    pasted = paste_masks(masks.cuda(), boxes.cuda(), *size, 0.5)
    assert torch.equal(pasted.cpu(), paste_masks(masks, boxes, *size, 0.5))
    on_gpu = masks_to_rles(masks.cuda(), boxes.cuda(), *size, 0.5)
    assert on_gpu == masks_to_rles(masks, boxes, *size, 0.5)


@pytest.mark.gpu
def test_the_gpu_with_strange_boxes_nothing_and_opcheck():
    ones = torch.ones(5, 4, 4)
    pasted = paste_masks(ones.cuda(), STRANGE.cuda(), 20, 20, 0.5)
    assert torch.equal(pasted.cpu(), paste_masks(ones, STRANGE, 20, 20, 0.5))
    zeros = masks_to_rles(torch.zeros(5, 4, 4).cuda(), STRANGE.cuda(), 20, 20, 0.5)
    assert zeros == masks_to_rles(torch.zeros(5, 4, 4), STRANGE, 20, 20, 0.5)
    assert masks_to_rles(torch.zeros(0, 4, 4).cuda(), torch.zeros(0, 4).cuda(), 5, 5, 0.5) == []
    args = (ones.cuda(), STRANGE.cuda(), 20, 20, 0.5)
    torch.library.opcheck(torch.ops.detectron.paste_masks.default, args)
