"""Images to network input, on the model's device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import ops
from core.config import cfg
from utils.device import upload


def get_target_scale(height: int, width: int, target_size: int, max_size: int) -> float:
    """Factor that brings the short side to target_size, or the long side to max_size at most."""
    scale = float(target_size) / min(height, width)
    if np.round(scale * max(height, width)) > max_size:
        scale = float(max_size) / max(height, width)
    return scale


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Height and width of an image after resizing, each rounded half to even."""
    return int(np.round(height * scale)), int(np.round(width * scale))


def padded_size(sizes: Sequence[tuple[int, int]], stride: int) -> tuple[int, int]:
    """Height and width that hold every (h, w) of sizes, each rounded up to a multiple of stride."""
    height, width = (max(s[i] for s in sizes) for i in (0, 1))
    return -(-height // stride) * stride, -(-width // stride) * stride


def coarsest_stride() -> int:
    """What the padded size must be a multiple of: FPN.COARSEST_STRIDE, or 1 without a pyramid.

    A backbone that keeps only the finest level (P2only, without FPN.FPN_ON) has a pyramid inside.
    """
    has_pyramid = cfg.FPN.FPN_ON or cfg.MODEL.CONV_BODY.startswith("FPN.")
    return int(cfg.FPN.COARSEST_STRIDE) if has_pyramid else 1


def image_meta(
    offset: int, height: int, width: int, flip: bool, out_hw, crop_xy, scale: float
) -> list[float]:
    """One row of the meta table of ops.image_batch()."""
    return [offset, height, width, flip, *out_hw, *crop_xy, 1.0 / scale]


def images_to_blob(
    pixels: Tensor, meta: Tensor, blob_size: tuple[int, int], pixel_means: Tensor
) -> Tensor:
    """Packed uint8 images to the network's input.

    Args:
        pixels: (B,) uint8, BGR images back to back.
        meta: (N, 9) float64, see ops.image_batch().
        blob_size: (height, width) after padding.
        pixel_means: (3,) float64 BGR means, on the device of pixels.

    Returns:
        (N, 3, height, width) float32: flipped, mean subtracted, resized, cropped, zero padded.
    """
    return ops.image_batch(pixels, meta, *blob_size, pixel_means)


class Placed(NamedTuple):
    """An image among the packed pixels of several."""

    offset: int  # bytes
    height: int
    width: int
    flip: bool = False


def pack_images(images: Sequence[np.ndarray], pinned: bool = False) -> tuple[Tensor, list[Placed]]:
    """Images (H, W, 3) uint8 back to back: (B,) uint8 on the CPU, and where each is.

    pinned: in memory that a GPU copies from while the host goes on.
    """
    pixels = torch.empty(sum(im.size for im in images), dtype=torch.uint8, pin_memory=pinned)
    places, offset = [], 0
    for im in images:
        pixels.numpy()[offset : offset + im.size].reshape(im.shape)[:] = im
        places.append(Placed(offset, *im.shape[:2]))
        offset += im.size
    return pixels, places


def prep_images(
    images: Sequence[np.ndarray],
    target_size: int,
    max_size: int,
    device: torch.device | str,
    stride: int | None = None,
) -> tuple[Tensor, list[float], Tensor]:
    """Images for testing: one scale each, padded to a common size.

    Args:
        images: N arrays (H, W, 3) uint8 BGR.
        target_size, max_size: TEST.SCALE and TEST.MAX_SIZE.
        stride: the padded size is a multiple of it; by default as the config says.

    Returns:
        data (N, 3, Hp, Wp) float32 on device, N scales, and im_info (N, 3) float32 on device:
        padded height, padded width (of the whole batch), scale.
    """
    pixels, places = pack_images(images)
    rows, blob_size = test_table(places, target_size, max_size, stride)
    table = upload(rows, torch.float64, device)
    data = test_blob(pixels.to(device, non_blocking=True), table, blob_size)
    return data, [row[TABLE_INFO][2] for row in rows], table[:, TABLE_INFO].float()


# Columns of the table of test_table().
TABLE_META, TABLE_INFO, TABLE_MEANS = slice(0, 9), slice(9, 12), slice(12, 15)


def test_table(
    places: Sequence[Placed], target_size: int, max_size: int, stride: int | None = None
) -> tuple[list[list[float]], tuple[int, int]]:
    """All that the device must know of packed images for testing, one row an image: the row of
    ops.image_batch()'s meta, im_info, the BGR means; and the padded size of the batch.

    Arguments as for `prep_images`.
    """
    stride = coarsest_stride() if stride is None else stride
    sizes = [(place.height, place.width) for place in places]
    scales = [get_target_scale(*size, target_size, max_size) for size in sizes]
    scaled = [scaled_size(*size, scale) for size, scale in zip(sizes, scales, strict=True)]
    blob_size = padded_size(scaled, stride)
    means = np.ravel(cfg.PIXEL_MEANS).tolist()
    rows = [
        [*image_meta(p.offset, p.height, p.width, p.flip, size, (0, 0), scale), *blob_size, scale]
        for p, size, scale in zip(places, scaled, scales, strict=True)
    ]
    return [row + means for row in rows], blob_size


def test_blob(pixels: Tensor, table: Tensor, blob_size: tuple[int, int]) -> Tensor:
    """Network input (N, 3, *blob_size) of packed pixels (B,) uint8 and what test_table() gives of
    them, as a float64 tensor beside the pixels."""
    return images_to_blob(pixels, table[:, TABLE_META], blob_size, table[0, TABLE_MEANS])
