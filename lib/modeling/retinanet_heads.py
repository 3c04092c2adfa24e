"""RetinaNet: dense class and box predictions on every level of a pyramid, without RoIs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nn as mynn
import ops
import utils.boxes as box_utils
from core.config import cfg
from modeling.blobs import layer_blobs
from modeling.generate_anchors import anchor_field, generate_anchors
from roi_data.retinanet import RetinaNetTargets, retinanet_targets


class Candidates(NamedTuple):
    """The best predictions of N images, K slots each, before non-maximum suppression.

    Attributes:
        boxes: (N, K, 4) float32, network-input pixels, not clipped.
        scores: (N, K) float32 probabilities; -1 in empty slots.
        classes: (N, K) int64, 1 .. NUM_CLASSES - 1.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor


def retinanet_anchors(stride: int) -> Tensor:
    """Cell anchors (A, 4) float32 of the level with this stride; RETINANET.ASPECT_RATIOS vary
    fastest, then the SCALES_PER_OCTAVE sizes from ANCHOR_SCALE strides on."""
    octaves, ratios = cfg.RETINANET.SCALES_PER_OCTAVE, cfg.RETINANET.ASPECT_RATIOS
    sizes = [stride * cfg.RETINANET.ANCHOR_SCALE * 2 ** (o / octaves) for o in range(octaves)]
    by_ratio = torch.from_numpy(generate_anchors(stride, sizes, ratios))
    by_size = by_ratio.view(len(ratios), octaves, 4).transpose(0, 1)
    return by_size.reshape(-1, 4).float()


