"""The report of a test, in a real browser, and the matching behind it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import utils.segms as segm_utils
from datasets import json_dataset_evaluator
from datasets.dataset_catalog import resolve_dataset
from datasets.demo_shapes import make_demo_data
from datasets.detection_matches import (
    CONFUSED,
    IGNORED,
    MISPLACED,
    NOTHING,
    RIGHT,
    TWICE,
    confusion,
    match_image,
)
from datasets.json_dataset import JsonDataset
from datasets.report import Detections, write_report


def invented_detections(dataset: JsonDataset, rng: np.random.Generator) -> tuple[list, list]:
    """(all_boxes, all_segms): objects a little displaced, some badly, as another class, missed."""
    roidb = dataset.get_roidb(gt=True)
    boxes, segms = ([[[] for _ in roidb] for _ in dataset.classes] for _ in range(2))
    for i, entry in enumerate(roidb):
        for j, label in enumerate(entry["gt_classes"].tolist()):
            fate = rng.random()
            if fate < 0.08:
                continue
            if fate > 0.9:
                label = 1 + label % (len(dataset.classes) - 1)
            side = entry["boxes"][j, 2:] - entry["boxes"][j, :2]
            shift = np.rint(rng.normal(0, 0.25 if fate < 0.2 else 0.04, 2) * side).astype(int)
            box = entry["boxes"][j] + np.tile(shift, 2)
            mask = segm_utils.polys_to_mask(entry["segms"][j], entry["height"], entry["width"])
            segms[label][i].append(segm_utils.mask_to_rle(np.roll(mask, shift[::-1], (0, 1))))
            boxes[label][i].append([*box, rng.beta(6, 2)])
    return [[np.array(b) if b else [] for b in of] for of in boxes], segms


def report(dataset: JsonDataset, boxes: list, segms: list, folder) -> str:
    evaluations = {
        "box": json_dataset_evaluator.evaluate_boxes(dataset, boxes, folder),
        "mask": json_dataset_evaluator.evaluate_masks(dataset, boxes, segms, folder),
    }
    write_report(dataset, Detections(boxes, segms), evaluations, folder / "report.html")
    return (folder / "report.html").read_text()


@pytest.fixture
def demo(tmp_path, cfg) -> JsonDataset:
    return JsonDataset(resolve_dataset(str(make_demo_data(tmp_path, 1, 12))).test_names[0])


def test_a_browser_shows_every_picture_and_sorts_the_table(demo, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium or google-chrome on this machine")
    report(demo, *invented_detections(demo, np.random.default_rng(0)), tmp_path)
    errors, asked = [], []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.on("pageerror", lambda error: errors.append(error))
        page.on("request", lambda r: asked.append(r.url))
        page.goto((tmp_path / "report.html").as_uri())
        pictures = page.locator("img")
        number = pictures.count()
        widths = []
        for k in range(number):
            pictures.nth(k).scroll_into_view_if_needed()
            page.wait_for_function(
                "k => document.images[k].complete && document.images[k].naturalWidth", arg=k
            )
            widths.append(pictures.nth(k).evaluate("image => image.naturalWidth"))
        classes = page.locator("table.sortable").first
        column = classes.locator("tbody td:nth-child(4)")
        best_first = column.all_inner_texts()
        classes.locator("th").nth(3).click()
        worst_first = column.all_inner_texts()
        classes.locator("th").nth(0).click()
        names = classes.locator("tbody td:nth-child(1)").all_inner_texts()
        browser.close()
    assert number >= 4 + 2 + 1 + 2 * 3  # curves, sizes and scores, confusion, some pairs
    assert min(widths) > 100
    assert not errors
    assert all(url.startswith(("file:", "data:")) for url in asked)
    assert worst_first == best_first[::-1]
    assert float(worst_first[0]) < float(worst_first[-1])
    assert names == sorted(demo.classes[1:])


def test_the_numbers_are_the_evaluators(demo, tmp_path):
    boxes, segms = invented_detections(demo, np.random.default_rng(1))
    html = report(demo, boxes, segms, tmp_path)
    scored = json_dataset_evaluator.score_boxes(demo, boxes)
    for value in scored.stats[:6]:
        assert value == -1 or f">{100 * value:.1f}</td>" in html
    for value in json_dataset_evaluator.class_average_precision(demo, scored).values():
        assert f">{100 * value:.1f}</td>" in html


def test_nothing_found_still_makes_a_report(demo, tmp_path):
    nothing = [[[] for _ in demo.image_ids] for _ in demo.classes]
    html = report(demo, nothing, nothing, tmp_path)
    assert "<h2>Misses</h2>" in html
    assert html.count('class="pair"') == 6


@pytest.mark.filterwarnings("error")
def test_data_without_objects_still_make_a_report(demo, tmp_path):
    for image in demo.COCO.imgToAnns.values():
        image.clear()
    demo.COCO.anns.clear()
    demo.COCO.dataset["annotations"].clear()
    nothing = [[[] for _ in demo.image_ids] for _ in demo.classes]
    assert "<h2>Misses</h2>" in report(demo, nothing, nothing, tmp_path)


def test_every_kind_of_mistake_has_its_name(tiny_dataset, cfg):
    """Image 1: a cat at 10, 20 of 30 x 40, a dog, a crowd of cats."""
    dataset = JsonDataset(tiny_dataset.train_names[0])
    cat = np.array([10, 20, 39, 59])
    crowd = next(a["bbox"] for a in dataset.COCO.imgToAnns[1] if a["iscrowd"])
    inside = [crowd[0] + 1, crowd[1] + 1, crowd[0] + 9, crowd[1] + 9]
    cats = [[*cat, 0.9], [*(cat + 1), 0.8], [*(cat + 15), 0.7], [80, 2, 90, 8, 0.6], [*inside, 0.5]]
    boxes = [[[] for _ in dataset.image_ids] for _ in dataset.classes]
    boxes[1][0], boxes[2][0] = np.array(cats, float), np.array([[*cat, 0.95]])
    found = match_image(dataset, boxes, 0)
    assert found.kinds.tolist() == [CONFUSED, RIGHT, TWICE, MISPLACED, NOTHING, IGNORED]
    assert found.labels.tolist() == [2, 1, 1, 1, 1, 1]
    assert found.rows.tolist() == [0, 0, 1, 2, 3, 4]
    np.testing.assert_array_equal(found.gt_scores[found.gt_labels == 1][0], 0.9)
    counts = confusion([found], dataset.num_classes, 0.55)
    # [what is there, taken for]: the cat as cat and once as dog; two boxes of nothing; no dog.
    assert counts.tolist() == [[0, 2, 0], [0, 1, 1], [1, 0, 0]]
