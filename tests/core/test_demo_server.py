"""The demo page: a real upload in a real browser, and what it refuses."""

from __future__ import annotations

import shutil
import threading

import cv2
import numpy as np
import pytest
from starlette.testclient import TestClient

from core import demo_server
from core.demo_server import demo_app, free_socket
from core.errors import UserError
from core.predictor import Predictor
from datasets.demo_shapes import draw_image
from small_model import CONFIG, save_small_model

BYTES = {"content-type": "application/octet-stream"}


@pytest.fixture
def predictor(tmp_path, cfg):
    options = save_small_model(tmp_path / "model.pth")
    return Predictor(CONFIG, tmp_path / "model.pth", device="cpu", options=options)


@pytest.fixture
def client(predictor):
    return TestClient(demo_app(predictor), base_url="http://127.0.0.1:8000")


def encoded(image: np.ndarray, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


def refused(answer, *words: str) -> None:
    assert answer.status_code == 400
    for word in words:
        assert word in answer.json()["error"]


def test_an_upload_is_answered_with_its_detections(client, predictor):
    image = draw_image(0, 1)[0]
    answer = client.post("/detect", content=encoded(image), headers=BYTES)
    assert answer.status_code == 200
    expected = predictor(image)
    found = answer.json()["found"]
    assert len(found) == len(expected) > 0
    np.testing.assert_allclose([d["b"] for d in found], expected.boxes, atol=0.06)
    assert (answer.json()["height"], answer.json()["width"]) == image.shape[:2]
    assert any(d["m"] for d in found)


def test_giants_are_refused_before_they_are_decoded(client, monkeypatch):
    wide = encoded(np.zeros((4, 30_000, 3), np.uint8))
    monkeypatch.setattr(demo_server.cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    refused(client.post("/detect", content=wide, headers=BYTES), "30000 x 4 pixels", "shrink")


def test_other_files_are_refused(client):
    refused(client.post("/detect", content=b"hello", headers=BYTES), "no image", "JPEG")
    refused(client.post("/detect", content=b"", headers=BYTES), "no image")
    cut = encoded(draw_image(0, 1)[0])[:60]
    refused(client.post("/detect", content=cut, headers=BYTES), "damaged")
    # Only kinds that the page promises: no decoder more than needed sees what is sent.
    tiff = encoded(np.zeros((9, 9, 3), np.uint8), ".tiff")
    refused(client.post("/detect", content=tiff, headers=BYTES), "no image")


def test_large_uploads_are_given_up(client, monkeypatch):
    monkeypatch.setattr(demo_server, "MAX_UPLOAD", 2**20)
    refused(client.post("/detect", content=b"x" * (2**20 + 1), headers=BYTES), "1 MiB")


def test_other_sites_cannot_use_the_page(client, predictor):
    plain = client.post("/detect", content=b"x", headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    everywhere = TestClient(demo_app(predictor, hosts=("*",)))
    assert everywhere.get("/", headers={"host": "gpu-box:8000"}).status_code == 200


@pytest.mark.parametrize("path", ["/etc/passwd", "/../demo_server.py", "/detect/..%2f..%2fx"])
def test_no_path_leads_to_a_file(client, path):
    assert client.get(path).status_code == 404


def test_a_port_in_use_is_one_sentence():
    with free_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1.*--port"):
            free_socket("127.0.0.1", port)
    free_socket("127.0.0.1", port).close()
    with pytest.raises(UserError, match="no.such.host"):
        free_socket("no.such.host.invalid", 0)


@pytest.fixture
def address(predictor):
    """The page, served on a port of this machine."""
    uvicorn = pytest.importorskip("uvicorn")
    bound = free_socket("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(demo_app(predictor, 0.3), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    yield f"http://127.0.0.1:{bound.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    bound.close()


@pytest.fixture
def browser_page():
    """A page of a headless Chromium, where playwright and a Chromium are installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium or google-chrome on this machine")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 800})
        yield page
        browser.close()


def test_a_browser_shows_what_was_uploaded(address, browser_page, predictor, tmp_path):
    image = draw_image(0, 1)[0]
    good, bad = tmp_path / "shapes.png", tmp_path / "text.jpg"
    good.write_bytes(encoded(image))
    bad.write_text("not an image")
    scores = predictor(image).scores
    errors = []
    browser_page.on("pageerror", lambda error: errors.append(error))

    browser_page.goto(address)
    browser_page.set_input_files("#file", good)
    browser_page.wait_for_selector("#grid figure")
    assert browser_page.locator(".tag").count() == (scores >= 0.3).sum()
    # The slider filters without asking the server again.
    middle = round(float(np.median(scores)), 2)
    browser_page.locator("#score").fill(str(middle))
    assert browser_page.locator(".tag").count() == (scores >= middle).sum()
    browser_page.click("#none")
    assert browser_page.locator(".tag").count() == 0

    browser_page.set_input_files("#file", bad)
    browser_page.wait_for_selector("#message.error")
    assert "text.jpg: this is no image" in browser_page.inner_text("#message")
    assert browser_page.locator("#grid figure").count() == 1
    assert not errors
