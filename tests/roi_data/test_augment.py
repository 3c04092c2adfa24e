"""Augmentation: pixels, boxes, masks and keypoints stay together."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from pycocotools import mask as mask_util

import utils.blob as blob_utils
import utils.segms as segm_utils
from core.config import merge_cfg_from_list
from core.errors import UserError
from roi_data.augment import AugmentOptions, colour_jitter, colour_matrix, cut_around_object
from roi_data.crop import View
from roi_data.loader import RoiDataLoader, build_train_loader
from roi_data.minibatch import MinibatchOptions, get_sample, pack_minibatch

HEIGHT, WIDTH = 120, 160
# Objects are upright rectangles [x, y, w, h], each in a channel of its own: places can be read off.
RECTANGLES = [(20, 30, 40, 24), (100, 10, 30, 60), (70, 80, 60, 30)]


@pytest.fixture
def entry(tmp_path) -> dict:
    """An image of three objects: two with polygons, one with an RLE; a keypoint at each centre."""
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    boxes, segms, points = [], [], []
    for channel, (x, y, w, h) in enumerate(RECTANGLES):
        image[y : y + h, x : x + w, channel] = 200
        boxes.append([x, y, x + w - 1, y + h - 1])
        corners = [x, y, x + w, y, x + w, y + h, x, y + h]
        segms.append([np.array(corners, dtype=np.float64)])
        points.append([[x + w // 2], [y + h // 2], [2]])
    segms[2] = mask_util.encode(np.asfortranarray(image[..., 2] == 200).astype(np.uint8))
    path = tmp_path / "rectangles.png"
    cv2.imwrite(str(path), image)
    return {
        "id": 1,
        "image": str(path),
        "height": HEIGHT,
        "width": WIDTH,
        "flipped": False,
        "boxes": np.array(boxes, dtype=np.float32),
        "gt_classes": np.array([1, 2, 3], dtype=np.int32),
        "is_crowd": np.zeros(3, dtype=bool),
        "seg_areas": np.ones(3, dtype=np.float32),
        "segms": segms,
        "gt_keypoints": np.array(points, dtype=np.int32),
    }


def options(augment: AugmentOptions) -> MinibatchOptions:
    return MinibatchOptions(
        scales=(240,), max_size=400, stride=1, ims_per_batch=1, masks=True, keypoints=True,
        augment=augment,
    )  # fmt: skip


def prepared(sample, opts) -> np.ndarray:
    """The network's input (3, h, w), means not subtracted."""
    batch = pack_minibatch([sample], opts)
    means = torch.zeros(3, dtype=torch.float64)
    data = blob_utils.images_to_blob(batch["data"], batch["im_meta"], batch["blob_size"], means)
    assert tuple(data.shape[2:]) == sample.out_hw
    return data[0].numpy()


GEOMETRY = {
    "scale": AugmentOptions(scale_jitter=(0.4, 2.0)),
    "crop": AugmentOptions(crop_prob=1.0, crop_min=0.3),
    "both": AugmentOptions(scale_jitter=(0.5, 2.0), crop_prob=1.0, crop_min=0.5),
}


