"""RoIAlign over a feature pyramid, beside torchvision's RoIAlign called level by level."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torchvision
from torch import Tensor

import ops
from core.benchmark import Row, Timing, measure
from utils.fpn import map_rois_to_fpn_levels

SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
SAMPLING_RATIO = 2
FEATURE_SETS, ROI_SETS = 2, 4
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def roi_align_rows(
    device: torch.device,
    shape: tuple[int, int],
    maps: Sequence[tuple[int, int]],
    pooled: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype],
    draw_rois: Callable[[int], Tensor],
) -> Iterator[Row]:
    """Forward, and forward with backward, for each dtype, layout and number of RoIs.

    Args:
        shape: (images, channels); maps: (height, width) of each level, finest first.
        pooled: (RoIs, cells a side) of each case; draw_rois: (count,) -> (count, 5) float32.
        dtypes: one that torchvision does not know is compared with its results for those before.
    """
    rois = {count: [draw_rois(count) for _ in range(ROI_SETS)] for count, _ in pooled}
    peers: dict[tuple, dict[str, Timing]] = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        known = _torchvision_knows(dtype, device)
        for layout, memory_format in LAYOUTS.items():
            features = [
                _make_features(shape, maps, dtype, memory_format, device)
                for _ in range(FEATURE_SETS)
            ]
            for count, side in pooled:
                case = _Case(features, rois[count], side)
                floors = case.floor_bytes()
                for backward in (False, True):
                    ours = measure(case.call(_ours, backward), device)
                    compared = peers.setdefault((layout, count, side, backward), {})
                    if known:
                        peer = measure(case.call(_torchvision, backward), device)
                        compared[f"torchvision {name}"] = peer
                        shown = {f"torchvision {name}": peer}
                    else:
                        shown = dict(compared)
                    yield Row(
                        "roi_align fwd+bwd" if backward else "roi_align forward",
                        f"{count:,} at {side} x {side}, {name} {layout}",
                        ours,
                        shown,
                        floors[backward],
                        "" if known else f"torchvision's roi_align has no {name}",
                    )


class _Case:
    """Rotating inputs of one measurement."""

    def __init__(self, features: list[list[Tensor]], rois: list[Tensor], side: int) -> None:
        self.features, self.rois, self.side = features, rois, side
        self.levels = [map_rois_to_fpn_levels(r[:, 1:], 2, 1 + len(features[0])) - 2 for r in rois]
        first = features[0][0]
        self.channels_last = not first.is_contiguous()
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        self.grad = (
            torch.randn(len(rois[0]), first.shape[1], side, side, device=first.device)
            .to(first.dtype)
            .contiguous(memory_format=layout)
        )

    def call(self, pool: Callable, backward: bool) -> Callable[[int], object]:
        def run(i: int) -> object:
            features = self.features[i % FEATURE_SETS]
            rois, levels = self.rois[i % ROI_SETS], self.levels[i % ROI_SETS]
            if not backward:
                with torch.no_grad():
                    return pool(features, rois, levels, self.side)
            out = pool(features, rois, levels, self.side)
            return torch.autograd.grad(out, features, self.grad)

        return run

    def floor_bytes(self) -> tuple[int, int]:
        """Bytes that a forward pass, and one with its backward pass, cannot but move.

        Forward: each feature that some RoI samples is read once, the result written once. Backward:
        the result's gradient is read once, the features' gradients are written once.
        """
        first = self.features[0][0]
        sampled = sum(map(self._sampled_pixels, self.rois, self.levels)) // ROI_SETS
        pixel = first.shape[1] * first.element_size()
        maps = sum(f.nbytes for f in self.features[0])
        forward = sampled * pixel + self.grad.nbytes + self.rois[0].nbytes
        return forward, forward + self.grad.nbytes + maps

    def _sampled_pixels(self, rois: Tensor, levels: Tensor) -> int:
        """Feature pixels with a gradient."""
        maps = [f[:, :1].detach().float().contiguous().requires_grad_() for f in self.features[0]]
        out = _ours(maps, rois, levels, self.side)
        grads = torch.autograd.grad(out, maps, torch.ones_like(out))
        return sum(int(grad.count_nonzero()) for grad in grads)


def _ours(features: list[Tensor], rois: Tensor, levels: Tensor, side: int) -> Tensor:
    return ops.roi_align(features, rois, side, SCALES, SAMPLING_RATIO, levels)


def _torchvision(features: list[Tensor], rois: Tensor, levels: Tensor, side: int) -> Tensor:
    """Level by level: pick the RoIs, pool them, put the results in their places."""
    first = features[0]
    out = first.new_zeros(len(rois), first.shape[1], side, side)
    rois = rois.to(first.dtype)
    for level, (feature, scale) in enumerate(zip(features, SCALES, strict=True)):
        index = torch.where(levels == level)[0]
        out[index] = torchvision.ops.roi_align(
            feature, rois[index], side, scale, SAMPLING_RATIO, aligned=False
        )
    return out


def _torchvision_knows(dtype: torch.dtype, device: torch.device) -> bool:
    try:
        _torchvision(
            [torch.zeros(1, 1, 4, 4, dtype=dtype, device=device)] * len(SCALES),
            torch.zeros(1, 5, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            1,
        )
    except RuntimeError:  # "roi_align_forward_kernel" not implemented for 'BFloat16'
        return False
    return True


def _make_features(
    shape: tuple[int, int],
    maps: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    device: torch.device,
) -> list[Tensor]:
    return [
        torch.randn(*shape, *size, dtype=dtype, device=device)
        .contiguous(memory_format=memory_format)
        .requires_grad_()
        for size in maps
    ]
