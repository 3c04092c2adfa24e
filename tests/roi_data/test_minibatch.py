"""Mini-batches: draws, packing, aspect cropping, and pixels that agree with OpenCV's."""

from __future__ import annotations

import hashlib
import json

import cv2
import numpy as np
import pytest
import torch

import utils.segms as segm_utils
from core.errors import UserError
from datasets.roidb import combined_roidb_for_training
from ops import image_batch
from roi_data.minibatch import MinibatchOptions, get_sample, pack_minibatch


def options(**changes) -> MinibatchOptions:
    values = {
        "scales": (256,),
        "max_size": 448,
        "stride": 32,
        "ims_per_batch": 2,
        "masks": True,
        "keypoints": False,
    }
    return MinibatchOptions(**{**values, **changes})


@pytest.fixture
def tiny_roidb(cfg, tiny_dataset):
    """[cat and dog, two-part dog, nothing, crowd], then the same mirrored."""
    cfg.TRAIN.KEEP_IMAGES_WITHOUT_OBJECTS = True
    return combined_roidb_for_training(tiny_dataset.train_names)[0]


@pytest.fixture
def coco_roidb(golden_data_dir):
    return combined_roidb_for_training("coco_2017_train")[0]


def pack(roidb, indices, opts, ratio=1.0, seed=0):
    return pack_minibatch([get_sample(roidb[i], ratio, seed + i, opts) for i in indices], opts)


def opencv_blob(samples, blob_size, means) -> np.ndarray:
    """Flip, subtract, resize, crop, pad, one image at a time: what the device must compute."""
    blob = np.zeros((len(samples), *blob_size, 3), dtype=np.float32)
    for out, sample in zip(blob, samples, strict=True):
        image = sample.image[:, ::-1] if sample.entry["flipped"] else sample.image
        image = (image - np.asarray(means).reshape(1, 1, 3)).astype(np.float32)
        resized = cv2.resize(
            image, None, fx=sample.scale, fy=sample.scale, interpolation=cv2.INTER_LINEAR
        )
        (h, w), (x, y) = sample.out_hw, sample.crop_xy
        out[:h, :w] = resized[y : y + h, x : x + w]
    return blob.transpose(0, 3, 1, 2)


def device_blob(batch, means) -> np.ndarray:
    pixel_means = torch.as_tensor(np.asarray(means), dtype=torch.float64).reshape(3)
    return image_batch(batch["data"], batch["im_meta"], *batch["blob_size"], pixel_means).numpy()


# Images


@pytest.mark.parametrize(
    ("stem", "scales", "max_size"),
    [("S256", (256,), 448), ("S800", (800,), 1333)],
)
def test_golden_minibatches(cfg, coco_roidb, shared, stem, scales, max_size):
    folder = shared / "golden/data"
    name = f"minibatch_e2e_mask_rcnn_R-50-FPN_1x_{stem}"
    golden = np.load(folder / f"{name}.npz")
    described = json.loads((folder / f"{name}.json").read_text())
    opts = options(scales=scales, max_size=max_size)
    for pair, facts in described.items():
        indices = [int(i) for i in pair[1:].split("_")]
        batch = pack(coco_roidb, indices, opts)
        assert [coco_roidb[i]["flipped"] for i in indices] == facts["flipped"]
        assert list(batch["blob_size"]) == facts["data"]["shape"][2:]
        np.testing.assert_array_equal(batch["im_info"].numpy(), golden[f"{pair}.im_info"])
        data = device_blob(batch, cfg.PIXEL_MEANS)
        crop = data[:, :, 32:96, 32:96]
        np.testing.assert_allclose(crop, golden[f"{pair}.data_crop"], atol=1e-3)
        assert np.sqrt((data.astype(np.float64) ** 2).sum()) == pytest.approx(facts["data"]["l2"])


def test_a_scale_is_drawn_for_each_image(coco_roidb):
    opts = options(scales=(256, 320), max_size=544)
    heights = {get_sample(coco_roidb[0], 1.0, seed, opts).out_hw[0] for seed in range(20)}
    assert heights == {256, 320}


