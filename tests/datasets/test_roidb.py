"""The training roidb: golden values, flips, filtering with reasons, ranking, the cache."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

import datasets.json_dataset
from core.errors import UserError
from datasets.dataset_catalog import resolve_dataset
from datasets.json_dataset import JsonDataset
from datasets.roidb import (
    combined_roidb_for_training,
    extend_with_flipped_entries,
    rank_for_training,
)
from datasets.roidb_cache import cache_path, cached_gt_roidb
from utils.packed_roidb import PackedRoidb
from utils.segms import rle_to_mask

PER_IMAGE = {"image_id": "id", "width": "width", "height": "height", "flipped": "flipped"}
PER_OBJECT = (
    "boxes",
    "gt_classes",
    "seg_areas",
    "is_crowd",
    "box_to_gt_ind_map",
    "max_overlaps",
    "max_classes",
)


def assert_same_as_golden(roidb, golden):
    for key, name in PER_IMAGE.items():
        np.testing.assert_array_equal([e[name] for e in roidb], golden[key], err_msg=key)
    visible = [e["has_visible_keypoints"] for e in roidb]
    np.testing.assert_array_equal(visible, golden["has_visible_keypoints"])
    counts = [0] + [len(e["boxes"]) for e in roidb]
    np.testing.assert_array_equal(np.cumsum(counts), golden["offsets"])
    keys = PER_OBJECT + (("gt_keypoints",) if "gt_keypoints" in golden else ())
    for key in keys:
        values = np.concatenate([e[key] for e in roidb])
        np.testing.assert_array_equal(values, golden[key], err_msg=key)
        assert values.dtype == golden[key].dtype, key
    overlaps = np.concatenate([e["gt_overlaps"].toarray() for e in roidb])
    np.testing.assert_array_equal(overlaps, golden["gt_overlaps"])


@pytest.mark.parametrize("name", ["coco_2017_train", "keypoints_coco_2017_train"])
def test_golden_roidb(cfg, golden_data_dir, shared, name):
    cfg.MODEL.KEYPOINTS_ON = name.startswith("keypoints")
    golden = shared / "golden/data"
    dataset = JsonDataset(name)
    roidb = dataset.get_roidb(gt=True, crowd_filter_thresh=0.7)
    extend_with_flipped_entries(roidb, dataset.keypoints)
    assert_same_as_golden(roidb, np.load(golden / f"roidb_{name}.npz"))

    ranking = np.load(golden / f"ranking_{name}.npz")
    expected = np.load(golden / f"roidb_training_{name}.npz")
    for _ in ("made", "from the cache"):
        roidb, ratio_list, ratio_index = combined_roidb_for_training((name,), ())
        assert_same_as_golden(roidb, expected)
        np.testing.assert_array_equal(ratio_list, ranking["ratio_list"])
        # Which of equal ratios comes first is up to the sort.
        np.testing.assert_array_equal(np.sort(ratio_index), np.sort(ranking["ratio_index"]))
        ratios = np.array([e["width"] / e["height"] for e in roidb])
        np.testing.assert_array_equal(ratios[ratio_index], ratio_list)
        assert not any(e["need_crop"] for e in roidb)


def test_golden_ranking_with_aspect_cropping(cfg, golden_data_dir, shared):
    cfg.TRAIN.ASPECT_CROPPING, cfg.TRAIN.ASPECT_HI, cfg.TRAIN.ASPECT_LO = True, 1.4, 0.8
    golden = np.load(shared / "golden/data/aspect_cropping.npz")
    roidb, ratio_list, _ = combined_roidb_for_training("coco_2017_train")
    np.testing.assert_array_equal(ratio_list, golden["ratio_list"])
    np.testing.assert_array_equal([e["need_crop"] for e in roidb], golden["need_crop"])


def test_flipping_twice_gives_the_original(tiny_dataset):
    roidb = JsonDataset("tiny").get_roidb(gt=True)
    extend_with_flipped_entries(roidb)
    flipped = roidb[4:]
    assert [e["id"] for e in flipped] == [1, 2, 3, 4] and all(e["flipped"] for e in flipped)
    assert flipped[0]["boxes"][0].tolist() == [60, 20, 89, 59]  # 100 wide: x' = 99 - x
    assert flipped[1]["segms"][0][1].tolist() == [29, 60, 14, 60, 14, 80, 29, 80]
    np.testing.assert_array_equal(
        rle_to_mask(flipped[0]["segms"][1]), rle_to_mask(roidb[0]["segms"][1])[:, ::-1]
    )
    extend_with_flipped_entries(flipped)
    for entry, twice in zip(roidb[:4], flipped[4:], strict=True):
        np.testing.assert_array_equal(entry["boxes"], twice["boxes"])
    np.testing.assert_array_equal(roidb[1]["segms"][0], flipped[5]["segms"][0])


def test_dropped_images_are_counted_by_reason(tiny_dataset, caplog):
    with caplog.at_level("INFO"):
        roidb, _, _ = combined_roidb_for_training(tiny_dataset.train_names)
    assert [(e["id"], e["flipped"]) for e in roidb] == [
        (1, False),
        (2, False),
        (1, True),
        (2, True),
    ]
    assert "Dropped 4 of 8 images: 2 with crowd regions only, 2 without objects" in caplog.text


def test_without_flips(cfg, tiny_dataset):
    cfg.TRAIN.USE_FLIPPED = False
    roidb, _, _ = combined_roidb_for_training(tiny_dataset.train_names)
    assert [e["id"] for e in roidb] == [1, 2]


def test_images_without_objects_may_be_kept(cfg, tiny_dataset):
    cfg.TRAIN.KEEP_IMAGES_WITHOUT_OBJECTS = True
    roidb, _, _ = combined_roidb_for_training(tiny_dataset.train_names)
    assert [e["id"] for e in roidb] == [1, 2, 3, 4] * 2


def test_keypoint_models_need_a_visible_keypoint(cfg, tiny_files, tiny_dataset, caplog):
    def add_keypoints(data):
        data["categories"][0]["keypoints"] = ["nose", "left_paw", "right_paw"]
        data["annotations"][0]["keypoints"] = [10, 11, 2, 12, 13, 1, 0, 0, 0]

    tiny_files.edit(add_keypoints)
    cfg.MODEL.KEYPOINTS_ON = True
    with caplog.at_level("INFO"):
        roidb, _, _ = combined_roidb_for_training(tiny_dataset.train_names)
    assert [e["id"] for e in roidb] == [1, 1]
    assert "2 without a visible keypoint" in caplog.text
    assert roidb[0]["gt_keypoints"][0].tolist() == [[10, 12, 0], [11, 13, 0], [2, 1, 0]]
    assert roidb[1]["gt_keypoints"][0].tolist() == [[89, 0, 87], [11, 0, 13], [2, 0, 1]]


def test_no_image_left(tiny_files, tiny_dataset):
    tiny_files.edit(lambda data: data.update(annotations=[]))
    with pytest.raises(UserError, match="no image of tiny has an object"):
        combined_roidb_for_training(tiny_dataset.train_names)


def test_mask_models_need_a_mask(cfg, tiny_files, tiny_dataset):
    cfg.MODEL.MASK_ON = True
    assert combined_roidb_for_training(tiny_dataset.train_names)[0]
    tiny_files.edit(lambda d: [a.update(segmentation=[]) for a in d["annotations"]])
    with pytest.raises(UserError, match="no object of tiny has a mask .* MODEL.MASK_ON False"):
        combined_roidb_for_training(tiny_dataset.train_names)
    cfg.MODEL.MASK_ON = False
    assert combined_roidb_for_training(tiny_dataset.train_names)[0]


def test_no_data_set():
    with pytest.raises(UserError, match="no training data set"):
        combined_roidb_for_training(())


def test_wrong_number_of_classes(cfg, tiny_dataset):
    cfg.MODEL.NUM_CLASSES = 81
    with pytest.raises(UserError, match=r"tiny has 3 classes .* MODEL.NUM_CLASSES is 81"):
        combined_roidb_for_training(tiny_dataset.train_names)


def test_several_data_sets_follow_each_other(tiny_dataset):
    roidb, ratio_list, ratio_index = combined_roidb_for_training(("tiny", "tiny"))
    assert [e["id"] for e in roidb] == [1, 2, 1, 2, 1, 2, 1, 2]
    assert ratio_list.tolist() == [0.5] * 4 + [1.25] * 4
    assert ratio_index.tolist() == [1, 3, 5, 7, 0, 2, 4, 6]


def test_ranking_clips_ratios_only_when_cropping(cfg):
    def entries():
        return [{"width": w, "height": 100} for w in (300, 30, 150)]

    roidb = entries()
    ratio_list, ratio_index = rank_for_training(roidb)
    assert ratio_list.tolist() == [0.3, 1.5, 3.0] and ratio_index.tolist() == [1, 2, 0]
    cfg.TRAIN.ASPECT_CROPPING = True  # to [0.5, 2]
    ratio_list, _ = rank_for_training(roidb)
    assert ratio_list.tolist() == [0.5, 1.5, 2.0]
    assert [e["need_crop"] for e in roidb] == [True, True, False]


# The cache


def assert_same_entries(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key == "gt_overlaps":
                np.testing.assert_array_equal(a[key].toarray(), b[key].toarray())
            elif key == "segms":
                for s, t in zip(a[key], b[key], strict=True):
                    if isinstance(s, dict):
                        assert s == t
                    else:
                        assert [p.tolist() for p in s] == [p.tolist() for p in t]
            else:
                np.testing.assert_array_equal(a[key], b[key], err_msg=key)
                assert np.asarray(a[key]).dtype == np.asarray(b[key]).dtype, key


@pytest.fixture
def reads(monkeypatch):
    """How often annotations were made into a roidb."""
    count = []
    original = datasets.json_dataset.JsonDataset.get_roidb

    def counted(self, *args, **kwargs):
        count.append(self.name)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(datasets.json_dataset.JsonDataset, "get_roidb", counted)
    return count


def test_the_cache_gives_back_what_was_made(tiny_dataset, reads):
    made = cached_gt_roidb(JsonDataset("tiny"))
    again = cached_gt_roidb(JsonDataset("tiny"))
    assert reads == ["tiny"]
    assert_same_entries(made, again)


@pytest.mark.parametrize("name", ["coco_2017_train", "keypoints_coco_2017_train"])
def test_the_cache_gives_back_coco(golden_data_dir, name):
    made = cached_gt_roidb(JsonDataset(name))
    assert_same_entries(made, cached_gt_roidb(JsonDataset(name)))


def test_changed_annotations_are_read_again(tiny_files, tiny_dataset, reads):
    cached_gt_roidb(JsonDataset("tiny"))
    stat = tiny_files.annotations.stat()  # size and modification time stay as they were
    tiny_files.edit(lambda data: data["annotations"][0].update(bbox=[10, 20, 30, 41]))
    os.utime(tiny_files.annotations, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = cached_gt_roidb(JsonDataset("tiny"))
    assert len(reads) == 2
    assert changed[0]["boxes"][0].tolist() == [10, 20, 39, 60]


def test_a_config_key_that_matters_makes_another_cache(cfg, tiny_dataset):
    assert len(cached_gt_roidb(JsonDataset("tiny"))[0]["boxes"]) == 3
    cfg.TRAIN.GT_MIN_AREA = 400
    assert len(cached_gt_roidb(JsonDataset("tiny"))[0]["boxes"]) == 2


def test_other_images_make_another_cache(tiny_files, tiny_dataset):
    before = cache_path(JsonDataset("tiny"))
    moved = tiny_files.images.rename(tiny_files.images.with_name("moved"))
    resolve_dataset(f"{tiny_files.annotations}:{moved}")
    assert cache_path(JsonDataset("tiny")) != before


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "flipped bytes", "pickle"])
def test_a_damaged_cache_is_made_anew(tiny_dataset, reads, caplog, damage):
    dataset = JsonDataset("tiny")
    made = cached_gt_roidb(dataset)
    path = cache_path(dataset)
    content = path.read_bytes()
    broken = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "text": b"no npz",
        "flipped bytes": content[:200] + bytes(255 - b for b in content[200:400]) + content[400:],
        "pickle": pickle.dumps({"boxes": 1}),
    }
    path.write_bytes(broken[damage])
    assert_same_entries(made, cached_gt_roidb(JsonDataset("tiny")))
    assert len(reads) == 2 and "is damaged" in caplog.text
    assert_same_entries(made, cached_gt_roidb(JsonDataset("tiny")))
    assert len(reads) == 2


def test_no_temporary_files_stay_behind(tiny_dataset):
    path = cache_path(JsonDataset("tiny"))
    cached_gt_roidb(JsonDataset("tiny"))
    assert list(path.parent.iterdir()) == [path]


def test_findings_are_logged_from_the_cache_too(tiny_files, tiny_dataset, caplog):
    tiny_files.edit(lambda data: data["annotations"][0].update(ignore=1))
    for _ in range(2):
        caplog.clear()
        with caplog.at_level("INFO"):
            cached_gt_roidb(JsonDataset("tiny"))
        assert "tiny: 1 objects dropped as marked 'ignore'" in caplog.text


def test_a_missing_image_is_found_with_a_cache_too(tiny_files, tiny_dataset):
    cached_gt_roidb(JsonDataset("tiny"))
    (tiny_files.images / "3.png").unlink()
    with pytest.raises(UserError, match=r"3\.png, listed in"):
        cached_gt_roidb(JsonDataset("tiny"))


def test_debug_uses_no_cache(cfg, tiny_dataset):
    cfg.DEBUG = True
    dataset = JsonDataset("tiny")
    cached_gt_roidb(dataset)
    assert not cache_path(dataset).parent.exists()


def test_a_folder_that_cannot_be_written_is_no_obstacle(cfg, tiny_dataset, tmp_path, caplog):
    cfg.DATA_DIR = str(tmp_path / "a_file" / "data")
    (tmp_path / "a_file").touch()
    assert len(cached_gt_roidb(JsonDataset("tiny"))) == 4
    assert "Cannot write the roidb cache" in caplog.text


def test_packing_an_empty_roidb():
    assert len(PackedRoidb.pack([])) == 0
