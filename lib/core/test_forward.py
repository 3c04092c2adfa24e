"""Images through the network at test time: as they are, or as other views of them.

A view is an image stretched, scaled or mirrored before the network sees it. Everything that comes
back is in pixels of the image as given, on the model's device, for a whole batch of images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

import utils.blob as blob_utils
import utils.boxes as box_utils
from core.config import cfg
from core.test_proposals import run_on_proposals
from modeling.mask_rcnn_heads import mask_rcnn_outputs
from utils.device import upload


@dataclass(frozen=True)
class View:
    """How an image is shown to the network: stretched, then mirrored, then scaled."""

    scale: int  # its short side, in network pixels
    max_size: int  # its long side at most
    ratio: float = 1.0  # the width is multiplied by it
    flip: bool = False

    def width(self, width: int) -> int:
        """Width of the view of an image this wide, before scaling."""
        return int(np.round(self.ratio * width)) if self.ratio != 1 else width

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the network's input for an image of this size."""
        width = self.width(width)
        scale = blob_utils.get_target_scale(height, width, self.scale, self.max_size)
        size = blob_utils.scaled_size(height, width, scale)
        return blob_utils.padded_size([size], blob_utils.coarsest_stride())

    def from_image(self, boxes: Tensor, widths: Tensor) -> Tensor:
        """Boxes (n, 4) of images as boxes of their views; widths (n, 1) are the views'."""
        boxes = box_utils.aspect_ratio(boxes, self.ratio) if self.ratio != 1 else boxes
        return box_utils.flip_boxes(boxes, widths) if self.flip else boxes

    def to_image(self, boxes: Tensor, widths: Tensor) -> Tensor:
        """Boxes (n, 4T) of views as boxes of their images; widths (n, 1) are the views'."""
        boxes = box_utils.flip_boxes(boxes, widths) if self.flip else boxes
        return box_utils.aspect_ratio(boxes, 1.0 / self.ratio) if self.ratio != 1 else boxes


def plain_view() -> View:
    """The image as it is, at TEST.SCALE."""
    return View(cfg.TEST.SCALE, cfg.TEST.MAX_SIZE)


class Shown(NamedTuple):
    """One pass's worth of images: each a (view, index of the image in its batch)."""

    pairs: list[tuple[View, int]]
    data: Tensor  # (P, 3, H, W) float32
    table: Tensor  # (P, 17) float64: as of utils.blob.test_table, then width and height of the view

    @property
    def im_info(self) -> Tensor:
        """(P, 3) float32."""
        return self.table[:, blob_utils.TABLE_INFO].float()

    @property
    def scales(self) -> Tensor:
        """(P,) float64, network pixels per pixel of the view."""
        return self.table[:, blob_utils.TABLE_INFO][:, 2]

    @property
    def extents(self) -> Tensor:
        """(P, 2) int64 width and height of the views."""
        return self.table[:, -2:].long()