def test_the_long_side_limits_the_scale(coco_roidb):
    sample = get_sample(coco_roidb[0], 1.0, 0, options(scales=(500,), max_size=600))  # 640 x 422
    assert sample.out_hw == (396, 600) and sample.scale == 600 / 640


def test_pixels_agree_with_opencv(cfg, coco_roidb, tiny_roidb):
    opts = options()
    for roidb, indices in ((coco_roidb, (0, 85)), (tiny_roidb, (0, 5, 2))):
        samples = [get_sample(roidb[i], 1.0, i, opts) for i in indices]
        batch = pack_minibatch(samples, opts)
        expected = opencv_blob(samples, batch["blob_size"], cfg.PIXEL_MEANS)
        np.testing.assert_allclose(device_blob(batch, cfg.PIXEL_MEANS), expected, atol=1e-3)


def test_images_are_packed_as_in_their_files(tiny_roidb):
    batch = pack(tiny_roidb, (0, 5), options(scales=(40,)))
    for i, row in zip((0, 5), batch["im_meta"].tolist(), strict=True):
        entry = tiny_roidb[i]
        offset, h, w, flip = (int(v) for v in row[:4])
        pixels = batch["data"][offset : offset + h * w * 3].reshape(h, w, 3).numpy()
        np.testing.assert_array_equal(pixels, cv2.imread(entry["image"]))
        assert bool(flip) == entry["flipped"]
    assert batch["data"].dtype == torch.uint8
    assert batch["im_meta"][0].tolist() == [0, 80, 100, 0, 40, 50, 0, 0, 2.0]
    assert batch["im_info"].tolist() == [[40, 50, 0.5], [80, 40, pytest.approx(2 / 3)]]
    assert batch["blob_size"] == (96, 64)
    assert batch["image_ids"] == [1, 2]


def test_without_fpn_there_is_no_stride(tiny_roidb):
    batch = pack(tiny_roidb, (0, 1), options(scales=(40,), stride=1))
    assert batch["blob_size"] == (80, 50)


# Ground truth


def test_ground_truth_is_padded(tiny_roidb):
    batch = pack(tiny_roidb, (0, 2, 5), options())
    assert batch["gt_boxes"].shape == (3, 8, 4) and batch["gt_boxes"].dtype == torch.float32
    assert batch["gt_classes"].dtype == torch.int64 and batch["gt_crowd"].dtype == torch.bool
    assert batch["gt_classes"][0].tolist() == [1, 2, 1, 0, 0, 0, 0, 0]
    assert batch["gt_crowd"][0].tolist() == [False, False, True] + [False] * 5
    assert batch["gt_boxes"][0, :4].tolist() == [
        [10, 20, 39, 59],
        [60, 30, 79, 49],
        [5, 60, 94, 74],
        [0, 0, 0, 0],
    ]
    assert not batch["gt_boxes"][1].any() and not batch["gt_classes"][1].any()
    assert batch["gt_boxes"][2, 0].tolist() == [15, 30, 49, 79]  # mirrored in 60 pixels


def test_slots_grow_in_powers_of_two(coco_roidb):
    batch = pack(coco_roidb, (0, 1), options())  # 33 and 5 objects
    assert batch["gt_boxes"].shape[1] == 64


def object_polygons(batch, image, slot) -> list[list[float]]:
    place = image * batch["gt_boxes"].shape[1] + slot
    begin, end = batch["gt_object_offsets"][place : place + 2].tolist()
    offsets = batch["gt_poly_offsets"].tolist()
    coords = batch["gt_poly_coords"]
    return [coords[offsets[p] : offsets[p + 1]].reshape(-1).tolist() for p in range(begin, end)]


def with_proposals(entry, boxes):
    return dict(entry, proposals=np.array(boxes, dtype=np.float32).reshape(-1, 4))


