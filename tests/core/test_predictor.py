"""A detector as a function: of one image, several, a stream, and from several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from core.errors import UserError
from core.predictor import Predictor
from core.test import im_detect_all
from datasets.coco_classes import COCO_CLASSES
from small_model import CONFIG, KEYPOINTS, save_small_model


def photo(seed: int, height: int = 90, width: int = 120) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 6, width // 6, 3), np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def weights(tmp_path, cfg):
    return tmp_path / "model.pth"


@pytest.fixture
def predictor(weights):
    options = save_small_model(weights)
    return Predictor(CONFIG, weights, device="cpu", batch_size=2, options=options)


def same(a, b) -> bool:
    return (
        np.allclose(a.boxes, b.boxes, atol=1e-3)
        and np.allclose(a.scores, b.scores, atol=1e-5)
        and a.classes.tolist() == b.classes.tolist()
        and a.rles == b.rles
    )


def alike(a, b) -> bool:
    """Of the same image in another batch: the last bits differ, and may tip a box or a pixel."""
    best_a, best_b = (np.sort(r.scores)[::-1][:5] for r in (a, b))
    return abs(len(a) - len(b)) <= 1 and np.allclose(best_a, best_b, atol=1e-3)


def test_a_result_is_what_im_detect_all_finds(predictor):
    image = photo(0)
    result = predictor(image)
    cls_boxes, cls_segms, _ = im_detect_all(predictor.model, image)
    assert len(result) > 3
    by_class = [np.reshape(boxes, (-1, 5)) for boxes in cls_boxes]
    np.testing.assert_array_equal(
        np.hstack([result.boxes, result.scores[:, None]]), np.concatenate(by_class)
    )
    assert np.bincount(result.classes, minlength=4).tolist() == [len(b) for b in by_class]
    assert result.rles == sum(cls_segms, [])
    assert result.keypoints is None
    assert set(result.class_names) <= {"class 1", "class 2", "class 3"}
    assert result.masks.shape == (len(result), 90, 120)
    assert result.masks.dtype == bool
    assert result.masks.any()


def test_several_images_of_any_sizes_keep_their_order(predictor):
    images = [photo(i, *size) for i, size in enumerate([(90, 120), (120, 90), (90, 120), (40, 40)])]
    results = predictor(images)
    assert [(r.height, r.width) for r in results] == [im.shape[:2] for im in images]
    assert all(alike(r, predictor(image)) for r, image in zip(results, images, strict=True))
    stacked = predictor(np.stack([images[0], images[2]]))
    assert all(map(same, stacked, (results[0], results[2])))
    assert predictor([]) == []


def test_files_are_images_too(predictor, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), photo(3))
    assert same(predictor(tmp_path / "a.png"), predictor(photo(3)))
    with pytest.raises(UserError, match="no.png"):
        predictor(tmp_path / "no.png")


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (np.zeros((5, 5, 3), np.float32), TypeError),
        (np.zeros((1, 5, 5), np.uint8), ValueError),
        (np.zeros((0, 5, 3), np.uint8), ValueError),
    ],
)
def test_what_is_no_image_is_refused(predictor, image, error):
    with pytest.raises(error):
        predictor(image)


def test_threads_get_the_results_of_their_own_images(predictor):
    images = [photo(i, 60 + 6 * (i % 3), 90) for i in range(8)]
    alone = [predictor(image) for image in images]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(predictor, images))
    assert all(map(same, together, alone))


def test_a_stream_finds_the_same_and_keeps_the_order_of_equal_sizes(predictor):
    images = [(i, photo(i)) for i in range(5)] + [(9, photo(9, 120, 90))]
    found = list(predictor.stream(iter(images), lambda key, image, result: (key, result)))
    assert [key for key, _ in found] == [0, 1, 2, 3, 4, 9]
    assert all(map(same, (r for _, r in found), predictor([image for _, image in images])))


def test_errors_of_a_stream_reach_the_caller(predictor):
    def images():
        yield 0, photo(0)
        raise UserError("the camera fell down")

    with pytest.raises(UserError, match="fell down"):
        list(predictor.stream(images(), lambda *_: None))
    with pytest.raises(ZeroDivisionError):
        list(predictor.stream([(0, photo(0))], lambda *_: 1 / 0))


def test_weak_detections_can_be_left_out(predictor):
    result = predictor(photo(0))
    middle = float(np.median(result.scores))
    strong = result.above(middle)
    assert 0 < len(strong) < len(result)
    assert strong.scores.min() >= middle
    keep = np.flatnonzero(result.scores >= middle)
    assert strong.rles == [result.rles[i] for i in keep]
    np.testing.assert_array_equal(strong.boxes, result.boxes[keep])


def test_a_result_draws_itself(predictor):
    image = photo(0)
    picture = predictor(image).draw(image, thresh=0.2)
    assert picture.shape == (450, 600, 3)
    plain = predictor(image).draw(image, thresh=2.0)
    assert (picture != plain).any()


def test_keypoints_come_as_one_array(weights):
    options = save_small_model(weights, 2, KEYPOINTS)
    result = Predictor(CONFIG, weights, device="cpu", options=options)(photo(1))
    assert len(result) > 0
    assert result.keypoints.shape == (len(result), 4, 17)
    assert result.rles is None
    assert result.masks is None
    assert set(result.class_names) == {"person"}
    x, y = result.keypoints[:, 0], result.keypoints[:, 1]
    assert (x >= result.boxes[:, :1] - 1).all()
    assert (y <= result.boxes[:, 3:] + 1).all()


def test_the_number_of_classes_comes_from_the_weights(weights):
    options = save_small_model(weights, 81)
    predictor = Predictor(CONFIG, weights, device="cpu", options=options)
    assert predictor.vocabulary.names[1:] == COCO_CLASSES
    assert predictor.vocabulary.category_ids[-1] == 90


def test_one_process_has_one_config(predictor, weights, cfg):
    before = cfg.TEST.NMS
    with pytest.raises(UserError, match="one process for each config"):
        Predictor(CONFIG, weights, device="cpu", options=["TEST.NMS", 0.3])
    assert before == cfg.TEST.NMS
    assert len(predictor(photo(0))) > 3


def test_half_precision_finds_about_the_same(predictor, weights):
    options = save_small_model(weights)
    half = Predictor(CONFIG, weights, device="cpu", amp="bf16", options=options)
    full, result = predictor(photo(0)), half(photo(0))
    assert not np.array_equal(full.scores, result.scores)
    assert result.scores.max() == pytest.approx(full.scores.max(), abs=0.05)


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds(weights):
    options = save_small_model(weights)
    cpu = Predictor(CONFIG, weights, device="cpu", options=options)
    gpu = Predictor(CONFIG, weights, device="cuda", options=options)
    images = [photo(i) for i in range(3)]
    for a, b in zip(cpu(images), gpu(images), strict=True):
        # TF32 may tip a box across a threshold.
        assert abs(len(a) - len(b)) <= 2
        assert a.scores.max() == pytest.approx(b.scores.max(), abs=0.01)