@pytest.mark.parametrize("augment", GEOMETRY.values(), ids=GEOMETRY)
@pytest.mark.parametrize("flipped", [False, True])
def test_objects_stay_where_their_pixels_are(entry, augment, flipped):
    if flipped:
        entry["flipped"] = True
        entry["boxes"][:, 0::2] = WIDTH - 1 - entry["boxes"][:, 2::-2]
        entry["segms"] = segm_utils.flip_segms(entry["segms"], HEIGHT, WIDTH)
        for polygons in entry["segms"][:2]:
            polygons[0][0::2] += 1  # flipped as pixels, drawn as edges
        entry["gt_keypoints"][:, 0] = WIDTH - 1 - entry["gt_keypoints"][:, 0]
    opts = options(augment)
    seen = set()
    for seed in range(30):
        sample = get_sample(entry, 1.0, seed, opts)
        image, ground_truth, scale = prepared(sample, opts), sample.entry, sample.scale
        assert len(ground_truth["boxes"]) >= 1
        for box, label, segm, points in zip(
            ground_truth["boxes"], ground_truth["gt_classes"], ground_truth["segms"],
            ground_truth["gt_keypoints"], strict=True,
        ):  # fmt: skip
            seen.add(label)
            ys, xs = np.nonzero(image[label - 1] > 100)
            if len(xs) < 30:
                continue  # a sliver, blurred into the background
            # Edges in the network's input; resizing blurs one pixel of the original image.
            extent = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            tolerance = 1.5 * max(scale, 1)
            np.testing.assert_allclose((box + [0, 0, 1, 1]) * scale, extent, atol=tolerance)
            if isinstance(segm, list):
                mask_box = segm_utils.polys_to_boxes([segm])[0]
            else:
                mask = segm_utils.rle_to_mask(segm) if segm_utils.is_rle(segm) else segm
                mask_box = segm_utils.mask_to_bbox(mask) + [0, 0, 1, 1]
            np.testing.assert_allclose(mask_box * scale, extent, atol=tolerance + scale)
            x, y, visible = points[:, 0]
            if visible:
                column, row = int((x + 0.5) * scale), int((y + 0.5) * scale)
                assert image[label - 1, row, column] > 198
    assert seen == {1, 2, 3}


def test_sizes_stay_within_their_limits(entry):
    usual = get_sample(entry, 1.0, 0, options(AugmentOptions()))
    height, width = usual.out_hw
    shrunk = enlarged = 0
    for seed in range(40):
        sample = get_sample(entry, 1.0, seed, options(GEOMETRY["scale"]))
        factor = sample.scale / usual.scale
        assert 0.4 <= factor <= 2
        expected = (min(round(height * factor), height), min(round(width * factor), width))
        np.testing.assert_allclose(sample.out_hw, expected, atol=1)
        shrunk, enlarged = shrunk + (factor < 1), enlarged + (factor > 1)
        cropped = get_sample(entry, 1.0, seed, options(GEOMETRY["crop"]))
        assert cropped.scale == usual.scale
        assert 0.29 * height < cropped.out_hw[0] <= height
        assert 0.29 * width < cropped.out_hw[1] <= width
    assert shrunk > 5 and enlarged > 5


def test_some_images_are_cropped(entry):
    opts = options(AugmentOptions(crop_prob=0.4))
    whole = get_sample(entry, 1.0, 0, options(AugmentOptions())).out_hw
    cropped = sum(get_sample(entry, 1.0, seed, opts).out_hw != whole for seed in range(200))
    assert 50 < cropped < 110


def test_what_is_left_of_a_mask_rules_its_box(entry):
    # An L: its box reaches into the right half, of which the mask has only the lowest rows.
    corners = [10, 10, 30, 10, 30, 90, 150, 90, 150, 110, 10, 110]
    entry.update(
        boxes=np.array([[10, 10, 149, 109], [120, 20, 139, 39]], dtype=np.float32),
        segms=[[np.array(corners, dtype=np.float64)], []],
        gt_classes=np.array([1, 2]), is_crowd=np.zeros(2, bool),
        gt_keypoints=np.zeros((2, 3, 1), np.int32),
    )  # fmt: skip
    outcomes = set()
    for seed in range(200):
        view = View(entry, 1.0, (HEIGHT, WIDTH))
        cut_around_object(view, (60, 60), np.random.RandomState(seed))
        x, y = view.crop_xy
        for box, label in zip(view.entry["boxes"], view.entry["gt_classes"], strict=True):
            if label == 2:
                continue  # without a mask: its box is all there is
            if x > 30:
                assert y + 60 > 90 and box[1] == 90 - y  # only the lower bar is seen
                outcomes.add("bar")
        if x > 30 and y + 60 <= 90:
            assert 1 not in view.entry["gt_classes"]
            outcomes.add("gone")
        assert entry["boxes"][0].tolist() == [10, 10, 149, 109]
    assert outcomes == {"bar", "gone"}


def test_an_image_without_objects_can_be_cut(entry):
    for key in ("boxes", "gt_classes", "is_crowd", "segms", "gt_keypoints"):
        entry[key] = entry[key][:0]
    sample = get_sample(entry, 1.0, 3, options(GEOMETRY["both"]))
    assert len(sample.entry["boxes"]) == 0


