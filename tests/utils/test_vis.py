"""Pictures: everything is on them, text is readable, and nothing leaves the frame."""

from __future__ import annotations

from itertools import combinations

import cv2
import numpy as np
import pytest
from pypdf import PdfReader

from utils.keypoints import PERSON_KEYPOINTS
from utils.skeleton import skeleton_of
from utils.vis import convert_from_cls_format, draw, picture_names, vis_one_image
from utils.vis_layout import class_colour, lay_out, text_colour
from utils.vis_pdf import merge_pdfs

NAMES = ("__background__", "person", "traffic light", "hot dog")


def random_detections(n: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    corner = rng.uniform(0, 0.8, (n, 2))
    end = corner + rng.uniform(0.05, 1, (n, 2)) * (1 - corner)
    size = np.array([width, height])
    boxes = np.hstack([corner * size, end * size - 1, rng.uniform(0.5, 1, (n, 1))])
    return boxes.astype(np.float32), rng.integers(1, len(NAMES), n)


@pytest.mark.parametrize("size", [(480, 640), (45, 60), (5000, 3000), (30, 2000), (1200, 40)])
def test_labels_stay_inside_and_apart(size):
    boxes, classes = random_detections(40, *size)
    layout = lay_out(size, boxes, classes, None, NAMES, 0.5)
    labels = [i.label for i in layout.instances if i.label]
    assert len(labels) >= 4
    for label in labels:
        assert label.x >= 0
        assert label.y >= 0
        assert label.x + label.width <= layout.width
        assert label.y + label.height <= layout.height
    assert not any(a.overlap(b) for a, b in combinations(labels, 2))


def test_text_and_lines_scale_with_the_picture():
    boxes, classes = random_detections(3, 400, 600)
    small, large = (
        lay_out((400 * k, 600 * k), boxes * k, classes, None, NAMES, 0.0) for k in (1, 8)
    )
    assert large.font_size == pytest.approx(8 * small.font_size, rel=0.25)
    assert large.line_width >= 6 * small.line_width
    assert small.font_size >= 12


def test_a_tiny_image_is_enlarged_until_text_can_be_read():
    boxes = np.array([[10, 20, 40, 50, 0.9]], np.float32)
    layout = lay_out((60, 50), boxes, [1], None, NAMES, 0.5)
    picture = draw(np.zeros((60, 50, 3), np.uint8), layout)
    assert picture.shape == (600, 500, 3)
    assert layout.font_size >= 12
    # The enlarged box covers the pixels 10 .. 40 of the image, both included.
    assert layout.instances[0].box == (100.0, 200.0, 410.0, 510.0)
    rows, columns = (picture == class_colour(1)[::-1]).all(axis=2).nonzero()
    assert (columns.min(), rows.max()) == (pytest.approx(100, abs=1), pytest.approx(509, abs=1))


def test_weak_detections_are_left_out():
    boxes = np.array([[0, 0, 9, 9, 0.69], [5, 5, 15, 15, 0.7]], np.float32)
    layout = lay_out((600, 600), boxes, [1, 2], None, NAMES, 0.7)
    assert [i.label.text for i in layout.instances] == ["traffic light 0.70"]


def test_colours_belong_to_classes_and_text_contrasts():
    colours = [class_colour(j) for j in range(1, 81)]
    assert len(set(colours)) == 80
    for colour in colours:
        light, dark = max(map(sum, [colour, text_colour(colour)])), sum(text_colour(colour))
        assert abs(sum(colour) - dark) > 150 or light - dark > 150


def test_masks_are_tinted_inside_and_nothing_else_is():
    image = np.full((600, 600, 3), 100, np.uint8)
    square = [[150.0, 150.0, 300.0, 150.0, 300.0, 300.0, 150.0, 300.0]]
    boxes = np.array([[100, 100, 400, 400, 0.9]], np.float32)
    layout = lay_out(image.shape, boxes, [1], [square], NAMES, 0.5)
    picture = draw(image, layout)
    colour = np.array(class_colour(1)[::-1])
    np.testing.assert_allclose(picture[220, 220], 0.6 * 100 + 0.4 * colour, atol=1)
    assert (picture[120:140, 200:260] == 100).all()
    assert (picture[450:, :] == 100).all()
    assert (image == 100).all(), "the caller's image must not be drawn upon"


def test_detections_by_class_become_one_list():
    cls_boxes = [[], np.ones((2, 5), np.float32), np.zeros((0, 5), np.float32)]
    cls_boxes.append(np.full((1, 5), 3, np.float32))
    cls_segms = [[], ["a", "b"], [], ["c"]]
    boxes, segms, keyps, classes = convert_from_cls_format(cls_boxes, cls_segms)
    assert boxes.shape == (3, 5)
    assert boxes.dtype == np.float32
    assert segms == ["a", "b", "c"]
    assert keyps is None
    assert classes.tolist() == [1, 1, 3]


@pytest.mark.parametrize("kind", ["png", "jpg", "pdf"])
def test_files_are_written(tmp_path, kind):
    image = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    cls_boxes = [[], np.array([[10, 10, 60, 60, 0.9]], np.float32), [], []]
    path = tmp_path / f"picture.{kind}"
    vis_one_image(image, path, cls_boxes, class_names=NAMES)
    if kind == "pdf":
        assert path.read_bytes().startswith(b"%PDF")
    else:
        assert cv2.imread(str(path)).shape == (450, 600, 3)
    assert list(tmp_path.iterdir()) == [path]


def person(points: dict[str, tuple[float, float]], sure: float = 5.0) -> np.ndarray:
    """(4, 17) keypoints as the network gives them; those not named have a low logit."""
    keypoints = np.zeros((4, 17), np.float32)
    keypoints[2] = -5
    for name, place in points.items():
        keypoints[:3, PERSON_KEYPOINTS.index(name)] = [*place, sure]
    return keypoints


def pose_of(keypoints: np.ndarray, size: int = 600, **options):
    boxes = np.array([[0, 0, size - 1, size - 1, 0.9]], np.float32)
    (instance,) = lay_out(
        (size, size), boxes, [1], None, NAMES, 0.5, keypoints=[keypoints], **options
    ).instances
    return instance.pose


def test_lines_join_the_points_that_are_sure():
    points = {"left_shoulder": (100, 100), "right_shoulder": (300, 100), "nose": (200, 20)}
    pose = pose_of(person(points))
    ends = {tuple(map(tuple, (start, end))) for start, end, _ in pose.lines}
    # Shoulder to shoulder, and the neck from the middle between them.
    assert ends == {((300.5, 100.5), (100.5, 100.5)), ((200.5, 100.5), (200.5, 20.5))}
    assert len(pose.points) == 3


@pytest.mark.parametrize(("logit", "shown"), [(2.0, 0), (2.1, 1)])
def test_unsure_points_are_left_out(logit, shown):
    points = {"left_hip": (100, 100), "left_knee": (100, 300)}
    pose = pose_of(person(points, logit), kp_thresh=2)
    assert len(pose.lines) == shown
    assert len(pose.points) == 2 * shown


def test_the_lines_of_other_keypoints_are_those_of_their_category():
    keypoints = np.array([[10, 90, 50], [10, 10, 80], [9, 9, 9], [1, 1, 1]], np.float32)
    skeleton = skeleton_of(["tip", "base", "end"], [[1, 2], [2, 3], [3, 7]])
    pose = pose_of(keypoints, skeleton=skeleton)
    assert [(tuple(a), tuple(b)) for a, b, _ in pose.lines] == [
        ((10.5, 10.5), (90.5, 10.5)),
        ((90.5, 10.5), (50.5, 80.5)),
    ]


def test_figures_are_drawn_in_colours_of_their_own():
    points = {"left_hip": (100, 100), "left_knee": (100, 300)}
    keypoints = person(points)
    boxes = np.array([[0, 0, 599, 599, 0.9]], np.float32)
    image = np.zeros((600, 600, 3), np.uint8)
    layout = lay_out(image.shape, boxes, [1], None, NAMES, 0.5, keypoints=[keypoints])
    ((_, _, colour),) = layout.instances[0].pose.lines
    picture = draw(image, layout)
    assert tuple(picture[200, 100]) == colour[::-1]
    assert not picture[200, 120:580].any()


def test_small_figures_get_thinner_lines_than_large_ones():
    keypoints = person({"left_hip": (10, 10), "left_knee": (10, 30)})
    boxes = np.array([[0, 0, 39, 39, 0.9], [0, 0, 1999, 1999, 0.8]], np.float32)
    large, small = lay_out(
        (2000, 2000), boxes, [1, 1], None, NAMES, 0.5, keypoints=[keypoints] * 2
    ).instances
    assert small.pose.line_width < large.pose.line_width / 3


def test_merged_pages_keep_their_order_and_size(tmp_path):
    sizes = [(600, 800), (700, 640), (900, 610)]
    pages = []
    for height, width in sizes:
        pages.append(tmp_path / f"{height}.pdf")
        cls_boxes = [[], np.array([[10, 10, 60, 60, 0.9]], np.float32), [], []]
        image = np.zeros((height, width, 3), np.uint8)
        vis_one_image(image, pages[-1], cls_boxes, class_names=("", "$5", "$6", "x"))
    merge_pdfs(pages, tmp_path / "all.pdf")
    merged = PdfReader(tmp_path / "all.pdf").pages
    assert [(p.mediabox.height, p.mediabox.width) for p in merged] == sizes
    assert "$5 0.90" in merged[0].extract_text()


def test_a_picture_without_detections_is_the_image():
    image = np.random.default_rng(0).integers(0, 255, (400, 700, 3), dtype=np.uint8)
    layout = lay_out(image.shape, np.zeros((0, 5), np.float32), [], None, NAMES, 0.5)
    np.testing.assert_array_equal(draw(image, layout), image)


def test_pictures_never_share_a_name():
    images = ["a/1.jpg", "b/1.jpg", "1_1.jpg", "results.png"]
    names = picture_names(images, "pdf", taken={"results.pdf"})
    assert names == ["1.pdf", "1_1.pdf", "1_1_1.pdf", "results_1.pdf"]
