"""Detections in fixed slots are those of the general path, and the device is never waited for."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import weakref
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch

from core import test_slots
from core.suppression import class_nms_and_limit, class_nms_in_slots
from core.test import detect_batch, queue_batch
from core.test_forward import ImageBatch, plain_view
from golden_weights import fill_from_recipe, golden_cfg
from modeling.model_builder import Generalized_RCNN

JOBS = {"tiny_mask_FPN": "tiny_mask_FPN", "tiny_keypoint_FPN": "e2e_keypoint_rcnn_R-50-FPN_1x"}
SMALL = ["TEST.SCALE", 192, "TEST.MAX_SIZE", 320, "TEST.RPN_POST_NMS_TOP_N", 200]
C4 = ["RESNETS.WIDTH_PER_GROUP", 8, "RESNETS.STEM_OUT_CHANNELS", 16, "TEST.SCALE", 96]
C4 += ["TEST.RPN_POST_NMS_TOP_N", 40, "TEST.DETECTIONS_PER_IM", 7]


@pytest.fixture
def images(shared) -> list[np.ndarray]:
    image = cv2.imread(str(shared / "golden/images/000000000139.jpg"))
    return [image, np.ascontiguousarray(image[::-1])]


def golden_model(job: str, shared) -> Generalized_RCNN:
    options = json.loads((shared / f"golden/tta/{job}.base.json").read_text())["opts"]
    golden_cfg(JOBS[job], shared, [*options, *SMALL])
    model = Generalized_RCNN().eval()
    fill_from_recipe(model, job, shared)
    return model


def in_slots(model, images):
    """Detections by way of the slots; None if they do not suffice."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        return test_slots.queue_in_slots(model, ImageBatch(images, device), lambda: None)()


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one.height, one.width) == (other.height, other.width)
        for name in ("boxes", "scores", "classes"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        np.testing.assert_array_equal(one.rows_on_host(), other.rows_on_host())
        for name in ("masks", "heatmaps"):
            values = getattr(one, name), getattr(other, name)
            assert (values[0] is None) == (values[1] is None)
            if values[0] is not None:  # matrix products of other sizes
                torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("threshold", [0.05, 0.4, 0.9, 1.0])
def test_slots_hold_what_the_general_path_finds(job, threshold, images, shared, cfg):
    """Many detections, few, none."""
    model = golden_model(job, shared)
    cfg.TEST.SCORE_THRESH = threshold
    expected = detect_batch(model, images)
    assert_equal(in_slots(model, images), expected)
    found = sum(len(one.scores) for one in expected)
    assert (found > 0) == (threshold < 1)


def test_too_many_candidates_are_reported_not_cut(images, shared, cfg, monkeypatch):
    model = golden_model("tiny_mask_FPN", shared)
    cfg.TEST.SCORE_THRESH = 0.3
    with torch.inference_mode():
        found = model(*_input(model, images), padded=True)
    per_image = (found["cls_score"][:, 1:] > 0.3).view(2, -1).sum(dim=1)
    most = int(per_image.max())
    monkeypatch.setattr(test_slots, "CANDIDATES", most)
    assert_equal(in_slots(model, images), detect_batch(model, images))
    monkeypatch.setattr(test_slots, "CANDIDATES", most - 1)
    assert in_slots(model, images) is None


def _input(model, images):
    (shown,) = ImageBatch(images, torch.device("cpu")).show([plain_view()])
    return shown.data, shown.im_info


def test_a_single_map_and_a_shared_stage_serve_too(images, shared, cfg):
    golden_cfg("e2e_mask_rcnn_R-50-C4_1x", shared, [*SMALL, *C4])
    torch.manual_seed(0)
    model = Generalized_RCNN().eval()
    torch.nn.init.normal_(model.Box_Outs.cls_score.weight, std=0.1)
    expected = detect_batch(model, images)
    assert [len(one.scores) for one in expected] == [7, 7]
    assert_equal(in_slots(model, images), expected)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limit", [1, 10, 200])
def test_suppression_in_slots_is_that_of_lists(seed, limit):
    g = torch.Generator().manual_seed(seed)
    shape = 3, 150
    corner = torch.rand(*shape, 2, generator=g) * 60
    boxes = torch.cat([corner, corner + 5 + 35 * torch.rand(*shape, 2, generator=g)], dim=-1)
    scores = torch.rand(shape, generator=g)
    if seed % 2:  # ties
        scores = (scores * 12).ceil() / 12
    classes = torch.randint(1, 5, shape, generator=g)
    used = torch.rand(shape, generator=g) < torch.tensor([[0.9], [0.1], [0.0]])
    slot, kept, tied = class_nms_in_slots(boxes, scores, classes, used, nms_thresh=0.4, limit=limit)
    image, where = used.nonzero().unbind(1)
    keep, _, _ = class_nms_and_limit(
        boxes[used], scores[used], classes[used], image, nms_thresh=0.4, limit=limit
    )
    for i in range(3):
        expected = where[keep[image[keep] == i]]
        assert bool(tied[i]) == (len(expected) > limit)
        if not tied[i]:
            assert torch.equal(slot[i][kept[i]], expected)
            assert torch.equal(kept[i], torch.arange(slot.shape[1]) < len(expected))


@pytest.mark.parametrize("most", [1, 3, 8, 100])
def test_first_of_each_row(most):
    wanted = torch.rand(5, 8, generator=torch.Generator().manual_seed(most)) < 0.4
    wanted[1], wanted[3] = False, True
    place, used, found = test_slots.first_of_each_row(wanted, most)
    assert torch.equal(found, wanted.sum(dim=1))
    for i in range(5):
        expected = wanted[i].nonzero()[:, 0][:most] + 8 * i
        assert torch.equal(place[i][used[i]], expected)
    assert place.shape == (5, min(most, 8))


@pytest.mark.parametrize(
    "option",
    ["TEST.SOFT_NMS.ENABLED", "TEST.BBOX_VOTE.ENABLED", "TEST.BBOX_AUG.ENABLED"]
    + ["TEST.MASK_AUG.ENABLED"],
)
def test_the_unusual_is_left_to_the_general_path(option, shared, cfg):
    model = golden_model("tiny_mask_FPN", shared)
    assert test_slots.fits_in_slots(model)
    assert not test_slots.fits_in_slots(torch.nn.Linear(1, 1))
    _, group, _ = option.split(".")
    cfg.TEST[group].ENABLED = True
    assert not test_slots.fits_in_slots(model)


@pytest.fixture
def exact(monkeypatch):
    """TF32 would move scores in the fourth digit, and with them what is kept."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.gpu
@pytest.mark.parametrize("job", JOBS)
def test_the_host_does_not_wait_while_a_batch_is_queued(job, images, shared, cfg):
    model = golden_model(job, shared).cuda()
    for _ in range(3):  # as it stands; recorded, which waits; replayed
        detect_batch(model, images)
    for amp in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            detect_batch(model, images)
            test_slots.forget_graphs(model)
            for step in range(3):
                if step != 1:
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    wait = queue_batch(model, images)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                assert min(len(one.scores) for one in wait()) >= 100


@pytest.mark.gpu
@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("amp", [False, True])
def test_replays_give_what_the_steps_give(job, amp, images, exact, shared, cfg):
    """Several sizes in turn, changed weights and thresholds in between."""
    model = golden_model(job, shared).cuda()
    sizes = [images, [image.transpose(1, 0, 2).copy() for image in images], images[:1]]
    timers = _Timers()
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        for round_, threshold in enumerate((0.05, 0.05, 0.05, 0.5, 0.5, 0.5)):
            cfg.TEST.SCORE_THRESH = threshold
            if round_ % 3 == 2:
                with torch.no_grad():
                    model.Box_Outs.cls_score.weight.mul_(0.9)
            for batch in sizes:
                found, expected = detect_batch(model, batch), detect_batch(model, batch, timers)
                for one, other in zip(found, expected, strict=True):
                    assert torch.equal(one.classes, other.classes)
                    torch.testing.assert_close(one.boxes, other.boxes, atol=1e-3, rtol=1e-4)
                    torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=1e-4)
                    for maps in ("masks", "heatmaps"):
                        pair = getattr(one, maps), getattr(other, maps)
                        assert (pair[0] is None) == (pair[1] is None)
                        if pair[0] is not None:  # of other numbers of RoIs
                            torch.testing.assert_close(*pair, atol=0.05, rtol=0.05)
    assert len(test_slots.graphs_of(model)) == 6  # all were recorded


class _Timers(dict):
    """Timers of any name, which make detect_batch take its steps one by one."""

    def __missing__(self, name):
        return self

    def tic(self):
        pass

    toc = tic


@pytest.mark.gpu
def test_batches_in_flight_and_threads_do_not_disturb_each_other(images, exact, shared, cfg):
    model = golden_model("tiny_mask_FPN", shared).cuda()
    batches = [[images[0]], [images[1]], [np.roll(images[0], 40, axis=1)]] * 6
    expected = []
    for batch in batches:
        found = [dataclasses.replace(one, ready=None) for one in detect_batch(model, batch)]
        expected.append(copy.deepcopy(found))
    waiting = [queue_batch(model, batch) for batch in batches]
    for wait, other in zip(waiting, expected, strict=True):
        assert_equal(wait(), other)
    with ThreadPoolExecutor(4) as pool:
        for found, other in zip(
            pool.map(lambda batch: detect_batch(model, batch), batches), expected, strict=True
        ):
            assert_equal(found, other)


@pytest.mark.gpu
def test_what_overflows_is_done_again(images, shared, cfg, monkeypatch):
    model = golden_model("tiny_mask_FPN", shared).cuda()
    monkeypatch.setattr(test_slots, "CANDIDATES", 50)
    for _ in range(3):
        assert in_slots(model, images) is None
        assert [len(one.scores) for one in detect_batch(model, images)] == [100, 100]


def test_recordings_are_not_kept_for_replaced_weights():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3))
    graphs = test_slots.graphs_of(net)
    with torch.no_grad():
        net[0].weight.mul_(2)  # in place: recordings read it
    net.load_state_dict(copy.deepcopy(net.state_dict()))
    assert test_slots.graphs_of(net) is graphs

    def replace_weight():
        net[0].weight = torch.nn.Parameter(net[0].weight.detach().clone())

    def replace_all():
        net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)

    def replace_buffer():
        net[1].running_mean = net[1].running_mean.clone()

    def replace_part():
        net[1] = torch.nn.BatchNorm2d(3)

    def replace_part_twice():  # the second takes the place in memory of the one that was there
        net[1] = torch.nn.BatchNorm2d(3)
        net[1] = torch.nn.BatchNorm2d(3)

    for replace in (replace_weight, replace_all, replace_buffer, replace_part, replace_part_twice):
        before = test_slots.graphs_of(net)
        replace()
        assert test_slots.graphs_of(net) is not before
        assert test_slots.graphs_of(net) is test_slots.graphs_of(net)


def test_recordings_go_with_their_model(shared, cfg):
    model = golden_model("tiny_mask_FPN", shared)
    test_slots.graphs_of(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.gpu
def test_replaced_weights_are_recorded_anew(images, shared, cfg):
    model = golden_model("tiny_mask_FPN", shared).cuda()
    for _ in range(3):
        in_slots(model, images)
    bias = model.Box_Outs.cls_score.bias
    changed = bias.detach().clone()
    changed[1] += 2
    model.Box_Outs.cls_score.bias = torch.nn.Parameter(changed)
    expected = in_slots(model, images)  # as it stands
    for _ in range(2):  # recorded, replayed
        assert_equal(in_slots(model, images), expected)
