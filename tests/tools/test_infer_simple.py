"""The scripts that show what a detector sees: flags, exit codes, and one sentence for bad input."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest

import demo_server
import infer_simple
from core.demo_server import free_socket
from datasets.demo_shapes import draw_image
from small_model import CONFIG, save_small_model
from tiny_data import write_tiny_files
from utils.video import VideoReader, VideoWriter


@pytest.fixture
def infer(tmp_path, cfg):
    """infer(*flags) runs the script with a small model; its pictures go to tmp_path/out."""
    options = save_small_model(tmp_path / "model.pth", num_classes=3)
    dataset = write_tiny_files(tmp_path / "tiny").spec

    def run(*flags: object) -> int:
        known = ["--dataset", dataset, "--cfg", CONFIG, "--no_cuda"]
        known += ["--load_ckpt", tmp_path / "model.pth", "--output_dir", tmp_path / "out"]
        return infer_simple.main([str(flag) for flag in [*known, *flags, "--set", *options]])

    return run


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    for i, name in enumerate(("a.jpg", "deeper/a.jpg", "b.png")):
        cv2.imwrite(str(folder / name), draw_image(0, i)[0])
    return folder


def names(folder) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_folders_below_are_drawn_on_request(infer, photos, tmp_path):
    assert infer("--image_dir", photos, "--recursive", "--format", "jpg", "--bs", 2) == 0
    assert names(tmp_path / "out") == {"a.jpg", "a_1.jpg", "b.jpg"}


def test_a_list_on_standard_input_is_done_but_for_what_cannot_be_read(
    infer, photos, tmp_path, monkeypatch, capsys
):
    (photos / "text.jpg").write_text("not an image")
    cv2.imwrite(str(photos / "wide.png"), np.zeros((4, 30_000, 3), np.uint8))
    listed = "\n".join(str(photos / name) for name in ("a.jpg", "text.jpg", "wide.png"))
    monkeypatch.setattr("sys.stdin", io.StringIO(listed))
    assert infer("--images", "-", "--format", "png", "--html", "--json") == 2
    assert names(tmp_path / "out") == {"a.png", "gallery.html", "detections.json"}
    error = capsys.readouterr().err
    assert "error: 2 of 3 images could not be read" in error


def test_a_video_becomes_a_video(infer, tmp_path):
    with VideoWriter(tmp_path / "clip.avi", 5) as video:
        for i in range(3):
            video.write(cv2.resize(draw_image(0, i)[0], (96, 64)))
    assert infer("--video", tmp_path / "clip.avi") == 0
    assert names(tmp_path / "out") == {"clip.mp4"}
    with VideoReader(tmp_path / "out/clip.mp4") as video:
        assert len(list(video)) == 3


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--image_dir", "{tmp}/empty"), "holds no images"),
        (("--images", "{tmp}/*.gif"), "matches no file"),
        (("--video", "{tmp}/text.mp4"), "text.mp4 cannot be opened: it is truncated"),
        (("--camera", "77"), "camera 77 cannot be opened"),
        (("--video", "x.mp4", "--html"), "--html makes a gallery of images"),
        (("--images", "a.jpg", "--output", "x.mp4"), "--output names a video"),
        (("--images", "a.jpg", "--recursive"), "--recursive is for --image_dir"),
        (("--images", "a.jpg", "--bs", "0"), "at least one image"),
    ],
)
def test_bad_input_is_one_sentence(infer, tmp_path, capfd, flags, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("not a video")
    assert infer(*(flag.format(tmp=tmp_path) for flag in flags)) == 2
    lines = [li for li in capfd.readouterr().err.splitlines() if li.startswith("error: ")]
    assert len(lines) == 1
    assert sentence in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "source"),
    [
        (("--image_dir", "p", "--output_dir", "p", "--format", "jpg"), "p/a.jpg"),
        (("--images", "link.jpg", "--output_dir", "other", "--format", "jpg"), "link.jpg"),
        (("--images", "p/a.jpg", "a.pdf", "--output_dir", "."), "a.pdf"),
        (("--images", "p/a.jpg", "results.pdf", "--output_dir", "."), "results.pdf"),
        (("--images", "gallery.html", "--output_dir", ".", "--html"), "gallery.html"),
        (("--images", "detections.json", "--output_dir", ".", "--json"), "detections.json"),
        (("--video", "v.mp4", "--output_dir", "."), "v.mp4"),
        (("--video", "v.mp4", "--output", "p/../v.mp4"), "v.mp4"),
        (("--video", "v.mp4", "--output", "tiny/tiny.mp4", "--json"), "tiny/tiny.json"),
    ],
)
def test_no_file_that_is_read_is_written(infer, tmp_path, monkeypatch, capsys, flags, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(infer_simple, "Predictor", lambda *_, **__: pytest.fail("it was loaded"))
    (tmp_path / "p").mkdir()
    files = ("p/a.jpg", "a.pdf", "results.pdf", "gallery.html", "detections.json", "v.mp4")
    for name in files:
        (tmp_path / name).write_text(name)
    (tmp_path / "link.jpg").symlink_to("p/a.jpg")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/link.jpg").symlink_to("../p/a.jpg")
    assert infer(*flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "would overwrite" in line
    assert f"{source}, which is read" in line
    assert [(tmp_path / name).read_text() for name in files] == list(files)


def test_pictures_may_go_beside_photos_of_other_names(infer, photos):
    assert infer("--image_dir", photos, "--output_dir", photos, "--format", "png") == 2
    (photos / "b.png").unlink()
    assert infer("--image_dir", photos, "--output_dir", photos, "--format", "png") == 0
    assert names(photos) == {"a.jpg", "a.png", "deeper"}


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_the_demo_page_refuses_a_port_that_there_is_not(port, capsys):
    flags = ["--dataset", "coco2017", "--cfg", "no.yaml", "--load_ckpt", "no.pth"]
    assert demo_server.main([*flags, "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: --port must be 0 (any free port) to 65535, not {port}"


def test_the_demo_page_says_that_its_port_is_in_use_before_it_loads_anything(capsys):
    with free_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        flags = ["--dataset", "coco2017", "--cfg", "no.yaml", "--load_ckpt", "no.pth"]
        assert demo_server.main([*flags, "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: port {port} of 127.0.0.1 cannot be used")
