"""Pasting masks: the original's pixels, whatever the box does at the border of the image."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch

from utils import mask_paste
from utils.mask_paste import masks_to_rles, paste_boxes


def decode(rles: list[dict]) -> np.ndarray:
    """(n, h, w) uint8 planes."""
    return mask_util.decode(rles).transpose(2, 0, 1)


def paste_slowly(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """One mask, resized by cv2 and copied into an empty image: what the original does."""
    padded = np.pad(mask, 1)
    x1, y1, x2, y2 = paste_boxes(torch.from_numpy(box[None]), mask.shape[0])[0].tolist()
    w, h = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
    resized = (cv2.resize(padded, (w, h)) > 0.5).astype(np.uint8)
    image = np.zeros((height, width), np.uint8)
    top, bottom, left, right = max(y1, 0), min(y1 + h, height), max(x1, 0), min(x1 + w, width)
    if bottom > top and right > left:
        image[top:bottom, left:right] = resized[top - y1 : bottom - y1, left - x1 : right - x1]
    return image


def random_instances(n: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Blobby maps (n, 28, 28) and boxes (n, 4) of every size, many of them partly or wholly
    outside."""
    rng = np.random.default_rng(height)
    centre = rng.uniform([-20, -20], [width + 20, height + 20], (n, 2))
    side = np.exp(rng.uniform(-1, np.log(max(height, width)), (n, 2)))
    boxes = np.concatenate([centre - side / 2, centre + side / 2], 1).astype(np.float32)
    maps = cv2.GaussianBlur(rng.random((28, 28, n)).astype(np.float32), (5, 5), 0)
    return np.ascontiguousarray(maps.transpose(2, 0, 1) - 0.5) * 4 + 0.5, boxes


def test_agrees_with_the_original(shared):
    golden = np.load(shared / "golden/units/segms.npz")
    expected_rles = json.loads((shared / "golden/units/segms.json").read_text())["rles"]
    masks, boxes = torch.from_numpy(golden["masks_cls"]), torch.from_numpy(golden["boxes"])

    rles = masks_to_rles(masks, boxes, 300, 400, 0.5)

    expected = np.unpackbits(golden["pasted_packed"], axis=2)[:, :, :400]
    np.testing.assert_array_equal(decode(rles), expected)
    assert rles == expected_rles


@pytest.mark.parametrize("size", [(480, 640), (60, 50), (900, 30), (1, 1)])
def test_agrees_with_cv2_resize(size):
    masks, boxes = random_instances(60, *size)
    rles = masks_to_rles(torch.from_numpy(masks), torch.from_numpy(boxes), *size, 0.5)
    pasted = decode(rles)
    for mask, box, plane, rle in zip(masks, boxes, pasted, rles, strict=True):
        expected = paste_slowly(mask, box, *size)
        # cv2 may fuse a multiplication and an addition: a pixel within a rounding of the threshold
        # may differ.
        assert (plane != expected).sum() <= 1
        if (plane == expected).all():
            encoded = mask_util.encode(np.asfortranarray(expected))
            assert rle == {"size": list(size), "counts": encoded["counts"].decode()}


def test_full_and_empty_masks_are_encoded_as_pycocotools_does():
    whole = torch.tensor([[0.0, 0.0, 39.0, 29.0]]).repeat(2, 1)
    # Expanded by 30/28 the map's border of zeros falls outside; a full map covers every pixel.
    masks = torch.stack([torch.full((28, 28), 1.0), torch.zeros(28, 28)])
    full, empty = masks_to_rles(masks, whole, 30, 40, 0.5)
    for rle, value in ((full, 1), (empty, 0)):
        plane = np.full((30, 40), value, np.uint8, order="F")
        assert rle["counts"] == mask_util.encode(plane)["counts"].decode()


def test_no_instances_give_no_rles():
    assert masks_to_rles(torch.zeros(0, 28, 28), torch.zeros(0, 4), 10, 10, 0.5) == []


def test_chunks_do_not_change_the_result(monkeypatch):
    masks, boxes = map(torch.from_numpy, random_instances(40, 120, 90))
    at_once = masks_to_rles(masks, boxes, 120, 90, 0.5)
    monkeypatch.setattr(mask_paste, "PIXELS_PER_CHUNK", 500)
    assert masks_to_rles(masks, boxes, 120, 90, 0.5) == at_once


@pytest.mark.gpu
def test_the_gpu_pastes_the_same_pixels():
    masks, boxes = map(torch.from_numpy, random_instances(100, 480, 640))
    on_cpu = masks_to_rles(masks, boxes, 480, 640, 0.5)
    on_gpu = masks_to_rles(masks.cuda(), boxes.cuda(), 480, 640, 0.5)
    different = (decode(on_cpu) != decode(on_gpu)).sum(axis=(1, 2))
    # A fused multiply-add may tip a pixel that is within a rounding of the threshold.
    assert different.max() <= 1
