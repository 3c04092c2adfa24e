"""Decoded images to the network's input, on the device: flip, subtract means, resize, crop, pad."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library  # noqa: F401


def image_batch(pixels: Tensor, meta: Tensor, height: int, width: int, means: Tensor) -> Tensor:
    """The float32 input blob of a batch of uint8 images of different sizes.

    As Detectron prepares images, within 1e-3 grey levels: means are subtracted in float64 and
    rounded to float32 before the resize; the resize is OpenCV's INTER_LINEAR with step `inv_scale`
    (not the ratio of rounded sizes), borders replicated.

    Args:
        pixels: (B,) uint8, packed HWC BGR images back to back.
        meta: (N, 9) float64, a row an image: [byte offset, H, W, flip (0 or 1), out_h, out_w,
            crop_x, crop_y, inv_scale]; out_h and out_w are the sizes after cropping, crop_x and
            crop_y the first column and row taken, all in resized pixels.
        height, width: of the blob; what an image does not fill is 0, what exceeds it is cut.
        means: (3,) float64, BGR.

    Returns:
        (N, 3, height, width) float32, BGR.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit; an image that does not
            lie inside `pixels` (on CUDA such an image is left 0: looking would stop the stream).
    """
    return torch.ops.detectron.image_batch(pixels, meta, height, width, means)


@torch.library.register_fake("detectron::image_batch")
def _image_batch_fake(
    pixels: Tensor, meta: Tensor, height: int, width: int, means: Tensor
) -> Tensor:
    return pixels.new_empty(meta.shape[0], 3, height, width, dtype=torch.float32)
