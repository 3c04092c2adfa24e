"""Soft masks in the frame of their boxes -> binary masks, or COCO RLEs, in the frame of the image.

The pixels are those of Detectron's segm_results: the box is expanded about its centre by
(M + 2) / M, because the map gets a border of one zero pixel, and truncated to whole pixels; the
bordered map is resized to it as by OpenCV (bilinear), compared with the threshold and cut at the
image's edges.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library  # noqa: F401


def paste_masks(masks: Tensor, boxes: Tensor, im_h: int, im_w: int, thresh: float) -> Tensor:
    """Binary masks of the size of the image.

    Args:
        masks: (n, M, M) floating point foreground probabilities, one map a box; M at most 1024.
        boxes: (n, 4) floating point boxes in image pixels, on the device of `masks`. One with a NaN
            pastes nothing.
        im_h, im_w: size of the image in pixels.
        thresh: a pixel belongs to the mask if its interpolated probability is above this.

    Returns:
        (n, im_h, im_w) uint8, 0 and 1.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
    """
    return torch.ops.detectron.paste_masks(masks, boxes, im_h, im_w, float(thresh))


def masks_to_rles(
    masks: Tensor, boxes: Tensor, im_h: int, im_w: int, thresh: float
) -> list[dict[str, list[int] | str]]:
    """COCO RLEs of pasted masks; nothing of the size of the image is built on the way.

    Args:
        As for `paste_masks`.

    Returns:
        n dicts `{'size': [im_h, im_w], 'counts': str}`, as pycocotools encodes them.

    Raises:
        ValueError, TypeError: as `paste_masks`.
    """
    text, offsets = torch.ops.detectron.encode_masks(masks, boxes, im_h, im_w, float(thresh))
    counts, ends = text.numpy().tobytes().decode("ascii"), offsets.tolist()
    size = [im_h, im_w]  # one for all: it is pickled, and kept, once
    return [
        {"size": size, "counts": counts[begin:end]}
        for begin, end in zip(ends, ends[1:], strict=False)
    ]


@torch.library.register_fake("detectron::paste_masks")
def _paste_masks_fake(masks, boxes, im_h, im_w, thresh):
    return masks.new_empty(masks.shape[0], im_h, im_w, dtype=torch.uint8)


@torch.library.register_fake("detectron::encode_masks")
def _encode_masks_fake(masks, boxes, im_h, im_w, thresh):
    size = torch.library.get_ctx().new_dynamic_size()
    text = torch.empty(size, dtype=torch.uint8, device="cpu")
    return text, torch.empty(masks.shape[0] + 1, dtype=torch.int64, device="cpu")
