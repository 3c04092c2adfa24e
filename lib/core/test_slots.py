"""Detections in a fixed number of slots an image: images to masks without a look at the device.

What usually happens at test time: a model that makes its own proposals, no augmentation, class-wise
NMS. Shapes depend only on those of the input, so that the whole can be recorded as a CUDA graph.
Where the slots do not suffice, the report says so, and `core.test` does the batch again without
them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from core.config import cfg
from core.detections import Detections, queue_point
from core.suppression import class_nms_in_slots
from core.test_forward import (
    ImageBatch,
    Shown,
    as_rois,
    heatmaps,
    own_mask_probabilities,
    plain_view,
    read_output,
)
from modeling.model_builder import Generalized_RCNN
from utils.cuda_graphs import CudaGraphs

# Candidates (proposal, class) an image above TEST.SCORE_THRESH. Trained models have some hundred.
CANDIDATES = 4096
TOO_MANY = -1


class _Parts(NamedTuple):
    """What recordings of a model read. Nothing here keeps the model, which its parts refer to."""

    tensors: list[dict[str, Tensor | None]]  # its modules' dictionaries of them
    modules: weakref.WeakSet[nn.Module]  # itself and those that it consists of
    parents: list[weakref.ref[nn.Module]]  # those of them that consist of others
    number: int  # of modules
    ids: list[int]  # of all tensors and parts


_graphs: weakref.WeakKeyDictionary[nn.Module, tuple[CudaGraphs, _Parts]] = (
    weakref.WeakKeyDictionary()
)


class Slots(NamedTuple):
    """Detections of N images in L slots each, those in use first, ordered by class."""

    report: Tensor  # (N, 1 + 6L) float32: number or TOO_MANY; then [x1, y1, x2, y2, score, class]
    classes: Tensor  # (N, L) int64
    masks: Tensor | None  # (N, L, M, M) float32 probabilities of the detection's own class
    heatmaps: Tensor | None  # (N, L, K, S, S) float32 keypoint logits

    def of_image(
        self,
        index: int,
        number: int,
        size: tuple[int, int],
        report: Tensor,
        ready: torch.cuda.Event | None,
    ) -> Detections:
        """The `number` detections of an image of this height and width.

        report: on the host; ready: when all is there.
        """
        rows, on_host = (x[index, 1:].view(-1, 6)[:number] for x in (self.report, report))
        classes = self.classes[index, :number]
        masks, heats = (None if x is None else x[index, :number] for x in self[2:])
        found = rows[:, :4], rows[:, 4], classes, masks, heats
        return Detections(*found, *size, ready, on_host.numpy())


def fits_in_slots(net: nn.Module) -> bool:
    """Whether the config asks for nothing of `net` that needs another number of slots."""
    test = cfg.TEST
    extras = test.BBOX_AUG, test.MASK_AUG, test.KPS_AUG, test.SOFT_NMS, test.BBOX_VOTE
    return (
        isinstance(net, Generalized_RCNN)
        and cfg.MODEL.FASTER_RCNN
        and not cfg.RETINANET.RETINANET_ON
        and test.DETECTIONS_PER_IM > 0
        and test.SCORE_THRESH >= 0
        and not any(extra.ENABLED for extra in extras)
    )


def queue_in_slots(
    net: nn.Module, batch: ImageBatch, without: Callable[[], list[Detections]]
) -> Callable[[], list[Detections]]:
    """Queue a batch on the device; what is returned waits for the detections.

    without: gives them where the slots do not suffice.
    """
    (shown,) = batch.show([plain_view()])
    detect = partial(detect_in_slots, net)
    if batch.device.type == "cuda" and cfg.MODEL.CUDA_GRAPHS:
        key = net.training, *_settings()
        slots = Slots(*graphs_of(net)(detect, (shown.data, shown.table), key))
    else:
        slots = detect(shown.data, shown.table)
    report = slots.report.to("cpu", non_blocking=True)
    ready = queue_point(batch.device)

    def wait() -> list[Detections]:
        if ready is not None:
            ready.synchronize()
        numbers = report[:, 0].int().tolist()
        if TOO_MANY in numbers:
            return without()
        return [
            slots.of_image(i, number, size, report, ready)
            for i, (number, size) in enumerate(zip(numbers, batch.sizes, strict=True))
        ]

    return wait


def graphs_of(net: nn.Module) -> CudaGraphs:
    """The recordings of a model's calls; new ones once a tensor or a part of it was replaced."""
    graphs, parts = _graphs.get(net, (None, None))
    if graphs is None or not _unchanged(parts):
        graphs = CudaGraphs([*net.parameters(), *net.buffers()])
        _graphs[net] = graphs, _parts_of(net)
    return graphs