def test_proposals_are_padded_to_a_power_of_two(tiny_roidb):
    rows = [[i, i, i + 20, i + 30] for i in range(11)]
    roidb = [with_proposals(tiny_roidb[0], rows), with_proposals(tiny_roidb[1], [])]
    batch = pack(roidb, [0, 1], options())
    assert batch["proposals"].shape == (2, 16, 4)
    assert batch["proposals_valid"].sum(dim=1).tolist() == [11, 0]
    # as in the file: in original-image pixels
    assert batch["proposals"][0][batch["proposals_valid"][0]].tolist() == rows
    assert "proposals" not in pack(tiny_roidb, [0, 1], options())


def test_proposals_move_with_the_crop(tiny_roidb):
    entry = with_proposals(
        wide_entry(tiny_roidb), [[0, 5, 9, 40], [40, 5, 49, 40], [80, 5, 89, 40]]
    )
    opts = options(scales=(60,), max_size=600)
    for seed in range(6):
        cropped = get_sample(entry, 0.8, seed, opts).entry
        np.testing.assert_array_equal(cropped["proposals"], cropped["boxes"])
        assert 1 <= len(cropped["proposals"]) < 3


def test_polygons_are_packed_by_object(tiny_roidb):
    batch = pack(tiny_roidb, (0, 1, 2), options())
    assert len(batch["gt_object_offsets"]) == 3 * 8 + 1
    assert object_polygons(batch, 0, 0) == [[10, 20, 40, 20, 40, 60, 10, 60]]
    assert object_polygons(batch, 0, 1) == []  # an RLE
    assert object_polygons(batch, 0, 2) == []  # a crowd
    assert [len(p) for p in object_polygons(batch, 1, 0)] == [8, 8]
    assert batch["gt_poly_boxes"][1, 0].tolist() == [10, 30, 45, 80]
    assert not batch["gt_poly_boxes"][0, 2].any()
    assert batch["gt_has_mask"].nonzero().tolist() == [[0, 0], [0, 1], [1, 0]]
    assert batch["gt_object_offsets"][-1] + 1 == len(batch["gt_poly_offsets"])
    assert batch["gt_poly_offsets"][-1] == len(batch["gt_poly_coords"])


def test_rle_objects_come_as_bitmaps(tiny_roidb):
    batch = pack(tiny_roidb, (1, 0, 4), options())  # image 1 as it is and mirrored
    assert batch["gt_bitmasks"].shape == (2, 80, 100)
    assert batch["gt_bitmask_index"][1, 1] == 0 and batch["gt_bitmask_index"][2, 1] == 1
    assert (batch["gt_bitmask_index"] >= 0).sum() == 2
    assert batch["gt_bitmasks"].sum(dim=(1, 2)).tolist() == [300, 300]
    np.testing.assert_array_equal(batch["gt_bitmasks"][0], batch["gt_bitmasks"][1].flip(1))
    assert batch["gt_poly_boxes"][1, 1].tolist() == [60, 30, 79, 49]


def test_an_object_without_a_mask(tiny_roidb):
    entry = dict(tiny_roidb[0], segms=[[], *tiny_roidb[0]["segms"][1:]])
    batch = pack([entry], (0,), options())
    assert batch["gt_has_mask"][0].tolist()[:3] == [False, True, False]
    assert batch["gt_classes"][0, 0] == 1


def test_without_masks_there_are_none(tiny_roidb):
    batch = pack(tiny_roidb, (0,), options(masks=False))
    assert not [key for key in batch if "poly" in key or "mask" in key]
    batch = pack(tiny_roidb, (1, 2), options())
    assert batch["gt_bitmasks"].shape == (0, 1, 1)


def test_images_without_objects_only(tiny_roidb):
    batch = pack(tiny_roidb, (2, 2), options())
    assert batch["gt_poly_coords"].shape == (0, 2)
    assert batch["gt_poly_offsets"].tolist() == [0]
    assert not batch["gt_object_offsets"].any() and not batch["gt_has_mask"].any()