class fpn_retinanet_outputs(nn.Module):
    """Two towers of 3x3 convolutions with predictors, shared by all levels (RetinaNet, figure 3).

    Attributes:
        levels: of the pyramid, fine to coarse; features are expected in this order.
        num_classes: logits an anchor: NUM_CLASSES with RETINANET.SOFTMAX, else one less.
    """

    def __init__(self, dim_in: int) -> None:
        super().__init__()
        options = cfg.RETINANET
        self.levels = range(cfg.FPN.RPN_MIN_LEVEL, cfg.FPN.RPN_MAX_LEVEL + 1)
        for level in self.levels:
            # A buffer follows the model to its device; made anew there it would have to be copied.
            cells = retinanet_anchors(2**level)
            self.register_buffer(f"cell_anchors_fpn{level}", cells, persistent=False)
        self.num_anchors = options.SCALES_PER_OCTAVE * len(options.ASPECT_RATIOS)
        self.softmax = options.SOFTMAX
        self.num_classes = cfg.MODEL.NUM_CLASSES - (0 if self.softmax else 1)
        self.box_slots = cfg.MODEL.NUM_CLASSES - 1 if options.CLASS_SPECIFIC_BBOX else 1
        self.cls_tower = _tower(dim_in, options.NUM_CONVS)
        self.cls_pred = _conv(dim_in, self.num_anchors * self.num_classes)
        self.bbox_tower = None
        if not options.SHARE_CLS_BBOX_TOWER:
            self.bbox_tower = _tower(dim_in, options.NUM_CONVS)
        self.bbox_pred = _conv(dim_in, self.num_anchors * 4 * self.box_slots)
        self._init_prior(options.PRIOR_PROB)

    def _init_prior(self, prob: float) -> None:
        """Start from a low probability of foreground, or the background's sum drowns the rest."""
        bias = self.cls_pred.bias.data
        if self.softmax:
            background = bias.view(self.num_anchors, self.num_classes)[:, 0]
            background.fill_(math.log((self.num_classes - 1) * (1 - prob) / prob))
        else:
            bias.fill_(-math.log((1 - prob) / prob))

    def detectron_weight_mapping(self) -> tuple[dict[str, str], list[str]]:
        suffix = f"_fpn{self.levels[0]}"
        mapping = layer_blobs("cls_pred", f"retnet_cls_pred{suffix}")
        mapping |= layer_blobs("bbox_pred", f"retnet_bbox_pred{suffix}")
        for kind, tower in (("cls", self.cls_tower), ("bbox", self.bbox_tower or ())):
            for i in range(len(tower)):
                mapping |= layer_blobs(f"{kind}_tower.{i}", f"retnet_{kind}_conv_n{i}{suffix}")
        return mapping, []

    def predict(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits (N, A * C, H, W), channel a * C + c, and deltas (N, A * S * 4, H, W), channel
        (a * S + s) * 4 + j with one slot s or one a class, of each level."""
        logits, deltas = [], []
        for x in features:
            hidden = _apply_tower(self.cls_tower, x)
            logits.append(mynn.conv_norm(self.cls_pred, None, hidden))
            if self.bbox_tower is not None:
                hidden = _apply_tower(self.bbox_tower, x)
            deltas.append(mynn.conv_norm(self.bbox_pred, None, hidden))
        return logits, deltas

    def anchors(self, maps: list[Tensor]) -> list[Tensor]:
        """Anchors (H * W * A, 4) of each level's map (N, ?, H, W), the anchor varying fastest."""
        return [
            anchor_field(getattr(self, f"cell_anchors_fpn{level}"), 2**level, *x.shape[-2:])
            for level, x in zip(self.levels, maps, strict=True)
        ]

    def training_outputs(
        self,
        features: list[Tensor],
        gt_boxes: Tensor,
        gt_classes: Tensor,
        gt_valid: Tensor,
        im_info: Tensor,
    ) -> dict[str, dict[str, Tensor]]:
        """`losses` and `metrics` of a mini-batch; arguments as for `retinanet_targets`."""
        logits, deltas = self.predict(features)
        targets = retinanet_targets(
            torch.cat(self.anchors(logits)),
            gt_boxes,
            gt_classes,
            gt_valid,
            im_info,
            positive_overlap=cfg.RETINANET.POSITIVE_OVERLAP,
            negative_overlap=cfg.RETINANET.NEGATIVE_OVERLAP,
            num_classes=cfg.MODEL.NUM_CLASSES,
        )
        metrics = {"retnet_fg_num": targets.fg_num, "retnet_bg_num": targets.bg_num}
        return {"losses": self.losses(logits, deltas, targets), "metrics": metrics}

    def losses(
        self, logits: list[Tensor], deltas: list[Tensor], targets: RetinaNetTargets
    ) -> dict[str, Tensor]:
        """`retnet_loss_bbox_fpn*` and `fl_fpn*` (focal loss), one pair a level.

        All are sums divided by the number of foreground anchors on all levels together.

        Args:
            logits, deltas: as predict() gives them.
            targets: of all levels side by side.
        """
        options = cfg.RETINANET
        focal_loss = mynn.softmax_focal_loss if self.softmax else ops.sigmoid_focal_loss
        normalizer = targets.fg_num.clamp(min=1)
        losses, start = {}, 0
        for level, level_logits, level_deltas in zip(self.levels, logits, deltas, strict=True):
            num_images, _, height, width = level_logits.shape
            end = start + height * width * self.num_anchors
            labels, bbox_targets = targets.labels[:, start:end], targets.bbox_targets[:, start:end]
            start = end
            box = self._box_loss(level_deltas, labels, bbox_targets)
            losses[f"retnet_loss_bbox_fpn{level}"] = options.BBOX_REG_WEIGHT * box / normalizer
            maps = labels.reshape(num_images, height, width, -1).permute(0, 3, 1, 2)
            focal = focal_loss(level_logits, maps, options.LOSS_ALPHA, options.LOSS_GAMMA)
            losses[f"fl_fpn{level}"] = focal / normalizer
        return losses

    def _box_loss(self, deltas: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """Summed smooth L1 of a level's foreground (labels (N, B), targets (N, B, 4))."""
        pred = deltas.permute(0, 2, 3, 1).reshape(*labels.shape, self.box_slots, 4)
        own = (labels - 1).clamp(min=0) if self.box_slots > 1 else torch.zeros_like(labels)
        pred = pred.gather(2, own[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)
        smooth = F.smooth_l1_loss(
            pred.float(), targets, beta=cfg.RETINANET.BBOX_REG_BETA, reduction="none"
        )
        return torch.where(labels.unsqueeze(-1) > 0, smooth, 0.0).sum()

    @torch.no_grad()
    def candidates(self, logits: list[Tensor], deltas: list[Tensor]) -> Candidates:
        """The RETINANET.PRE_NMS_TOP_N best (anchor, class) pairs of each level, decoded.

        Levels stand side by side. A pair must score more than INFERENCE_TH, on the coarsest level
        more than 0. Arguments as predict() gives them.
        """
        per_level = []
        for i, (x, d, anchors) in enumerate(zip(logits, deltas, self.anchors(logits), strict=True)):
            thresh = cfg.RETINANET.INFERENCE_TH if i < len(self.levels) - 1 else 0.0
            per_level.append(self._level_candidates(x, d, anchors, thresh))
        return Candidates(*(torch.cat(parts, dim=1) for parts in zip(*per_level, strict=True)))

    def _level_candidates(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, thresh: float
    ) -> Candidates:
        values, cells = logits, logits.shape[2] * logits.shape[3]
        if self.softmax:
            probabilities = logits.float().unflatten(1, (self.num_anchors, -1)).softmax(dim=2)
            values = probabilities[:, :, 1:]
        values = values.flatten(1)
        count = min(cfg.RETINANET.PRE_NMS_TOP_N, values.shape[1])
        best, index = values.topk(count, dim=1)
        scores = best.float() if self.softmax else best.float().sigmoid()
        channel, cell = index // cells, index % cells
        classes = cfg.MODEL.NUM_CLASSES - 1
        anchor, label = channel // classes, channel % classes
        boxes = anchors[cell * self.num_anchors + anchor]
        if cfg.TEST.BBOX_REG:
            slot = anchor if self.box_slots == 1 else channel
            coordinate = torch.arange(4, device=slot.device)
            place = (slot.unsqueeze(-1) * 4 + coordinate) * cells + cell.unsqueeze(-1)
            chosen = deltas.flatten(1).gather(1, place.flatten(1)).view(*slot.shape, 4)
            boxes = box_utils.bbox_transform(boxes, chosen.float(), clip=cfg.BBOX_XFORM_CLIP)
        return Candidates(boxes, torch.where(scores > thresh, scores, -1.0), label + 1)


def _conv(dim_in: int, dim_out: int) -> nn.Conv2d:
    conv = nn.Conv2d(dim_in, dim_out, 3, padding=1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


def _tower(dim: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(_conv(dim, dim) for _ in range(count))


def _apply_tower(tower: nn.ModuleList, x: Tensor) -> Tensor:
    for conv in tower:
        x = mynn.conv_norm(conv, None, x, relu=True)
    return x
