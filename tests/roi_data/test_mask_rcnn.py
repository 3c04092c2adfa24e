"""Mask targets against the original's records and against pycocotools."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util

from roi_data.mask_rcnn import GroundTruthMasks, crop_bitmasks, mask_targets
from roi_data.minibatch import MinibatchOptions, get_sample, pack_minibatch

CASES = ["mask_FPN_b512_pair0", "mask_FPN_b64_pair1", "mask_C4_b512_pair1"]
OPTIONS = MinibatchOptions((256,), 448, 32, 2, masks=True, keypoints=False)
MASK_KEYS = (
    "gt_poly_coords",
    "gt_poly_offsets",
    "gt_object_offsets",
    "gt_poly_boxes",
    "gt_has_mask",
    "gt_bitmasks",
    "gt_bitmask_index",
)


def masks_of(batch: dict) -> GroundTruthMasks:
    return GroundTruthMasks(**{key: batch[key] for key in MASK_KEYS})


@pytest.mark.parametrize("case", CASES)
def test_targets_agree_with_the_original(case, golden_roidb, shared):
    summary = json.loads((shared / "golden/targets/summary.json").read_text())[case]
    golden = np.load(shared / f"golden/targets/{case}.npz")
    entries = [golden_roidb[i] for i in summary["roidb_idx"]]
    assert [e["image"].split("/")[-1] for e in entries] == summary["images"]
    assert [e["flipped"] for e in entries] == summary["flipped"]
    batch = pack_minibatch([get_sample(e, 1.0, 0, OPTIONS) for e in entries], OPTIONS)
    size = 14 if "C4" in case else 28
    recorded = recorded_masks(golden, size)
    checked = 0
    for image in (0, 1):
        rows = np.flatnonzero(golden["mask_rois"][:, 0] == image)
        # The recorded RoIs are in network-input pixels; the pool has them as they were.
        pool = golden[f"im{image}_boxes"]
        scaled = pool * golden["im_scales"][image]
        distance = np.abs(scaled[:, None] - golden["mask_rois"][rows, 1:]).max(axis=2)
        assert distance.min(axis=0).max() < 1e-3
        rois = torch.from_numpy(pool[distance.argmin(axis=0)])
        padded = torch.zeros(2, len(rows), 4)
        padded[image] = rois
        foreground = torch.zeros(2, len(rows), dtype=torch.bool)
        foreground[image] = True
        own = (batch["gt_classes"] > 0) & ~batch["gt_crowd"]
        targets, valid = mask_targets(
            padded, foreground, batch["gt_boxes"], own, masks_of(batch), size
        )
        targets = targets.view(2, len(rows), size, size)[image]
        assert valid.view(2, -1)[image].all()
        np.testing.assert_array_equal(targets.numpy(), recorded[rows])
        checked += len(rows)
    assert checked == len(golden["mask_rois"])


def recorded_masks(golden, size: int) -> np.ndarray:
    """The one class's mask (R, size, size) of each recorded mask RoI."""
    shape = golden["masks_int32.shape"]
    dense = np.full(shape, -1, np.int8)
    zeros = np.unpackbits(golden["masks_int32.zeros_packed"])[: dense.size].astype(bool)
    dense.ravel()[zeros] = 0
    dense.ravel()[golden["masks_int32.ones"]] = 1
    dense = dense.reshape(shape[0], -1, size, size)
    used = (dense >= 0).all(axis=(2, 3))
    assert (used.sum(axis=1) == 1).all()
    return dense[np.arange(len(dense)), used.argmax(axis=1)]


def ground_truth(objects: list, slots: int = 4) -> GroundTruthMasks:
    """Masks of one image: an object is a list of polygons, a bitmask, or None."""
    coords, poly_offsets, object_offsets, bitmasks = [], [0], [0], []
    extents = np.zeros((1, slots, 4), np.float32)
    index = np.full((1, slots), -1)
    for g in range(slots):
        segm = objects[g] if g < len(objects) else None
        if isinstance(segm, list):
            for polygon in segm:
                coords.extend(np.reshape(polygon, (-1, 2)))
                poly_offsets.append(len(coords))
            points = np.concatenate([np.reshape(p, (-1, 2)) for p in segm])
            extents[0, g] = (*points.min(0), *points.max(0))
        elif segm is not None:
            index[0, g] = len(bitmasks)
            bitmasks.append(segm)
            y, x = np.nonzero(segm)
            extents[0, g] = (x.min(), y.min(), x.max(), y.max())
        object_offsets.append(len(poly_offsets) - 1)
    has_mask = (np.diff(object_offsets) > 0) | (index[0] >= 0)
    return GroundTruthMasks(
        gt_poly_coords=torch.tensor(np.array(coords, np.float32).reshape(-1, 2)),
        gt_poly_offsets=torch.tensor(poly_offsets),
        gt_object_offsets=torch.tensor(object_offsets),
        gt_poly_boxes=torch.from_numpy(extents),
        gt_has_mask=torch.from_numpy(has_mask)[None],
        gt_bitmasks=torch.from_numpy(np.stack(bitmasks))
        if bitmasks
        else torch.zeros(0, 1, 1).byte(),
        gt_bitmask_index=torch.from_numpy(index),
    )