def test_keypoints(cfg, golden_data_dir):
    cfg.MODEL.KEYPOINTS_ON = True
    roidb = combined_roidb_for_training("keypoints_coco_2017_train")[0]
    batch = pack(roidb, (0, 1), options(keypoints=True))
    assert batch["gt_keypoints"].shape == (2, 8, 17, 3)
    x, y, v = roidb[0]["gt_keypoints"][1]
    np.testing.assert_array_equal(batch["gt_keypoints"][0, 1], np.stack((x, y, v), axis=1))


def test_keypoints_of_a_data_set_without_them(tiny_roidb):
    with pytest.raises(UserError, match=r"1\.png is of a data set without keypoints"):
        pack(tiny_roidb, (0,), options(keypoints=True))


def test_a_wrong_size_names_the_image(tiny_roidb):
    with pytest.raises(UserError, match=r"1\.png is 100 x 80 pixels"):
        get_sample(dict(tiny_roidb[0], height=81), 1.0, 0, options())


# Aspect cropping


@pytest.fixture
def crop_roidb(cfg, golden_data_dir):
    cfg.TRAIN.ASPECT_CROPPING, cfg.TRAIN.ASPECT_HI, cfg.TRAIN.ASPECT_LO = True, 1.4, 0.8
    return combined_roidb_for_training("coco_2017_train")[0]


def test_golden_crop_sizes(crop_roidb, shared):
    cases = json.loads((shared / "golden/data/aspect_cropping.json").read_text())
    compared = 0
    for case in cases:
        if "im_info" not in case:  # the original raised an exception
            continue
        max_size = {256: 448, 800: 1333}[case["scale"]]
        opts = options(scales=(case["scale"],), max_size=max_size)
        entry = crop_roidb[case["idx"]]
        before = entry["boxes"].copy()
        np.testing.assert_allclose(before, case["boxes_before"])
        batch = pack_minibatch([get_sample(entry, case["ratio"], 3, opts)], opts)
        np.testing.assert_array_equal(batch["im_info"][0].tolist(), case["im_info"])
        np.testing.assert_array_equal(entry["boxes"], before)  # the roidb stays as it was
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("ratio", [0.8, 1.4])
def test_a_crop_shows_the_same_objects_as_the_image(cfg, crop_roidb, ratio):
    """Pixels and masks of the crop are those of the whole image, cut at the same place."""
    opts = options()
    wrong = [
        e["width"] / e["height"] < 0.8 if ratio < 1 else e["width"] / e["height"] > 1.4
        for e in crop_roidb
    ]
    for index in np.flatnonzero(wrong)[::9]:
        entry = crop_roidb[index]
        assert entry["need_crop"]
        sample = get_sample(entry, ratio, int(index), opts)
        whole = get_sample(dict(entry, need_crop=False), ratio, int(index), opts)
        (x, y), (h, w) = sample.crop_xy, sample.out_hw
        # Pixels
        batch = pack_minibatch([sample], opts)
        expected = opencv_blob([whole], whole.out_hw, cfg.PIXEL_MEANS)[0, :, y : y + h, x : x + w]
        np.testing.assert_allclose(
            device_blob(batch, cfg.PIXEL_MEANS)[0, :, :h, :w], expected, atol=1e-3
        )
        # Boxes, in the frame of the crop
        assert len(sample.entry["boxes"]) >= 1
        offset = np.array([x, y, x, y]) / sample.scale
        size = np.array([w, h]) / sample.scale
        moved = entry["boxes"] - offset
        inside = (moved[:, 2] > 0) & (moved[:, 3] > 0) & (moved[:, :2] < size - 1).all(axis=1)
        np.testing.assert_array_equal(sample.entry["gt_classes"], entry["gt_classes"][inside])
        limits = np.tile(size - 1, 2)
        np.testing.assert_allclose(
            sample.entry["boxes"], np.clip(moved[inside], 0, limits), atol=1e-3
        )
        # Masks, as the network would see them
        canvas = whole.out_hw
        for segm, original in zip(
            sample.entry["segms"], np.array(entry["segms"], dtype=object)[inside], strict=True
        ):
            if isinstance(original, dict):
                continue
            full = segm_utils.polys_to_mask([p * sample.scale for p in original], *canvas)
            cut = segm_utils.polys_to_mask([p * sample.scale for p in segm], h, w)
            expected = full[y : y + h, x : x + w]
            assert (cut != expected).sum() <= max(6, 0.03 * expected.sum())


