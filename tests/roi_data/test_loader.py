"""The training loader: order of images, batches for every GPU, workers, resuming, mistakes."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal

import cv2
import numpy as np
import pytest
import torch

from core.errors import UserError
from datasets.roidb import combined_roidb_for_training
from roi_data.loader import (
    BatchSampler,
    MinibatchSampler,
    RoiDataLoader,
    build_train_loader,
    cal_minibatch_ratio,
    collate_minibatch,
)
from roi_data.loader_workers import BatchReader, TrainLoader
from roi_data.minibatch import MinibatchOptions


def golden_ranking(shared, name="coco_2017_train"):
    ranking = np.load(shared / f"golden/data/ranking_{name}.npz")
    return ranking["ratio_list"], ranking["ratio_index"]


@pytest.mark.parametrize("name", ["coco_2017_train", "keypoints_coco_2017_train"])
def test_golden_orders(cfg, shared, name):
    cases = json.loads((shared / f"golden/data/samplers_{name}.json").read_text())
    ratio_list, ratio_index = golden_ranking(shared, name)
    for case in cases:
        cfg.TRAIN.IMS_PER_BATCH = case["ims_per_batch"]
        cfg.TRAIN.ASPECT_GROUPING = case["aspect_grouping"]
        sampler = MinibatchSampler(ratio_list, ratio_index)
        assert len(BatchSampler(sampler, case["batch_size"], True)) == case["len"]
        rng = np.random.RandomState(3)
        for epoch in ("epoch0", "epoch1"):
            recorded = [tuple(item) for batch in case[epoch] for item in batch]
            ours = sampler.shuffled(rng)[: len(recorded)]
            assert [index for index, _ in ours] == [index for index, _ in recorded]
            if case["aspect_grouping"] or case["ims_per_batch"] == 1:
                # In unsorted groups the original looks at the ends only, not at all ratios.
                assert ours == recorded


@pytest.mark.parametrize("name", ["coco_2017_train", "keypoints_coco_2017_train"])
def test_golden_group_ratios(shared, name):
    golden = np.load(shared / f"golden/data/cal_minibatch_ratio_{name}.npz")
    ratio_list, _ = golden_ranking(shared, name)
    for key in golden.files:
        ratios = cal_minibatch_ratio(ratio_list, int(key.removeprefix("ims")))
        np.testing.assert_array_equal(ratios, golden[key])


def test_ratio_of_a_group():
    ratios = cal_minibatch_ratio(np.array([0.5, 0.7, 0.9, 1.2, 1.3, 1.5, 0.6]), 2)
    assert ratios.tolist() == [0.5, 0.5, 1.0, 1.0, 1.5, 1.5, 0.6]


def test_groups_stay_together_and_leftovers_come_last(cfg):
    cfg.TRAIN.IMS_PER_BATCH = 3
    sampler = MinibatchSampler(np.linspace(0.5, 2, 11), np.arange(100, 111))
    for _ in range(2):
        indices = [index for index, _, _ in sampler]
        assert sorted(indices) == list(range(100, 111))
        assert indices[9:] == [109, 110]
        groups = [tuple(indices[i : i + 3]) for i in range(0, 9, 3)]
        assert set(groups) == {(100, 101, 102), (103, 104, 105), (106, 107, 108)}


def test_every_pass_has_another_order_and_other_seeds(cfg):
    cfg.TRAIN.IMS_PER_BATCH = 1
    sampler = MinibatchSampler(np.linspace(0.5, 2, 50), np.arange(50))
    first, second = list(sampler), list(sampler)
    assert [i for i, _, _ in first] != [i for i, _, _ in second]
    assert len({seed for _, _, seed in first + second}) == 100
    again = MinibatchSampler(np.linspace(0.5, 2, 50), np.arange(50))
    assert list(again) == first
    cfg.RNG_SEED = 4
    assert list(MinibatchSampler(np.linspace(0.5, 2, 50), np.arange(50))) != first


def test_seeking_continues_the_same_sequence(cfg):
    cfg.TRAIN.IMS_PER_BATCH = 2

    def sampler():
        return BatchSampler(MinibatchSampler(np.linspace(0.5, 2, 11), np.arange(11)), 4, True)

    whole = sampler()
    batches = [batch for _ in range(4) for batch in whole]
    assert len(batches) == 4 * len(whole) == 8
    for start in range(8):
        resumed = sampler()
        resumed.seek(start)
        rest = [batch for _ in range(4) for batch in resumed]
        assert rest[: 8 - start] == batches[start:]


@pytest.fixture
def tiny_training(cfg, tiny_dataset):
    cfg.MODEL.NUM_CLASSES, cfg.MODEL.MASK_ON = 3, True
    cfg.TRAIN.SCALES, cfg.TRAIN.MAX_SIZE = (40, 64), 200
    cfg.TRAIN.KEEP_IMAGES_WITHOUT_OBJECTS = True
    return combined_roidb_for_training(tiny_dataset.train_names)


def test_an_endless_sampler_goes_on_with_the_next_pass(cfg):
    def batches(endless):
        ratios = MinibatchSampler(np.linspace(0.5, 2, 11), np.arange(11))
        return BatchSampler(ratios, 4, True, endless=endless)

    passes = batches(False)
    whole = [batch for _ in range(3) for batch in passes]
    assert list(itertools.islice(batches(True), len(whole))) == whole
    resumed = batches(True)
    resumed.seek(3)
    assert list(itertools.islice(resumed, len(whole) - 3)) == whole[3:]


def test_batches_have_a_part_for_every_gpu(cfg, tiny_training):
    cfg.TRAIN.IMS_PER_BATCH, cfg.NUM_GPUS = 2, 2
    (batch, _) = build_train_loader(*tiny_training, batch_size=4, num_workers=0)
    assert all(len(parts) == 2 for parts in batch.values())
    assert [part.shape[0] for part in batch["im_info"]] == [2, 2]
    assert [len(ids) for ids in batch["image_ids"]] == [2, 2]
    for part, (height, width) in enumerate(batch["blob_size"]):
        # Padded to this GPU's own images
        assert (height, width) == tuple(int(v) for v in batch["im_info"][part][:, :2].amax(dim=0))


def test_collation_follows_the_config_by_default(cfg, tiny_training):
    cfg.TRAIN.IMS_PER_BATCH = 3
    data = RoiDataLoader(tiny_training[0], 3)
    assert len(data) == 8
    batch = collate_minibatch([data[(i, 1.0, 7)] for i in range(6)])
    assert [part.shape[0] for part in batch["gt_boxes"]] == [3, 3]


def test_golden_collation(cfg, golden_data_dir, shared):
    golden = json.loads((shared / "golden/data/loader_collate.json").read_text())
    cfg.FPN.FPN_ON, cfg.TRAIN.IMS_PER_BATCH = True, 2
    cfg.TRAIN.SCALES, cfg.TRAIN.MAX_SIZE = (256,), 448
    data = RoiDataLoader(combined_roidb_for_training("coco_2017_train")[0], 81)
    batch = collate_minibatch([data[(i, 1.0, 3)] for i in golden["idxs"]])
    recorded = golden["batch"]
    sizes = [tuple(part["shape"][2:]) for part in recorded["data"]]
    assert batch["blob_size"] == sizes
    for part, expected in zip(batch["im_info"], recorded["im_info"], strict=True):
        assert hashlib.sha256(part.numpy().tobytes()).hexdigest() == expected["sha256"]


def flat(batch):
    for key in sorted(batch):
        for part in batch[key]:
            yield key, part


def assert_same_batches(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for (key, x), (_, y) in zip(flat(a), flat(b), strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, key


def test_batches_do_not_depend_on_the_number_of_workers(tiny_training):
    passes = {}
    for workers in (0, 1, 2):
        loader = build_train_loader(*tiny_training, batch_size=2, num_workers=workers)
        passes[workers] = [batch for _ in range(2) for batch in loader]
        assert len(passes[workers]) == 2 * len(loader) == 8
    assert_same_batches(passes[0], passes[1])
    assert_same_batches(passes[0], passes[2])


def test_a_loader_continues_where_it_is_told(tiny_training):
    loader = build_train_loader(*tiny_training, batch_size=2, num_workers=0)
    whole = [batch for _ in range(2) for batch in loader]
    resumed = build_train_loader(*tiny_training, batch_size=2, num_workers=2)
    resumed.batch_sampler.seek(3)
    assert_same_batches([batch for _ in range(2) for batch in resumed], whole[3:])


def test_abandoning_a_pass_starts_the_next_one(tiny_training):
    loader = build_train_loader(*tiny_training, batch_size=2, num_workers=0)
    whole = [batch for _ in range(2) for batch in loader]
    again = build_train_loader(*tiny_training, batch_size=2, num_workers=0)
    next(iter(again))
    assert_same_batches(list(again), whole[4:])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_one_sentence(tiny_training, tiny_files, workers):
    (tiny_files.images / "2.png").write_bytes(b"no picture")
    loader = build_train_loader(*tiny_training, batch_size=2, num_workers=workers)
    with pytest.raises(UserError) as error:
        list(loader)
    assert str(error.value).startswith(f"image {tiny_files.images / '2.png'} cannot be decoded")
    assert "Traceback" not in str(error.value) and "\n" not in str(error.value)


def test_keypoint_model_on_data_without_keypoints(cfg, tiny_training):
    cfg.MODEL.KEYPOINTS_ON = True
    loader = build_train_loader(*tiny_training, batch_size=2, num_workers=1)
    with pytest.raises(UserError, match="data set without keypoints"):
        list(loader)


def test_too_few_images_for_a_batch(tiny_training):
    with pytest.raises(UserError, match="8 training images do not fill a batch of 9"):
        build_train_loader(*tiny_training, batch_size=9, num_workers=0)


def test_labels_beyond_the_number_of_classes(tiny_training):
    with pytest.raises(UserError, match=r"label 2 but MODEL\.NUM_CLASSES is 2"):
        RoiDataLoader(tiny_training[0], 2)


def test_workers_leave_opencv_single_threaded_and_the_caller_alone(tiny_training):
    before = cv2.getNumThreads()
    list(build_train_loader(*tiny_training, batch_size=4, num_workers=1))
    assert cv2.getNumThreads() == before


def test_loading_coco_with_crops(cfg, golden_data_dir):
    """A whole pass over real images, all of them cropped or grouped as the config says."""
    cfg.MODEL.NUM_CLASSES, cfg.MODEL.MASK_ON, cfg.FPN.FPN_ON = 81, True, True
    cfg.TRAIN.SCALES, cfg.TRAIN.MAX_SIZE = (128,), 224
    cfg.TRAIN.ASPECT_CROPPING, cfg.TRAIN.ASPECT_HI, cfg.TRAIN.ASPECT_LO = True, 1.4, 0.8
    training = combined_roidb_for_training("coco_2017_train")
    images = 0
    for batch in build_train_loader(*training, batch_size=4, num_workers=0):
        for im_info, (height, width), classes, boxes in zip(
            batch["im_info"],
            batch["blob_size"],
            batch["gt_classes"],
            batch["gt_boxes"],
            strict=True,
        ):
            images += len(im_info)
            assert height % 32 == 0 and width % 32 == 0
            ratios = im_info[:, 1] / im_info[:, 0]
            assert (ratios > 0.79).all() and (ratios < 1.42).all()
            assert (classes > 0).any(dim=1).all()
            scaled = boxes * im_info[:, 2, None, None]
            assert (scaled[..., 2] <= im_info[:, 1, None]).all()
            assert (scaled[..., 3] <= im_info[:, 0, None]).all()
    assert images == 160


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_can_be_left_out(cfg, tiny_training, tiny_files, workers, caplog):
    cfg.DATA_LOADER.ON_BAD_IMAGE = "skip"
    (tiny_files.images / "2.png").write_bytes(b"no picture")
    loader = build_train_loader(*tiny_training, batch_size=2, num_workers=workers)
    batches = [batch for _ in range(3) for batch in loader]
    assert [len(batch["image_ids"][0]) for batch in batches] == [2] * 12
    assert {i for batch in batches for i in batch["image_ids"][0]} == {1, 3, 4}
    said = [r.getMessage() for r in caplog.records if "2.png" in r.getMessage()]
    assert len(said) == 1  # for the image and its mirrored copy, in every pass
    assert "cannot be decoded" in said[0] and "another is trained on in its place" in said[0]


def test_what_replaces_a_bad_image_does_not_depend_on_workers(cfg, tiny_training, tiny_files):
    cfg.DATA_LOADER.ON_BAD_IMAGE = "skip"
    (tiny_files.images / "2.png").unlink()
    passes = [
        list(build_train_loader(*tiny_training, batch_size=2, num_workers=workers))
        for workers in (0, 2)
    ]
    assert_same_batches(*passes)


def test_where_no_image_can_be_read_skipping_ends(cfg, tiny_training, tiny_files):
    cfg.DATA_LOADER.ON_BAD_IMAGE = "skip"
    for file in tiny_files.images.iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"does not exist.*others cannot be read either"):
        list(build_train_loader(*tiny_training, batch_size=2, num_workers=0))


class _Deadly(RoiDataLoader):
    def read(self, item, out=None):
        if item[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(item, out)


def test_a_process_that_dies_is_reported_with_its_image(cfg, tiny_training, tiny_files):
    roidb, ratio_list, ratio_index = tiny_training
    options = MinibatchOptions.from_cfg()
    sampler = BatchSampler(MinibatchSampler(ratio_list, ratio_index), 2, True)
    loader = TrainLoader(BatchReader(_Deadly(roidb, 3), options, 1), sampler, 1, False)
    with pytest.raises(UserError) as error:
        list(loader)
    assert f"while reading image {roidb[3]['image']}" in str(error.value)
    assert "a loader process (pid " in str(error.value) and "--nw" in str(error.value)


def test_other_errors_are_left_alone(tiny_training):
    loader = build_train_loader(*tiny_training, batch_size=2, num_workers=0)
    error = RuntimeError("CUDA error")
    assert loader.explained(error) is error


def test_images_are_decoded_into_the_batch(tiny_training):
    data = RoiDataLoader(tiny_training[0], 3)
    reader = BatchReader(data, MinibatchOptions.from_cfg(), 0)
    items = [(0, 1.0, 5), (1, 1.0, 6)]
    batch, notes = reader.__getitems__(items)
    copied = collate_minibatch([data[item] for item in items])
    assert notes == []
    assert_same_batches([batch], [copied])


# Mini-batches with too few keypoints


def people_loader(cfg, more_than: int):
    cfg.MODEL.KEYPOINTS_ON = True  # and no RPN: proposals would come from files
    cfg.MODEL.NUM_CLASSES = 2
    cfg.TRAIN.IMS_PER_BATCH = 1
    cfg.KRCNN.MIN_KEYPOINT_COUNT_FOR_VALID_MINIBATCH = more_than
    ranked = combined_roidb_for_training("keypoints_coco_2017_train")
    return build_train_loader(*ranked, batch_size=2, num_workers=0)


def visible_points(part) -> int:
    return int((part[..., 2] > 0).sum())


def test_minibatches_with_too_few_keypoints_are_redrawn(cfg, golden_data_dir):
    batches = [list(people_loader(cfg, more_than)) for more_than in (0, 20, 20)]
    # without proposals the RoIs are the people themselves
    counts = [[visible_points(p) for b in run for p in b["gt_keypoints"]] for run in batches]
    ids = [[i for b in run for p in b["image_ids"] for i in p] for run in batches]
    assert min(counts[0]) <= 20 < min(counts[1])
    assert len(counts[0]) == len(counts[1])
    assert ids[1] == ids[2]  # what is drawn depends on the seed alone
    kept = [i for i, count in enumerate(counts[0]) if count > 40]
    assert kept and all(ids[0][i] == ids[1][i] for i in kept)


def test_without_enough_keypoints_anywhere_it_is_said(cfg, golden_data_dir):
    with pytest.raises(UserError, match="100 mini-batches in a row have no more than 9999 visible"):
        next(iter(people_loader(cfg, 9999)))