def targets_of(objects, boxes, rois, size=28):
    gt_boxes = torch.zeros(1, 4, 4)
    gt_boxes[0, : len(boxes)] = torch.tensor(boxes, dtype=torch.float32)
    own = torch.arange(4)[None] < len(boxes)
    rois = torch.tensor(rois, dtype=torch.float32)[None]
    foreground = torch.ones(1, rois.shape[1], dtype=torch.bool)
    return mask_targets(rois, foreground, gt_boxes, own, ground_truth(objects), size)


def test_a_polygon_is_rasterised_in_the_frame_of_the_roi():
    polygon = [20.0, 20.0, 60.0, 25.0, 50.0, 70.0]
    roi = (15.0, 10.0, 71.0, 80.0)
    targets, valid = targets_of([[polygon]], [(20, 20, 60, 70)], [roi])
    points = np.array(polygon).reshape(-1, 2) - (15, 10)
    points *= (28 / 56, 28 / 70)
    rle = mask_util.merge(mask_util.frPyObjects([points.ravel().tolist()], 28, 28))
    assert valid.all()
    np.testing.assert_array_equal(targets[0].numpy(), mask_util.decode(rle))


def test_an_object_without_a_mask_is_ignored_not_given_its_neighbour_s():
    targets, valid = targets_of(
        [[[0.0, 0, 30, 0, 30, 30]], None],
        [(0, 0, 30, 30), (40, 40, 80, 80)],
        [(0.0, 0, 30, 30), (38.0, 41, 79, 80)],
    )
    assert valid.tolist() == [True, False]
    assert targets[0].any() and not targets[1].any()


def test_an_rle_object_gives_its_crop():
    bitmask = np.zeros((100, 100), np.uint8)
    bitmask[20:60, 30:50] = 1
    targets, valid = targets_of([bitmask], [(30, 20, 49, 59)], [(20.0, 20, 60, 60)], size=20)
    assert valid.all()
    expected = np.zeros((20, 20), np.uint8)
    expected[:, 5:15] = 1
    np.testing.assert_array_equal(targets[0].numpy(), expected)


def test_rle_objects_of_several_images_with_the_first_of_their_rois():
    bitmask = np.zeros((100, 100), np.uint8)
    bitmask[20:60, 30:50] = 1
    one = ground_truth([bitmask])
    masks = GroundTruthMasks(
        gt_poly_coords=one.coords,
        gt_poly_offsets=one.poly_offsets,
        gt_object_offsets=torch.zeros(9, dtype=torch.int64),
        gt_poly_boxes=one.boxes.repeat(2, 1, 1),
        gt_has_mask=one.has_mask.repeat(2, 1),
        gt_bitmasks=torch.cat([one.bitmasks, 1 - one.bitmasks]),
        gt_bitmask_index=torch.cat([one.bitmask_index, 2 * one.bitmask_index + 1]),
    )
    sampled = torch.tensor([20.0, 20, 60, 60]).repeat(2, 5, 1)
    gt_boxes = torch.tensor([30.0, 20, 49, 59]).repeat(2, 4, 1)
    own = (torch.arange(4) < 1).repeat(2, 1)
    foreground = torch.ones(2, 3, dtype=torch.bool)
    targets, valid = mask_targets(sampled[:, :3], foreground, gt_boxes, own, masks, 20)
    assert valid.all()
    expected = np.zeros((20, 20), np.uint8)
    expected[:, 5:15] = 1
    for i, target in enumerate(targets.numpy()):
        np.testing.assert_array_equal(target, expected if i < 3 else 1 - expected)


def test_crops_beyond_the_image_are_empty_there():
    bitmask = torch.ones(1, 10, 10, dtype=torch.uint8)
    crop = crop_bitmasks(bitmask, torch.zeros(1).long(), torch.tensor([[-10.0, 0, 10, 20]]), 4)
    assert crop[0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