def wide_entry(tiny_roidb, **changes):
    """Image 4 (90 x 60) to be cropped, with three objects 10 pixels wide along x."""
    boxes = np.array([[0, 5, 9, 40], [40, 5, 49, 40], [80, 5, 89, 40]], dtype=np.float32)
    masks = np.zeros((3, 60, 90), dtype=np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
        mask[y1 : y2 + 1, x1 : x2 + 1] = 1
    entry = dict(
        tiny_roidb[3],
        need_crop=True,
        boxes=boxes,
        gt_classes=np.array([1, 2, 1], dtype=np.int32),
        is_crowd=np.zeros(3, dtype=bool),
        segms=[segm_utils.mask_to_rle(mask) for mask in masks],
        gt_keypoints=np.array(
            [[[5, 9], [20, 20], [2, 2]], [[45, 2], [20, 3], [1, 0]], [[85, 80], [20, 20], [2, 2]]],
            dtype=np.int32,
        ),
    )
    return {**entry, **changes}


def test_everything_moves_with_the_crop(tiny_roidb):
    opts = options(scales=(60,), max_size=600, keypoints=True)  # scale 1: pixels are pixels
    seen = set()
    for seed in range(12):
        sample = get_sample(wide_entry(tiny_roidb), 0.8, seed, opts)
        x, y = sample.crop_xy
        assert y == 0 and sample.out_hw == (60, 48)
        entry = sample.entry
        seen.update(entry["gt_classes"].tolist())
        assert len(entry["boxes"]) >= 1
        for box, mask, points in zip(
            entry["boxes"], entry["segms"], entry["gt_keypoints"], strict=True
        ):
            np.testing.assert_array_equal(segm_utils.mask_to_bbox(mask), box)
            assert mask.shape == (60, 48)
            for px, py, v in points.T:
                assert v == 0 and px == py == 0 or 0 <= px <= 47
        batch = pack_minibatch([sample], opts)
        assert batch["gt_bitmasks"].shape[1:] == (60, 48)
    assert seen == {1, 2}


def test_a_crop_holds_all_objects_if_it_can(tiny_roidb):
    boxes = np.array([[26, 5, 35, 40], [70, 5, 79, 40], [0, 0, 89, 59]], dtype=np.float32)
    crowd = np.array([False, False, True])
    entry = wide_entry(tiny_roidb, boxes=boxes, is_crowd=crowd)
    opts = options(scales=(60,), max_size=600)
    places = set()
    for seed in range(60):
        sample = get_sample(entry, 1.0, seed, opts)  # 60 of 90 pixels
        x = sample.crop_xy[0]
        expected = [[26 - x, 5, 35 - x, 40], [70 - x, 5, 79 - x, 40], [0, 0, 59, 59]]
        assert sample.entry["boxes"].tolist() == expected
        places.add(x)
    assert places == set(range(20, 27))


def test_an_image_without_objects_is_cropped_anywhere(tiny_roidb):
    nothing = dict(tiny_roidb[2], width=90, height=60, need_crop=True, image=tiny_roidb[3]["image"])
    opts = options(scales=(60,), max_size=600)
    places = {get_sample(nothing, 1.0, seed, opts).crop_xy[0] for seed in range(200)}
    assert min(places) == 0 and max(places) == 30


def test_draws_depend_on_the_seed_alone(crop_roidb):
    opts = options(scales=(200, 256, 320))

    def digest(seed):
        batch = pack_minibatch([get_sample(crop_roidb[0], 1.4, seed, opts)], opts)
        return hashlib.sha256(batch["im_meta"].numpy().tobytes()).hexdigest()

    assert digest(5) == digest(5)
    assert len({digest(seed) for seed in range(12)}) > 3
