"""What was found in an image, and how it leaves the device: class by class, masks as RLEs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import utils.heatmaps as heatmap_utils
from core.config import cfg
from ops import masks_to_rles

ClassBoxes = list[np.ndarray | list]
ClassSegms = list[list[dict[str, Any]]]
ClassKeyps = list[list[np.ndarray]]

OKS_THRESH = 0.3  # KRCNN.NMS_OKS: people more alike than this are one


@dataclass
class Detections:
    """What was found in one image; tensors on the model's device, ordered by class."""

    boxes: Tensor  # (n, 4) float32, pixels of the image as given
    scores: Tensor  # (n,) float32
    classes: Tensor  # (n,) int64, 1 .. NUM_CLASSES - 1
    masks: Tensor | None  # (n, M, M) float32 probabilities of the detection's own class
    heatmaps: Tensor | None  # (n, K, S, S) float32 keypoint logits
    height: int
    width: int
    # Point of the device's queue from which on the tensors hold this; None on the CPU.
    ready: torch.cuda.Event | None = None
    rows: np.ndarray | None = None  # (n, 6) float32 [box, score, class], if the host knows already

    def rows_on_host(self) -> np.ndarray:
        """(n, 6) float32 [x1, y1, x2, y2, score, class]."""
        if self.rows is None:
            columns = [self.boxes, self.scores[:, None], self.classes[:, None]]
            self.rows = torch.cat(columns, dim=1).cpu().numpy()
        return self.rows


def queue_point(device: torch.device) -> torch.cuda.Event | None:
    """The point that the device's queue has reached; None on the CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@torch.inference_mode()
def class_results(
    detections: Detections, num_classes: int
) -> tuple[ClassBoxes, ClassSegms | None, ClassKeyps | None]:
    """`cls_boxes, cls_segms, cls_keyps` of one image, as `core.test.im_detect_all` returns them."""
    d = detections
    rows = d.rows_on_host()
    masks, boxes, points = d.masks, d.boxes, None
    if d.heatmaps is not None:
        points = heatmap_utils.heatmaps_to_keypoints(
            d.heatmaps, d.boxes, cfg.KRCNN.INFERENCE_MIN_SIZE
        )
        points = points.cpu().numpy()
        if cfg.KRCNN.NMS_OKS and len(rows):
            keep = np.array(heatmap_utils.nms_oks(points, rows, OKS_THRESH))
            keep = keep[np.argsort(rows[keep, 5], kind="stable")]
            rows, points = rows[keep], points[keep]
            kept = torch.from_numpy(keep).to(boxes.device)
            masks, boxes = None if masks is None else masks[kept], boxes[kept]
    counts = np.bincount(rows[:, 5].astype(np.int64), minlength=num_classes)
    ends = counts.cumsum().tolist()
    spans = [slice(end - n, end) for n, end in zip(counts.tolist(), ends, strict=True)]
    dets = np.ascontiguousarray(rows[:, :5])
    cls_boxes: ClassBoxes = [dets[span] for span in spans]
    cls_boxes[0] = []
    cls_segms = cls_keyps = None
    if masks is not None:
        rles = masks_to_rles(masks, boxes, d.height, d.width, cfg.MRCNN.THRESH_BINARIZE)
        cls_segms = [rles[span] for span in spans]
    if points is not None:
        cls_keyps = [list(points[span]) for span in spans]
    return cls_boxes, cls_segms, cls_keyps