def test_colours_change_as_torchvision_changes_them():
    image = np.random.default_rng(0).integers(40, 160, (20, 30, 3), dtype=np.uint8)
    rgb = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)
    mean = image.reshape(-1, 3).mean(axis=0)

    def ours(*factors):
        changed = cv2.transform(image, colour_matrix(*factors, 0.0, mean))
        return torch.from_numpy(changed[..., ::-1].copy()).permute(2, 0, 1).int()

    for factor in (0.6, 1.4):
        assert (ours(factor, 1, 1) - tv.adjust_brightness(rgb, factor).int()).abs().max() <= 1
        assert (ours(1, factor, 1) - tv.adjust_contrast(rgb, factor).int()).abs().max() <= 1
        assert (ours(1, 1, factor) - tv.adjust_saturation(rgb, factor).int()).abs().max() <= 1


def test_hue_turns_colours_and_keeps_brightness():
    red = np.array([0.0, 0.0, 200.0, 1.0])
    third = colour_matrix(1, 1, 1, 1 / 3, np.zeros(3)) @ red
    assert third.argmax() != 2
    assert third @ [0.114, 0.587, 0.299] == pytest.approx(200 * 0.299, abs=0.5)
    full = colour_matrix(1, 1, 1, 1.0, np.zeros(3))
    np.testing.assert_allclose(full, np.eye(3, 4), atol=1e-9)
    grey = colour_matrix(1, 1, 1, 0.3, np.zeros(3)) @ [90.0, 90.0, 90.0, 1.0]
    np.testing.assert_allclose(grey, 90, atol=0.5)


def test_colours_are_drawn_from_the_seed_and_only_colours_change(entry):
    opts = options(AugmentOptions(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1))
    plain = get_sample(entry, 1.0, 5, options(AugmentOptions()))
    first, again, other = (get_sample(entry, 1.0, seed, opts) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.image, again.image)
    assert (first.image != other.image).any() and (first.image != plain.image).any()
    np.testing.assert_array_equal(first.entry["boxes"], plain.entry["boxes"])
    image = np.full((4, 4, 3), 250, dtype=np.uint8)
    colour_jitter(image, AugmentOptions(brightness=1.0), np.random.RandomState(1))
    assert len(np.unique(image)) == 1  # cut at 255, not wrapped


def test_batches_with_augmentation_do_not_depend_on_workers(cfg, entry):
    merge_cfg_from_list(
        ["TRAIN.AUGMENT.SCALE_JITTER", "(0.5, 2.0)", "TRAIN.AUGMENT.CROP_PROB", 0.5,
         "TRAIN.AUGMENT.HUE", 0.1, "MODEL.NUM_CLASSES", 4, "MODEL.MASK_ON", True]
    )  # fmt: skip
    cfg.TRAIN.SCALES, cfg.TRAIN.MAX_SIZE = (64, 96), 200
    roidb = [dict(entry, id=i) for i in range(4)]
    ratios = np.full(4, WIDTH / HEIGHT), np.arange(4)
    first, second = (
        [b for _ in range(2) for b in build_train_loader(roidb, *ratios, 2, num_workers=workers)]
        for workers in (0, 2)
    )
    for one, two in zip(first, second, strict=True):
        for key in one:
            for x, y in zip(one[key], two[key], strict=True):
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, key
    # The roidb's own objects are as they were.
    assert RoiDataLoader(roidb, 4)._roidb[0]["boxes"].tolist() == entry["boxes"].tolist()


@pytest.mark.parametrize(
    ("key", "value"),
    [("SCALE_JITTER", "(2.0, 0.5)"), ("CROP_PROB", 1.5), ("CROP_MIN", 0.0), ("HUE", -0.1)],
)
def test_impossible_settings_are_named(cfg, key, value):
    from core.config import assert_and_infer_cfg

    merge_cfg_from_list([f"TRAIN.AUGMENT.{key}", value])
    with pytest.raises(UserError, match=rf"TRAIN\.AUGMENT\.{key} must"):
        assert_and_infer_cfg()
