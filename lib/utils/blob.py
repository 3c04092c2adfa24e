"""Images to network input, on the model's device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import ops
from core.config import cfg


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


def pack_images(images: Sequence[np.ndarray]) -> tuple[Tensor, list[Placed]]:
    """Images (H, W, 3) uint8 back to back: (B,) uint8 on the CPU, and where each is."""
    offsets = np.cumsum([0] + [im.size for im in images]).tolist()
    places = [Placed(o, *im.shape[:2]) for o, im in zip(offsets, images, strict=False)]
    return torch.from_numpy(np.concatenate([im.reshape(-1) for im in images])), places


def prep_images(
    images: Sequence[np.ndarray],
    target_size: int,
    max_size: int,
    device: torch.device | str,
    stride: int | None = None,
) -> tuple[Tensor, list[float], Tensor]:
    """Images for testing, N arrays (H, W, 3) uint8 BGR; the rest as for `prep_packed`."""
    return prep_packed(*pack_images(images), target_size, max_size, device, stride)


def prep_packed(
    pixels: Tensor,
    places: Sequence[Placed],
    target_size: int,
    max_size: int,
    device: torch.device | str,
    stride: int | None = None,
) -> tuple[Tensor, list[float], Tensor]:
    """Packed images for testing: one scale each, padded to a common size.

    Args:
        pixels: (B,) uint8, anywhere; places: where each of N images is in it.
        target_size, max_size: TEST.SCALE and TEST.MAX_SIZE.
        stride: the padded size is a multiple of it; by default as the config says.

    Returns:
        data (N, 3, Hp, Wp) float32 on device, N scales, and im_info (N, 3) float32 on device:
        padded height, padded width (of the whole batch), scale.
    """
    stride = coarsest_stride() if stride is None else stride
    sizes = [(place.height, place.width) for place in places]
    scales = [get_target_scale(*size, target_size, max_size) for size in sizes]
    scaled = [scaled_size(*size, scale) for size, scale in zip(sizes, scales, strict=True)]
    blob_size = padded_size(scaled, stride)
    meta = [
        image_meta(place.offset, place.height, place.width, place.flip, size, (0, 0), scale)
        for place, size, scale in zip(places, scaled, scales, strict=True)
    ]
    data = images_to_blob(
        pixels.to(device, non_blocking=True),
        torch.tensor(meta, dtype=torch.float64).to(device, non_blocking=True),
        blob_size,
        torch.as_tensor(cfg.PIXEL_MEANS, dtype=torch.float64).reshape(3).to(device),
    )
    im_info = torch.tensor([[*blob_size, s] for s in scales], dtype=torch.float32)
    return data, scales, im_info.to(device, non_blocking=True)
