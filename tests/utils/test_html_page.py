"""Pages that need nothing but themselves and never run what they were given as text."""

from __future__ import annotations

import base64
import json
import re

import cv2
import numpy as np

from utils.html_page import figure, image_uri, json_block, page, table, write_page


def test_a_page_refers_to_nothing_outside(tmp_path):
    uri = image_uri(np.zeros((20, 30, 3), np.uint8))
    write_page(tmp_path / "a.html", page("Pictures", figure(uri, "one") + table(["a"], [[1]])))
    html = (tmp_path / "a.html").read_text()
    assert html.startswith("<!DOCTYPE html>")
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    assert "http:" not in html
    assert "https:" not in html


def test_text_is_never_markup():
    evil = '<img src=x onerror="alert(1)">'
    html = page(evil, table([evil], [[evil]]) + figure("data:,", evil))
    assert evil not in html
    assert html.count("&lt;img src=x") == 7  # title, heading, header, key, cell, alt, caption


def test_data_cannot_end_their_block():
    value = {"name": "</script><script>alert(1)</script>", "n": [1, 2.5, None]}
    block = json_block("data", value)
    content = re.fullmatch(r'<script type="application/json" id="data">(.*)</script>', block)[1]
    assert "</" not in content
    assert json.loads(content) == value


def test_numbers_are_rounded_for_the_eye_and_sorted_in_full():
    html = table(["class", "AP"], [["cat", 0.123456], ["dog", float("nan")], ["cow", None]])
    assert '<td class="number" data-value="0.123456">0.123</td>' in html
    assert html.count('<td class="number" data-value=""></td>') == 2
    assert '<th class="number">AP</th>' in html
    assert "<th>class</th>" in html


def test_pictures_shrink_to_the_asked_size_and_never_grow():
    image = np.full((300, 600, 3), (10, 200, 30), np.uint8)
    for longest, shape in ((200, (100, 200, 3)), (None, (300, 600, 3)), (5000, (300, 600, 3))):
        uri = image_uri(image, longest=longest)
        encoded = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
        decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
        assert decoded.shape == shape
        np.testing.assert_allclose(decoded, np.broadcast_to((10, 200, 30), shape), atol=3)
