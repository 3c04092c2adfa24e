"""The other RoI poolings on a single map, and what thins out detections, for `benchmark.py ops`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor

import ops
from core.benchmark import Row, Timing, measure

STRIDE, CELLS, SETS = 16, 7, 4


def pooling_rows(
    device: torch.device,
    images: int,
    channels: int,
    size: tuple[int, int],
    draw_rois: Callable[[int], Tensor],
    count: int,
) -> Iterator[Row]:
    """RoIPoolF, RoICrop and position-sensitive pooling, float32, forward and backward.

    Args:
        size: (height, width) of the network's input in pixels; draw_rois: (count,) -> (count, 5).
    """
    scale = 1 / STRIDE
    sets = [draw_rois(count) for _ in range(SETS)]

    def time(pool: Callable, channels: int) -> Timing:
        shape = (images, channels, -(-size[0] // STRIDE), -(-size[1] // STRIDE))
        features = [torch.randn(shape, device=device, requires_grad=True) for _ in range(2)]
        grad = torch.randn_like(pool(features[0], sets[0]))
        return measure(
            lambda i: torch.autograd.grad(
                pool(features[i % 2], sets[i % SETS]), features[i % 2], grad
            ),
            device,
        )

    shared = max(1, channels // CELLS**2) * CELLS**2  # a multiple of the cells
    peers = torchvision.ops
    cases: list[tuple[str, int, Callable, Callable | None]] = [
        (
            "roi_pool",
            channels,
            lambda f, r: ops.roi_pool(f, r, CELLS, scale),
            lambda f, r: peers.roi_pool(f, r, CELLS, scale),
        ),
        ("roi_crop", channels, lambda f, r: ops.roi_crop(f, r, CELLS, scale), None),
        (
            "ps_roi_pool",
            shared,
            lambda f, r: ops.ps_roi_pool(f, r, CELLS, scale),
            lambda f, r: peers.ps_roi_pool(f, r, CELLS, scale),
        ),
    ]
    for name, depth, ours, peer in cases:
        compared = {} if peer is None else {"torchvision": time(peer, depth)}
        case = f"{count:,} at {CELLS} x {CELLS}, {depth} channels, float32"
        yield Row(f"{name} fwd+bwd", case, time(ours, depth), compared)


def thinning_rows(
    device: torch.device, problems: int, count: int, draw: Callable[[int], tuple[Tensor, Tensor]]
) -> Iterator[Row]:
    """Soft-NMS of many problems in one call, and box voting of 100 boxes among `count`."""
    drawn = [[draw(count) for _ in range(problems)] for _ in range(SETS)]
    sets: list[Any] = [tuple(map(torch.stack, zip(*each, strict=True))) for each in drawn]
    valid = torch.ones(problems, count, dtype=torch.bool, device=device)
    timing = measure(lambda i: ops.batched_soft_nms(*sets[i % SETS], valid), device)
    yield Row("batched_soft_nms", f"{problems} x {count:,} boxes, linear", timing)
    dets = [torch.cat([boxes[0], scores[0, :, None]], 1) for boxes, scores in sets]
    timing = measure(lambda i: ops.box_voting(dets[i % SETS][:100], dets[i % SETS], 0.8), device)
    yield Row("box_voting", f"100 of {count:,} boxes", timing)
