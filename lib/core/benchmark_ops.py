"""What `tools/benchmark.py ops` measures: the compiled operators beside torchvision's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

import ops
from core.benchmark import Row, measure
from core.benchmark_group_norm import group_norm_rows
from core.benchmark_pooling import pooling_rows, thinning_rows
from core.benchmark_roi_align import roi_align_rows

NMS_THRESH = 0.7


@dataclass
class OpSizes:
    """How large the inputs are."""

    images: int  # a batch
    height: int
    width: int
    channels: int
    pooled: tuple[tuple[int, int], ...]  # (RoIs, cells a side)
    dtypes: tuple[torch.dtype, ...]
    nms: tuple[int, ...]
    nms_problems: tuple[int, int]  # (problems, boxes of each)
    mask_rois: int
    pasted: int


FULL = OpSizes(
    images=16,
    height=800,
    width=1216,
    channels=256,
    pooled=((8192, 7), (2048, 14)),
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
    nms=(2_000, 12_000, 100_000),
    nms_problems=(16 * 5, 2_000),
    mask_rois=2048,
    pasted=100,
)
# For processors: torchvision knows no half types there.
SMALL = OpSizes(
    images=2,
    height=320,
    width=480,
    channels=64,
    pooled=((256, 7), (64, 14)),
    dtypes=(torch.float32,),
    nms=(2_000, 12_000),
    nms_problems=(2 * 5, 1_000),
    mask_rois=512,
    pasted=50,
)


def draw_boxes(
    count: int, objects: int, height: int, width: int, rng: np.random.Generator
) -> np.ndarray:
    """(count, 4) float32 boxes as proposals are: crowding around objects, mostly small.

    Sizes (geometric mean of the sides) of the objects are log-normal about 90 pixels.
    """
    centre = rng.uniform(0, [width, height], (objects, 2))
    size = np.exp(rng.normal(np.log(90), 0.9, (objects, 1)))
    stretch = np.exp(rng.normal(0, 0.35, (objects, 1)))
    side = np.clip(size * np.concatenate([stretch, 1 / stretch], 1), 8, max(height, width))
    owner = rng.integers(objects, size=count)
    centre = centre[owner] + 0.15 * side[owner] * rng.normal(size=(count, 2))
    half = 0.5 * side[owner] * np.exp(0.2 * rng.normal(size=(count, 2)))
    boxes = np.concatenate([centre - half, centre + half], 1)
    return boxes.clip(0, [width - 1, height - 1] * 2).astype(np.float32)


def ops_rows(device: torch.device, sizes: OpSizes) -> Iterator[Row]:
    """Measure every operator; yields each row when it is there."""
    rng = np.random.default_rng(0)

    def draw_rois(count: int) -> Tensor:
        each = [
            draw_boxes(len(rows), 40, sizes.height, sizes.width, rng)
            for rows in np.array_split(np.arange(count), sizes.images)
        ]
        image = np.repeat(np.arange(sizes.images), [len(boxes) for boxes in each])
        rois = np.concatenate([image[:, None], np.concatenate(each)], 1)
        return torch.from_numpy(rois.astype(np.float32)).to(device)

    maps = [(-(-sizes.height // s), -(-sizes.width // s)) for s in (4, 8, 16, 32)]
    shape = (sizes.images, sizes.channels)
    yield from roi_align_rows(device, shape, maps, sizes.pooled, sizes.dtypes, draw_rois)
    yield from pooling_rows(
        device,
        sizes.images,
        sizes.channels,
        (sizes.height, sizes.width),
        sizes.dtypes[-1],
        draw_rois,
        sizes.pooled[1][0],
    )
    rois, side = sizes.pooled[1]
    norm_shapes = [(*shape, *maps[0]), (rois, sizes.channels, side, side)]
    yield from group_norm_rows(device, norm_shapes, sizes.dtypes[-1])
    yield from nms_rows(device, sizes, rng)
    yield mask_target_row(device, sizes, rng)
    yield image_row(device, sizes, rng)
    yield paste_row(device, sizes, rng)


def rotate(make: Callable[[], object], sets: int = 4) -> Callable[[int], object]:
    """Several inputs by turns, so that none is still in a cache when it comes again."""
    made = [make() for _ in range(sets)]
    return lambda i: made[i % sets]


def nms_rows(device: torch.device, sizes: OpSizes, rng: np.random.Generator) -> Iterator[Row]:
    def draw(count: int) -> tuple[Tensor, Tensor]:
        boxes = draw_boxes(count, max(1, count // 30), sizes.height, sizes.width, rng)
        scores = rng.permutation(count).astype(np.float32) / count
        return torch.from_numpy(boxes).to(device), torch.from_numpy(scores).to(device)

    def compare(count: int) -> Row:
        inputs = rotate(lambda: draw(count))
        ours = measure(lambda i: ops.nms(*inputs(i), NMS_THRESH), device)
        peer = measure(lambda i: torchvision.ops.nms(*inputs(i), NMS_THRESH), device)
        return Row("nms", f"{count:,} boxes", ours, {"torchvision": peer})

    yield from map(compare, sizes.nms)

    problems, count = sizes.nms_problems
    problem = torch.arange(problems, device=device).repeat_interleave(count)
    valid = torch.ones(problems, count, dtype=torch.bool, device=device)

    def draw_problems() -> tuple[Tensor, Tensor]:
        drawn = [draw(count) for _ in range(problems)]
        return torch.stack([d[0] for d in drawn]), torch.stack([d[1] for d in drawn])

    def best_first(boxes: Tensor, scores: Tensor) -> Tensor:
        order = scores.argsort(dim=1, descending=True)
        return boxes.gather(1, order[:, :, None].expand(-1, -1, 4))

    inputs = rotate(draw_problems)
    in_order = rotate(lambda: best_first(*draw_problems()))
    peer = measure(
        lambda i: torchvision.ops.batched_nms(
            inputs(i)[0].view(-1, 4), inputs(i)[1].view(-1), problem, NMS_THRESH
        ),
        device,
    )
    ours = measure(lambda i: ops.batched_nms(in_order(i), valid, NMS_THRESH, count), device)
    name = f"{problems} x {count:,} boxes"
    yield Row("batched_nms", name, ours, {"torchvision": peer}, note="boxes come in score order")
    ours = measure(
        lambda i: ops.batched_nms(best_first(*inputs(i)), valid, NMS_THRESH, count), device
    )
    yield Row("batched_nms + sort", name, ours, {"torchvision": peer})
    yield from thinning_rows(device, problems, count // 2, draw)


def mask_target_row(device: torch.device, sizes: OpSizes, rng: np.random.Generator) -> Row:
    """Seven objects an image, of one or two polygons of 10 to 60 points."""
    objects = 7 * sizes.images
    resolution = 28

    def draw() -> tuple[Tensor, ...]:
        boxes = draw_boxes(objects, objects, sizes.height, sizes.width, rng)
        points, counts, polygons = [], [0], [0]
        for x1, y1, x2, y2 in boxes:
            for _ in range(rng.integers(1, 3)):
                n = rng.integers(10, 60)
                angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
                radius = rng.uniform(0.6, 1.0, n)
                ring = np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None]
                points.append((ring + 1) / 2 * [x2 - x1, y2 - y1] + [x1, y1])
                counts.append(counts[-1] + n)
            polygons.append(len(counts) - 1)
        index = rng.integers(objects, size=sizes.mask_rois)
        rois = boxes[index] + rng.normal(0, 5, (len(index), 4)).astype(np.float32)
        coords = np.concatenate(points).astype(np.float32)
        arrays = (coords, np.array(counts), np.array(polygons), rois, index)
        return tuple(torch.from_numpy(array).to(device) for array in arrays)

    inputs = rotate(draw)
    ours = measure(lambda i: ops.polygons_to_masks(*inputs(i), resolution), device)
    case = f"{sizes.mask_rois:,} RoIs, {resolution} x {resolution}"
    return Row("polygons_to_masks", case, ours)


def image_row(device: torch.device, sizes: OpSizes, rng: np.random.Generator) -> Row:
    scale = 1.25
    height, width = int(sizes.height / scale), int(sizes.width / scale)
    pixels = sizes.images * height * width * 3
    meta = torch.tensor(
        [
            [k * height * width * 3, height, width, k % 2, sizes.height, sizes.width, 0, 0]
            + [1 / scale]
            for k in range(sizes.images)
        ],
        dtype=torch.float64,
        device=device,
    )
    means = torch.tensor([102.9801, 115.9465, 122.7717], dtype=torch.float64, device=device)
    inputs = rotate(
        lambda: torch.from_numpy(rng.integers(256, size=pixels, dtype=np.uint8)).to(device)
    )
    ours = measure(
        lambda i: ops.image_batch(inputs(i), meta, sizes.height, sizes.width, means), device
    )
    case = f"{sizes.images} of {height} x {width} to {sizes.height} x {sizes.width}"
    written = 4 * 3 * sizes.images * sizes.height * sizes.width
    return Row("image_batch", case, ours, floor_bytes=pixels + written)


def paste_row(device: torch.device, sizes: OpSizes, rng: np.random.Generator) -> Row:
    resolution, height, width = 28, int(0.6 * sizes.height), int(0.6 * sizes.width)

    def draw() -> tuple[Tensor, Tensor]:
        masks = rng.random((sizes.pasted, resolution, resolution), dtype=np.float32)
        boxes = draw_boxes(sizes.pasted, sizes.pasted, height, width, rng)
        smooth = torch.from_numpy(masks)[:, None]
        smooth = torch.nn.functional.avg_pool2d(smooth, 7, 1, 3)[:, 0] * 4 - 1.5
        return smooth.to(device), torch.from_numpy(boxes).to(device)

    inputs = rotate(draw)
    ours = measure(lambda i: ops.masks_to_rles(*inputs(i), height, width, 0.5), device)

    def peer(i: int) -> Tensor:
        masks, boxes = inputs(i)
        return paste_masks_in_image(masks[:, None], boxes, (height, width)) > 0.5

    return Row(
        "paste_masks",
        f"{sizes.pasted} in {height} x {width}",
        ours,
        {"torchvision, not encoded": measure(peer, device)},
        note="gives COCO RLEs on the host; torchvision's planes stay on the device",
    )
