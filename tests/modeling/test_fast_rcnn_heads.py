"""Class-agnostic boxes: one regressor for all classes, in training and testing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

LABELS = torch.tensor([0, 3, 1, 2])
VALID = torch.tensor([True, True, True, False])


@pytest.mark.parametrize("agnostic", [False, True])
def test_box_losses_are_those_of_the_formula(agnostic, cfg):
    from modeling.fast_rcnn_heads import fast_rcnn_losses, fast_rcnn_outputs

    cfg.MODEL.NUM_CLASSES, cfg.MODEL.CLS_AGNOSTIC_BBOX_REG = 4, agnostic
    torch.manual_seed(0)
    outputs = fast_rcnn_outputs(6)
    scores, deltas = outputs(torch.randn(4, 6))
    assert deltas.shape == (4, 8 if agnostic else 16)
    targets = torch.randn(4, 4) * (LABELS > 0).unsqueeze(1)
    loss_cls, loss_bbox, accuracy = fast_rcnn_losses(scores, deltas, LABELS, VALID, targets)

    total_cls = total_bbox = right = 0.0
    for r in range(3):  # the last one is an empty slot
        label = int(LABELS[r])
        total_cls -= scores[r].log_softmax(0)[label].item()
        right += scores[r].argmax().item() == label
        column = 4 * (min(label, 1) if agnostic else label)
        for k in range(4 if label else 0):
            x = abs(deltas[r, column + k].item() - targets[r, k].item())
            total_bbox += 0.5 * x * x if x < 1 else x - 0.5
    assert loss_cls.item() == pytest.approx(total_cls / 3, rel=1e-5)
    assert loss_bbox.item() == pytest.approx(total_bbox / 3, rel=1e-5)
    assert accuracy.item() == pytest.approx(right / 3)


def test_detections_of_every_class_use_the_second_slot(cfg):
    from core.test import box_results_with_nms_and_limit, im_detect_bbox
    from utils.boxes import bbox_transform

    cfg.MODEL.FASTER_RCNN, cfg.MODEL.NUM_CLASSES = True, 3
    cfg.MODEL.CLS_AGNOSTIC_BBOX_REG = True
    rois = torch.tensor([[0.0, 10, 10, 40, 50], [0, 60, 20, 90, 80]])
    deltas = torch.tensor([[9.0] * 4 + [0.5, -0.2, 1, 0.3], [9.0] * 4 + [0, 0.1, -1, 0.2]])
    probabilities = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.1, 0.7]])

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))
            self.register_buffer("pixel_means", torch.zeros(3, dtype=torch.float64))

        def forward(self, data, im_info):
            return {
                "rois": rois,
                "cls_score": probabilities,
                "bbox_pred": deltas,
                "blob_conv": data,
            }

    image = np.zeros((100, 120, 3), np.uint8)
    scores, boxes, scale, _ = im_detect_bbox(Net(), image, 100, 200)
    assert scale == 1 and scores.shape == (2, 3) and boxes.shape == (2, 12)
    expected = bbox_transform(
        rois[:, 1:], deltas[:, 4:], cfg.MODEL.BBOX_REG_WEIGHTS, cfg.BBOX_XFORM_CLIP
    )
    expected = torch.minimum(expected.clamp(min=0), torch.tensor([119.0, 99, 119, 99]))
    for cls in range(3):
        np.testing.assert_allclose(boxes[:, 4 * cls : 4 * cls + 4], expected, rtol=1e-5)
    _, _, cls_boxes = box_results_with_nms_and_limit(scores, boxes)
    assert [len(b) for b in cls_boxes] == [0, 2, 2]
