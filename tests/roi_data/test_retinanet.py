"""RetinaNet's labels against a slow reference that labels one anchor after another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from roi_data.retinanet import retinanet_targets

OVERLAPS = {"positive_overlap": 0.5, "negative_overlap": 0.4}


def iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0]) + 1
    h = min(a[3], b[3]) - max(a[1], b[1]) + 1
    areas = [(x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b)]
    return w * h / (sum(areas) - w * h) if w > 0 and h > 0 else 0.0


def deltas(anchor, box):
    (w, h), (gw, gh) = ((x[2] - x[0] + 1, x[3] - x[1] + 1) for x in (anchor, box))
    dx = (box[0] + gw / 2 - anchor[0] - w / 2) / w
    dy = (box[1] + gh / 2 - anchor[1] - h / 2) / h
    return [dx, dy, np.log(gw / w), np.log(gh / h)]


def slow_targets(anchors, boxes, classes):
    """Labels, deltas and the number of matched anchors of one image without crowds or padding."""
    table = np.array([[iou(a, b) for b in boxes] for a in anchors])
    best_of_box = table.max(axis=0)
    labels = np.full(len(anchors), -1)
    for i, row in enumerate(table):
        if row.max() >= 0.5 or np.isclose(row, best_of_box, rtol=1e-6).any():
            labels[i] = classes[row.argmax()]
    matched = (labels >= 1).sum()
    labels[table.max(axis=1) < 0.4] = 0
    values = np.zeros((len(anchors), 4))
    for i in np.flatnonzero(labels >= 1):
        values[i] = deltas(anchors[i], boxes[table[i].argmax()])
    return labels, values, matched


def padded(images, slots=8):
    """(N, slots, ...) tensors of the images' (boxes, classes, valid)."""
    boxes = torch.zeros(len(images), slots, 4)
    classes = torch.zeros(len(images), slots, dtype=torch.int64)
    valid = torch.zeros(len(images), slots, dtype=torch.bool)
    for n, (b, c, v) in enumerate(images):
        for g in range(len(b)):
            boxes[n, g], classes[n, g], valid[n, g] = torch.tensor(b[g]), int(c[g]), bool(v[g])
    return boxes, classes, valid


def targets_of(anchors, images, num_classes=5):
    im_info = torch.tensor([[100.0, 100.0, 1.0]] * len(images))
    return retinanet_targets(
        torch.as_tensor(anchors, dtype=torch.float32),
        *padded(images),
        im_info,
        num_classes=num_classes,
        **OVERLAPS,
    )


def random_boxes(rng, count):
    corner = rng.uniform(-30, 90, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(8, 60, (count, 2))], axis=1)


def test_labels_and_deltas_agree_with_a_slow_reference():
    rng = np.random.RandomState(3)
    anchors = random_boxes(rng, 600).astype(np.float32)
    images = []
    for count in (4, 1):
        boxes = random_boxes(rng, count).astype(np.float32)
        images.append((boxes, rng.randint(1, 5, count), np.ones(count, bool)))
    found = targets_of(anchors, images)
    fg_num, bg_num, seen = 0, 0, set()
    for n, (boxes, classes, _) in enumerate(images):
        labels, values, matched = slow_targets(anchors, boxes, classes)
        np.testing.assert_array_equal(found.labels[n], labels)
        np.testing.assert_allclose(found.bbox_targets[n], values, atol=1e-5)
        fg_num += matched + 1
        bg_num += ((labels == 0).sum() + 1) * 4 + (matched + 1) * 3
        seen |= set(np.unique(labels))
    assert {-1, 0} < seen
    assert found.fg_num.item() == fg_num and found.bg_num.item() == bg_num


def anchor_of_iou(overlap: float) -> list[float]:
    """An anchor with this IoU with the box (0, 0, 9, 9): as wide, and so much of its height."""
    return [0, 0, 9, 10 * overlap - 1]


@pytest.mark.parametrize(
    ("overlaps", "labels", "matched"),
    [
        # from 0.5 on foreground, below 0.4 background, in between neither
        ([0.7, 0.5, 0.49, 0.4, 0.39], [2, 2, -1, -1, 0], 2),
        # a poor best match counts between the two
        ([0.45, 0.42, 0.2], [2, -1, 0], 1),
        # below it is background after all, though it stays in the number of matches
        ([0.3, 0.2], [0, 0], 1),
        # ties for the best all match
        ([0.45, 0.45, 0.41], [2, 2, -1], 2),
    ],
)
def test_which_overlap_gives_which_label(overlaps, labels, matched):
    anchors = [anchor_of_iou(overlap) for overlap in overlaps]
    found = targets_of(anchors, [([[0.0, 0, 9, 9]], [2], [True])])
    assert found.labels[0].tolist() == labels
    assert found.fg_num.item() == matched + 1
    assert torch.equal(found.bbox_targets[0].any(dim=1), found.labels[0] > 0)


def test_an_anchor_takes_the_class_of_the_box_it_overlaps_most():
    """The best anchor of the second box overlaps the first one more: that one's class it is."""
    first, second = [0.0, 0, 9, 9], [0.0, 8, 9, 27]
    found = targets_of([[0, 0, 9, 9]], [([first, second], [3, 4], [True, True])])
    assert found.labels[0].tolist() == [3]


def test_anchors_outside_the_image_count_and_crowds_do_not():
    anchors = [[-40.0, -40, -20, -20], [200, 200, 220, 220], [50, 50, 70, 70]]
    boxes = [[-40.0, -40, -20, -20], [50.0, 50, 70, 70]]
    found = targets_of(anchors, [(boxes, [1, 2], [True, False])])
    assert found.labels[0].tolist() == [1, 0, 0]


def test_an_image_without_objects_is_background():
    found = targets_of([[0.0, 0, 9, 9], [5, 5, 30, 30]], [([], [], [])])
    assert found.labels.tolist() == [[0, 0]] and found.fg_num.item() == 1
    assert found.bg_num.item() == 3 * 4 + 1 * 3 and not found.bbox_targets.any()