def _parts_of(net: nn.Module) -> _Parts:
    modules = [*net.modules()]
    tensors = [place for m in modules for place in (m._parameters, m._buffers) if place]
    parents = [weakref.ref(module) for module in modules if module._modules]
    return _Parts(tensors, weakref.WeakSet(modules), parents, len(modules), _ids(tensors, parents))


def _unchanged(parts: _Parts) -> bool:
    # While all modules live no other has the id of one. The recordings keep the tensors alive.
    alive = len(parts.modules) == parts.number
    return alive and _ids(parts.tensors, parts.parents) == parts.ids


def _ids(
    tensors: list[dict[str, Tensor | None]], parents: list[weakref.ref[nn.Module]]
) -> list[int]:
    places: list[dict[str, Any]] = [*tensors, *(parent()._modules for parent in parents)]
    return [*map(id, chain.from_iterable(map(dict.values, places)))]


def forget_graphs(net: nn.Module) -> None:
    """Give the memory of a model's recordings back; the next test makes new ones."""
    _graphs.pop(net, None)


def _settings() -> tuple:
    """What `detect_in_slots` reads of the config and might be changed after a model is built."""
    return (
        plain_view(),
        cfg.TEST.SCORE_THRESH,
        cfg.TEST.NMS,
        cfg.TEST.DETECTIONS_PER_IM,
        cfg.TEST.BBOX_REG,
        CANDIDATES,
    )


def detect_in_slots(net: nn.Module, data: Tensor, table: Tensor) -> Slots:
    """Detections of a batch of the plain view; data and table as of `test_forward.Shown`."""
    shown = Shown([], data, table)
    out = net(data, shown.im_info, padded=True)
    output = read_output(plain_view(), shown, out)
    images, classes = len(data), output.scores.shape[1] - 1
    wanted = output.scores[:, 1:] > cfg.TEST.SCORE_THRESH
    wanted &= (output.image >= 0)[:, None]
    place, used, found = first_of_each_row(wanted.view(images, -1), CANDIDATES)
    row = place // classes
    cls = place % classes + 1
    scores = output.scores[row, cls]
    boxes = output.boxes_of(row.flatten(), cls.flatten()).view(*cls.shape, 4)
    slot, kept, tied = class_nms_in_slots(
        boxes,
        scores,
        cls,
        used,
        nms_thresh=cfg.TEST.NMS,
        limit=cfg.TEST.DETECTIONS_PER_IM,
    )
    boxes = boxes.gather(1, slot.unsqueeze(-1).expand(-1, -1, 4))
    scores, cls = scores.gather(1, slot), cls.gather(1, slot)
    number = torch.where((found > CANDIDATES) | tied, TOO_MANY, kept.sum(dim=1))
    rows = torch.cat([boxes, scores.unsqueeze(-1), cls.unsqueeze(-1)], dim=-1)
    report = torch.cat([number[:, None], rows.flatten(1)], dim=1)

    image = torch.arange(images, device=data.device)[:, None].expand_as(slot)
    rois = as_rois(boxes.flatten(0, 1), image.flatten(), shown.scales)
    index = torch.where(kept.view(-1, 1), rois[:, :1], -1.0)
    rois = torch.cat([index, rois[:, 1:]], dim=1)
    masks = heats = None
    if cfg.MODEL.MASK_ON:
        masks = own_mask_probabilities(net, out["blob_conv"], rois, cls.flatten())
        masks = masks.unflatten(0, slot.shape)
    if cfg.MODEL.KEYPOINTS_ON:
        heats = heatmaps(net, out["blob_conv"], rois).unflatten(0, slot.shape)
    return Slots(report, cls, masks, heats)


def first_of_each_row(wanted: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the first `most` true values of each row are.

    Args:
        wanted: (N, M) bool.

    Returns:
        place: (N, S) int64 ascending indices into the flattened `wanted`, S = min(most, M); any
            where a row has fewer.
        used: (N, S) bool, which of them are meant.
        found: (N,) int64, true values of each row.
    """
    before = wanted.flatten().cumsum(0, dtype=torch.int32)
    ends = before.view(wanted.shape)[:, -1]
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    number = torch.arange(
        1, min(most, wanted.shape[1]) + 1, dtype=torch.int32, device=wanted.device
    )
    found = ends - starts
    place = torch.searchsorted(before, starts[:, None] + number)
    return place.clamp(max=len(before) - 1), number <= found[:, None], found.long()
