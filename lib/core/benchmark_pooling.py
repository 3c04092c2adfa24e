"""The other RoI poolings on a single map, and what thins out detections, for `benchmark.py ops`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor

import ops
from core.benchmark import Row, Timing, measure
from core.benchmark_roi_align import LAYOUTS

STRIDE, CELLS, SETS = 16, 7, 4


def pooling_rows(
    device: torch.device,
    images: int,
    channels: int,
    size: tuple[int, int],
    half: torch.dtype,
    draw_rois: Callable[[int], Tensor],
    count: int,
) -> Iterator[Row]:
    """RoIPoolF, RoICrop and position-sensitive pooling: forward, and forward with backward.

    In float32 NCHW and in `half` channels_last. Where torchvision does not know `half`, its time in
    float32 stands for it.

    Args:
        size: (height, width) of the network's input in pixels; draw_rois: (count,) -> (count, 5).
    """
    scale = 1 / STRIDE
    sets = [draw_rois(count) for _ in range(SETS)]
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
    layouts = ((torch.float32, "NCHW"), (half, "channels_last"))
    compared: dict[str, dict[str, Timing]] = {}
    for (name, depth, ours, peer), (dtype, layout) in itertools.product(cases, layouts):
        shape = (images, depth, -(-size[0] // STRIDE), -(-size[1] // STRIDE))
        features = [
            torch.randn(shape, dtype=dtype, device=device)
            .contiguous(memory_format=LAYOUTS[layout])
            .requires_grad_()
            for _ in range(2)
        ]
        grad = torch.randn_like(ours(features[0], sets[0]))
        known = peer is not None and _knows(peer, dtype, device)
        theirs = [rois.to(dtype) for rois in sets]  # torchvision wants RoIs in the maps' type

        def forward(
            pool: Callable, rois: list[Tensor], i: int, features: list[Tensor] = features
        ) -> Tensor:
            with torch.no_grad():
                return pool(features[i % 2], rois[i % SETS])

        def both(
            pool: Callable,
            rois: list[Tensor],
            i: int,
            features: list[Tensor] = features,
            grad: Tensor = grad,
        ) -> object:
            out = pool(features[i % 2], rois[i % SETS])
            return torch.autograd.grad(out, features[i % 2], grad)

        kind = f"{str(dtype).removeprefix('torch.')} {layout}"
        case = f"{count:,} at {CELLS} x {CELLS}, {depth} channels, {kind}"
        for what, run in (("forward", forward), ("fwd+bwd", both)):
            timings = compared.setdefault(f"{name} {what}", {})
            if known:
                timing = measure(functools.partial(run, peer, theirs), device)
                timings.clear()
                timings[f"torchvision {kind}"] = timing
            timing = measure(functools.partial(run, ours, sets), device)
            yield Row(f"{name} {what}", case, timing, dict(timings))


def _knows(peer: Callable, dtype: torch.dtype, device: torch.device) -> bool:
    channels = CELLS**2
    try:
        peer(
            torch.zeros(1, channels, 4, 4, dtype=dtype, device=device),
            torch.zeros(1, 5, dtype=dtype, device=device),
        )
    except RuntimeError:  # '"..." not implemented for 'BFloat16''
        return False
    return True


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
