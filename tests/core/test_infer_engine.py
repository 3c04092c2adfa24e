"""Files in, pictures, results and galleries out."""

from __future__ import annotations

import json
import re

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from core.errors import UserError
from core.infer_engine import InferOptions, image_ids, infer_images, infer_video
from core.predictor import Predictor
from datasets.demo_shapes import draw_image
from small_model import CONFIG, save_small_model
from utils.video import VideoReader, VideoWriter


@pytest.fixture
def predictor(tmp_path, cfg):
    options = save_small_model(tmp_path / "model.pth")
    return Predictor(CONFIG, tmp_path / "model.pth", device="cpu", batch_size=2, options=options)


@pytest.fixture
def images(tmp_path):
    """Three photographs and, second, a text."""
    paths = [tmp_path / f"{name}.png" for name in ("7", "text", "8", "9")]
    for i, path in enumerate(paths):
        cv2.imwrite(str(path), draw_image(0, i)[0])
    paths[1].write_text("not an image")
    return paths


def test_everything_that_is_asked_for_is_written(predictor, images, tmp_path):
    folder = tmp_path / "out"
    options = InferOptions(thresh=0.2, picture_format="jpg", json=True, html=True)
    (problem,) = infer_images(predictor, images, folder, options)
    assert "text.png" in problem
    names = {"7.jpg", "8.jpg", "9.jpg", "detections.json", "gallery.html"}
    assert {file.name for file in folder.iterdir()} == names

    entries = json.loads((folder / "detections.json").read_text())
    found = predictor(images[0])
    of_first = [e for e in entries if e["file_name"] == str(images[0])]
    assert len(of_first) == pytest.approx(len(found), abs=1)
    html = (folder / "gallery.html").read_text()
    blocks = re.findall(r'<script type="application/json" id="item-\d">(.*)</script>', html)
    shown = [json.loads(block) for block in blocks]
    assert [item["name"] for item in shown] == [str(images[i]) for i in (0, 2, 3)]
    assert sum(len(item["found"]) for item in shown) == len(entries)
    first = shown[0]
    assert (first["height"], first["width"]) == cv2.imread(str(images[0])).shape[:2]
    np.testing.assert_allclose(first["found"][0]["b"][2:], found.boxes[0, 2:], atol=0.5)
    assert not re.search(r"(src|href)=\"?http", html)


def test_results_load_as_cocos(predictor, images, tmp_path):
    for i, path in enumerate(images):
        path.rename(path.with_name(f"{i + 1:012d}.png"))
    images = sorted(tmp_path.glob("0*.png"))
    infer_images(predictor, images, tmp_path / "out", InferOptions(picture_format="png", json=True))
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": 160, "width": 160} for i in range(1, 5)],
        "categories": [{"id": i, "name": str(i)} for i in (1, 2, 3)],
        "annotations": [],
    }
    truth.createIndex()
    results = truth.loadRes(str(tmp_path / "out/detections.json"))
    assert set(results.imgToAnns) == {1, 3, 4}
    entry = next(a for a in results.anns.values() if a["bbox"][2] > 20)
    mask = results.annToMask(entry)
    assert mask.shape == cv2.imread(str(images[entry["image_id"] - 1])).shape[:2]


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["000000000139.jpg", "COCO_val2014_000000000285.jpg"], [139, 285]),
        (["a/1.jpg", "b/1.jpg"], [1, 2]),
        (["5.jpg", "dog.jpg"], [1, 2]),
    ],
)
def test_image_ids_are_those_of_the_names(names, ids):
    assert image_ids(names) == ids


def test_nothing_readable_is_an_error(predictor, images, tmp_path):
    with pytest.raises(UserError, match=r"none of the images.*text\.png"):
        infer_images(predictor, [images[1]], tmp_path / "out", InferOptions())


def test_a_video_is_drawn_frame_by_frame(predictor, tmp_path):
    clip = tmp_path / "clip.avi"
    pictures = [cv2.resize(draw_image(0, i)[0], (96, 64)) for i in range(7)]
    with VideoWriter(clip, 5) as video:
        for picture in pictures:
            video.write(picture)
    out = tmp_path / "out.avi"
    options = InferOptions(thresh=0.99, json=True)
    assert infer_video(predictor, clip, out, options) == []
    with VideoReader(out) as video:
        assert video.fps == pytest.approx(5)
        drawn = [frame for _, frame in video]
    assert len(drawn) == 7
    for frame, picture in zip(drawn, pictures, strict=True):
        expected = cv2.resize(picture, frame.shape[1::-1])
        assert np.abs(frame - expected.astype(float)).mean() < 12
    entries = json.loads((tmp_path / "out.json").read_text())
    assert {entry["image_id"] for entry in entries} == set(range(7))


def test_a_truncated_video_is_done_as_far_as_it_goes(predictor, tmp_path):
    clip = tmp_path / "clip.avi"
    with VideoWriter(clip, 5) as video:
        for i in range(12):
            video.write(cv2.resize(draw_image(0, i)[0], (96, 64)))
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    (problem,) = infer_video(predictor, clip, tmp_path / "out.avi", InferOptions())
    assert "of 12 frames" in problem
    with VideoReader(tmp_path / "out.avi") as video:
        assert 2 < len(list(video)) < 11
