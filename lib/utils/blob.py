"""Images to network input, on the model's device."""

from __future__ import annotations

from collections.abc import Sequence

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
    """What the padded size must be a multiple of: FPN.COARSEST_STRIDE, or 1 without FPN."""
    return int(cfg.FPN.COARSEST_STRIDE) if cfg.FPN.FPN_ON else 1


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
    stride = coarsest_stride() if stride is None else stride
    scales = [get_target_scale(*im.shape[:2], target_size, max_size) for im in images]
    sizes = [scaled_size(*im.shape[:2], s) for im, s in zip(images, scales, strict=True)]
    blob_size = padded_size(sizes, stride)
    offsets = np.cumsum([0] + [im.size for im in images])
    meta = [
        image_meta(offset, *im.shape[:2], False, size, (0, 0), scale)
        for offset, im, size, scale in zip(offsets, images, sizes, scales, strict=False)
    ]
    pixels = torch.from_numpy(np.concatenate([im.reshape(-1) for im in images]))
    data = images_to_blob(
        pixels.to(device, non_blocking=True),
        torch.tensor(meta, dtype=torch.float64).to(device, non_blocking=True),
        blob_size,
        torch.as_tensor(cfg.PIXEL_MEANS, dtype=torch.float64).reshape(3).to(device),
    )
    im_info = torch.tensor([[*blob_size, s] for s in scales], dtype=torch.float32)
    return data, scales, im_info.to(device, non_blocking=True)