class ImageBatch:
    """Images (H, W, 3) uint8 BGR whose views go through the network together.

    packed: the same images as `blob_utils.pack_images` gives them, if that is at hand.
    proposals: (P, 4) boxes of each image, in its pixels, for the heads to look at; by default the
        network makes its own.
    """

    def __init__(
        self,
        images: Sequence[np.ndarray],
        device: torch.device,
        packed: tuple[Tensor, list[blob_utils.Placed]] | None = None,
        proposals: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.images, self.device = images, device
        self.proposals = proposals and [
            torch.as_tensor(boxes, dtype=torch.float32, device=device).view(-1, 4)
            for boxes in proposals
        ]
        self.sizes = [tuple(im.shape[:2]) for im in images]
        self._packed = {} if packed is None else {1.0: packed}
        self._extents: dict[View, Tensor] = {}

    def extents(self, view: View) -> Tensor:
        """(N, 2) int64 `[width, height]` of the views of the images, on the device."""
        if view not in self._extents:
            rows = [[view.width(width), height] for height, width in self.sizes]
            self._extents[view] = upload(rows, torch.int64, self.device)
        return self._extents[view]

    def widths(self, view: View, image: Tensor) -> Tensor:
        """(n, 1) widths of the views of images (n,)."""
        return self.extents(view)[image, :1]

    def show(self, views: Sequence[View]) -> Iterator[Shown]:
        """Every view of every image, in passes of equal padded size.

        views: of one scale, max_size and ratio. A pass holds at most twice as many images as the
        batch, and fewer where they are larger, so that it fits where the batch does.
        """
        alike: dict[tuple[int, int], list[tuple[View, int]]] = {}
        for view in views:
            for index, size in enumerate(self.sizes):
                alike.setdefault(view.padded_size(*size), []).append((view, index))
        plain = plain_view()
        pixels = sum(int(np.prod(plain.padded_size(*size))) for size in self.sizes)
        for padded, pairs in alike.items():
            most = max(1, 2 * pixels // int(np.prod(padded)))
            for start in range(0, len(pairs), most):
                yield self._pass(pairs[start : start + most])

    def _pass(self, pairs: list[tuple[View, int]]) -> Shown:
        view = pairs[0][0]
        if view.ratio not in self._packed:
            self._packed[view.ratio] = blob_utils.pack_images(
                [
                    im if view.ratio == 1 else cv2.resize(im, (view.width(w), h))
                    for im, (h, w) in zip(self.images, self.sizes, strict=True)
                ],
                pinned=self.device.type == "cuda",
            )
        pixels, places = self._packed[view.ratio]
        if pixels.device != self.device:  # every view of this ratio finds them there
            pixels = pixels.to(self.device, non_blocking=True)
            self._packed[view.ratio] = pixels, places
        places = [places[index]._replace(flip=view.flip) for view, index in pairs]
        rows, blob_size = blob_utils.test_table(places, view.scale, view.max_size)
        extents = [[view.width(self.sizes[i][1]), self.sizes[i][0]] for view, i in pairs]
        rows = [row + extent for row, extent in zip(rows, extents, strict=True)]
        table = upload(rows, torch.float64, self.device)
        return Shown(pairs, blob_utils.test_blob(pixels, table, blob_size), table)


@dataclass
class Output:
    """What the network says of one view of a batch: scored proposals before any selection."""

    view: View
    extents: Tensor  # (N, 2) int64 width and height of the view of each image
    rois: Tensor  # (R, 4) float32, pixels of the view
    image: Tensor  # (R,) int64, ascending
    scores: Tensor  # (R, C) float32 probabilities
    deltas: Tensor  # (R, 4C) float32, or (R, 8) when class-agnostic

    def boxes_of(self, row: Tensor, cls: Tensor) -> Tensor:
        """(K, 4) boxes of candidates (row, class), in pixels of the image."""
        slots = self.deltas.view(len(self.deltas), self.deltas.shape[1] // 4, 4)
        deltas = slots[row, -1] if cfg.MODEL.CLS_AGNOSTIC_BBOX_REG else slots[row, cls]
        return self._decode(self.rois[row], deltas, self.image[row])

    def all_boxes(self) -> Tensor:
        """(R, 4C) boxes of every proposal and class, in pixels of the image."""
        deltas = self.deltas
        if cfg.MODEL.CLS_AGNOSTIC_BBOX_REG or not cfg.TEST.BBOX_REG:
            deltas = deltas[:, -4:].repeat(1, self.scores.shape[1])
        return self._decode(self.rois, deltas, self.image)

    def _decode(self, rois: Tensor, deltas: Tensor, image: Tensor) -> Tensor:
        # Without TEST.BBOX_REG the proposals themselves are the boxes.
        extents = self.extents[image]
        widths = extents[:, :1]
        if not cfg.TEST.BBOX_REG:
            boxes = rois.repeat(1, deltas.shape[1] // 4)
        else:
            boxes = box_utils.bbox_transform(
                rois, deltas, cfg.MODEL.BBOX_REG_WEIGHTS, cfg.BBOX_XFORM_CLIP
            )
            limit = (extents - 1).repeat(1, deltas.shape[1] // 2).to(boxes.dtype)
            boxes = torch.minimum(boxes.clamp(min=0), limit)
        return self.view.to_image(boxes, widths)


class Features(NamedTuple):
    """Feature maps of one view of a batch, which boxes are pooled from."""

    images: ImageBatch
    blob_conv: Any  # of the images in their order
    scales: Tensor  # (N,) float64


def forward(net: nn.Module, images: ImageBatch, view: View) -> tuple[Output, Features]:
    """The network's output for one view of the images, which must be of equal padded size in
    it."""
    (shown,) = images.show([view])
    out = _run(net, images, shown)
    return read_output(view, shown, out), Features(images, out["blob_conv"], shown.scales)


def read_output(view: View, shown: Shown, out: Mapping[str, Any]) -> Output:
    """The network's output `out` for one view of all images of a batch. RoIs in empty slots
    (batch index -1) belong to image -1."""
    image, rois = _split_rois(out["rois"], shown.scales)
    scores, deltas = out["cls_score"].float(), out["bbox_pred"].float()
    return Output(view, shown.extents, rois, image, scores, deltas)


def forward_views(net: nn.Module, images: ImageBatch, views: Sequence[View]) -> list[Output]:
    """The network's outputs for views of one scale, max_size and ratio."""
    parts: dict[tuple[View, int], tuple[Tensor, ...]] = {}
    for shown in images.show(views):
        out = _run(net, images, shown)
        position, rois = _split_rois(out["rois"], shown.scales)
        counts = torch.bincount(position, minlength=len(shown.pairs)).tolist()
        values = (rois, out["cls_score"].float(), out["bbox_pred"].float())
        split = zip(*(value.split(counts) for value in values), strict=True)
        parts.update(zip(shown.pairs, split, strict=True))
    outputs = []
    for view in views:
        of_images = [parts[view, index] for index in range(len(images.sizes))]
        counts = torch.tensor([len(part[0]) for part in of_images])
        image = torch.repeat_interleave(counts).to(images.device)
        rois, scores, deltas = (torch.cat(values) for values in zip(*of_images, strict=True))
        outputs.append(Output(view, images.extents(view), rois, image, scores, deltas))
    return outputs


def _run(net: nn.Module, images: ImageBatch, shown: Shown) -> dict[str, Any]:
    """The network's output for a pass, on the images' proposals if they have been given some."""
    if images.proposals is None:
        return net(shown.data, shown.im_info)
    rois = []
    for position, (view, index) in enumerate(shown.pairs):
        boxes = images.proposals[index]
        image = torch.full((len(boxes),), index, device=boxes.device)
        seen = view.from_image(boxes, images.widths(view, image))
        rois.append(as_rois(seen, torch.full_like(image, position), shown.scales))
    return run_on_proposals(net, shown.data, shown.im_info, torch.cat(rois), cfg.DEDUP_BOXES)


def _split_rois(rois: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Position (R,) int64 in the pass and boxes (R, 4) in pixels of the view of RoIs (R, 5)."""
    position = rois[:, 0].long()
    return position, (rois[:, 1:].double() / scales[position, None]).float()


def as_rois(boxes: Tensor, image: Tensor, scales: Tensor) -> Tensor:
    """RoIs (n, 5) in network pixels of boxes (n, 4) in pixels of images (n,)."""
    scaled = (boxes.double() * scales[image, None]).float()
    return torch.cat([image[:, None].to(scaled), scaled], dim=1)


def mask_probabilities(net: nn.Module, blob_conv: Any, rois: Tensor) -> Tensor:
    """(n, K, M, M) float32 mask probabilities of RoIs (n, 5); K is 1 when class-agnostic."""
    if not len(rois):
        channels = cfg.MODEL.NUM_CLASSES if cfg.MRCNN.CLS_SPECIFIC_MASK else 1
        return rois.new_zeros(0, channels, cfg.MRCNN.RESOLUTION, cfg.MRCNN.RESOLUTION)
    return net.mask_net(blob_conv, {"mask_rois": rois}).float()


def own_mask_probabilities(net: nn.Module, blob_conv: Any, rois: Tensor, classes: Tensor) -> Tensor:
    """(n, M, M) float32 mask probabilities of RoIs (n, 5), each of its class (n,)."""
    predictor = getattr(net, "Mask_Outs", None)
    if isinstance(predictor, mask_rcnn_outputs) and len(rois):
        return net.mask_net(blob_conv, {"mask_rois": rois}, classes).float()
    return own_channel(mask_probabilities(net, blob_conv, rois), classes)  # exported


def heatmaps(net: nn.Module, blob_conv: Any, rois: Tensor) -> Tensor:
    """(n, K, S, S) float32 keypoint logits of RoIs (n, 5)."""
    if not len(rois):
        return rois.new_zeros(0, cfg.KRCNN.NUM_KEYPOINTS, *[cfg.KRCNN.HEATMAP_SIZE] * 2)
    return net.keypoint_net(blob_conv, {"keypoint_rois": rois}).float()


def own_channel(masks: Tensor, classes: Tensor) -> Tensor:
    """(n, M, M): each detection's map of its own class out of (n, K, M, M)."""
    if masks.shape[1] == 1:
        return masks[:, 0]
    return masks[torch.arange(len(masks), device=masks.device), classes]
