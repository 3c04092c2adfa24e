"""Region proposal network: predictions, proposals and losses, single level and FPN."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nn as mynn
import ops
from core.config import cfg
from core.errors import UserError
from modeling import generate_proposals as gp
from modeling.blobs import layer_blobs
from modeling.generate_anchors import anchor_field, generate_anchors
from nn.group_norm import hooked
from roi_data.rpn import RPNTargets


def generic_rpn_outputs(dim_in: int, spatial_scale) -> nn.Module:
    """The RPN that the config asks for (`FPN.MULTILEVEL_RPN` or not).

    Args:
        dim_in: channels of the maps.
        spatial_scale: of the map; with a pyramid a list, coarse to fine.

    Raises:
        UserError: RPN.STRIDE is not that of the single map that the RPN runs on.
    """
    if cfg.FPN.FPN_ON and cfg.FPN.MULTILEVEL_RPN:
        return fpn_rpn_outputs(dim_in)
    finest = spatial_scale[-1] if isinstance(spatial_scale, list) else spatial_scale
    if round(1 / finest) != cfg.RPN.STRIDE:
        raise UserError(
            f"RPN.STRIDE is {cfg.RPN.STRIDE}, but the features that MODEL.CONV_BODY "
            f"{cfg.MODEL.CONV_BODY} gives the RPN have stride {round(1 / finest)}: set it to that"
        )
    return single_scale_rpn_outputs(dim_in)


class _RPN(nn.Module):
    """What both RPNs share: a 3x3 convolution and two 1x1 predictors, applied to every level.

    Subclasses set `prefix` (of the parameter names) and `blob_suffix`, and give the cell anchors
    (A, 4), stride and name (suffix of the losses' names) of each level, fine to coarse.
    """

    prefix: str
    blob_suffix: str
    multilevel: bool

    def __init__(
        self, dim_in: int, cell_anchors: list, strides: list[int], names: list[str]
    ) -> None:
        super().__init__()
        dim_out = dim_in if cfg.RPN.OUT_DIM_AS_IN_DIM else cfg.RPN.OUT_DIM
        self.strides, self.level_names = strides, names
        for name, cells in zip(names, cell_anchors, strict=True):
            # A buffer follows the model to its device; made anew there it would have to be copied.
            cells = torch.as_tensor(cells, dtype=torch.float32)
            self.register_buffer(f"cell_anchors{name}", cells, persistent=False)
        self.dim_out = dim_out
        self.softmax = cfg.RPN.CLS_ACTIVATION == "softmax"
        self.num_anchors = num_anchors = len(cell_anchors[0])
        num_scores = 2 * num_anchors if self.softmax else num_anchors
        for name, conv in (
            ("conv", nn.Conv2d(dim_in, dim_out, 3, padding=1)),
            ("cls_score", nn.Conv2d(dim_out, num_scores, 1)),
            ("bbox_pred", nn.Conv2d(dim_out, 4 * num_anchors, 1)),
        ):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
            self.add_module(f"{self.prefix}_{name}", conv)
        # Read once: FPN.RPN_COLLECT_SCALE is for training alone.
        self.collect_scale = cfg.FPN.RPN_COLLECT_SCALE
        self.modes = {True: _proposal_options(cfg.TRAIN), False: _proposal_options(cfg.TEST)}

    def detectron_weight_mapping(self) -> tuple[dict[str, str], list[str]]:
        suffix = self.blob_suffix
        mapping = layer_blobs(f"{self.prefix}_conv", f"conv_rpn{suffix}")
        mapping |= layer_blobs(f"{self.prefix}_cls_score", f"rpn_cls_logits{suffix}")
        mapping |= layer_blobs(f"{self.prefix}_bbox_pred", f"rpn_bbox_pred{suffix}")
        return mapping, []

    def predict(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits (N, A, H, W) and deltas (N, 4A, H, W) of each level."""
        conv, cls_score, bbox_pred = self._layers()
        logits, deltas = [], []
        for x in features:
            hidden = mynn.conv_norm(conv, None, x, relu=True)
            score = mynn.conv_norm(cls_score, None, hidden)
            if self.softmax:
                # A softmax of two is a sigmoid of their difference: background first, then
                # foreground.
                background, foreground = score.chunk(2, dim=1)
                score = foreground - background
            logits.append(score)
            deltas.append(mynn.conv_norm(bbox_pred, None, hidden))
        return logits, deltas

    def predict_at(self, features: list[Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        """What predict() gives at some anchors of each image, worked out for them alone.

        Only drawn anchors have a loss: the gradient of predict()'s maps is zero elsewhere.

        Args:
            index: (N, S) int64, anchors of all levels side by side.

        Returns:
            Logits (N, S) and deltas (N, S, 4), float32 (float64 for float64 features).
        """
        windows = ops.anchor_windows(features, index, self.num_anchors)
        scores, deltas = self._predict_windows(windows)
        of_cell = (index % self.num_anchors).unsqueeze(-1)
        score = scores[..., -self.num_anchors :].gather(2, of_cell).squeeze(-1)
        if self.softmax:
            score = score - scores.gather(2, of_cell).squeeze(-1)
        deltas = deltas.unflatten(2, (-1, 4))
        deltas = deltas.gather(2, of_cell.unsqueeze(-1).expand(-1, -1, -1, 4)).squeeze(2)
        wide = torch.promote_types(torch.float32, deltas.dtype)
        return score.to(wide), deltas.to(wide)

    def _predict_windows(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (N, S, A or 2A) and deltas (N, S, 4A) of the cells in the middle of windows
        (N, S, 9, C)."""
        conv, *predictors = self._layers()
        if hooked(conv, *predictors):  # some hooks make the weights: modules are called
            maps = windows.flatten(0, 1).unflatten(1, (3, 3)).permute(0, 3, 1, 2)
            hidden = F.relu(conv(maps)[:, :, 1:2, 1:2])
            found = [layer(hidden).view(*windows.shape[:2], -1) for layer in predictors]
        else:
            weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
            hidden = F.relu(F.linear(windows.flatten(2), weight, conv.bias))
            found = [F.linear(hidden, x.weight.flatten(1), x.bias) for x in predictors]
        return found[0], found[1]

    def _layers(self) -> Iterator[nn.Conv2d]:
        return (
            getattr(self, f"{self.prefix}_{name}") for name in ("conv", "cls_score", "bbox_pred")
        )

    def anchors(self, maps: list[Tensor]) -> list[Tensor]:
        """Anchors (H * W * A, 4) of each level's map (N, ?, H, W)."""
        cells = [getattr(self, f"cell_anchors{name}") for name in self.level_names]
        levels = zip(cells, self.strides, maps, strict=True)
        return [anchor_field(cell, stride, *x.shape[-2:]) for cell, stride, x in levels]

    def propose(self, logits: list[Tensor], deltas: list[Tensor], im_info: Tensor) -> gp.Proposals:
        """Proposals without gradient, limited as the mode (train or test) says."""
        options = self.modes[self.training]
        proposals = gp.generate_proposals(
            [x.detach() for x in logits],
            [x.detach() for x in deltas],
            self.anchors(logits),
            im_info,
            **options,
        )
        if not self.multilevel:
            return proposals
        if self.training:
            top_n = int(options["post_nms_top_n"] * self.collect_scale + 0.5)
            return gp.collect_over_batch(proposals, top_n)
        return gp.collect_per_image(proposals, options["post_nms_top_n"])

    def losses(self, features: list[Tensor], targets: RPNTargets) -> dict[str, Tensor]:
        """`loss_rpn_cls*` and `loss_rpn_bbox*`, one pair a level.

        Args:
            features: each level's map (N, C, H, W).
            targets: as roi_data.rpn.rpn_targets gives them.
        """
        index, used = targets.index, targets.labels >= 0
        logits, deltas = self.predict_at(features, index)
        bce = F.binary_cross_entropy_with_logits(
            logits,
            targets.labels.clamp(min=0).to(logits.dtype),
            weight=used.to(logits.dtype),
            reduction="none",
        )
        smooth = F.smooth_l1_loss(deltas, targets.bbox_targets, beta=1.0 / 9, reduction="none")
        box = smooth.sum(dim=-1) * targets.bbox_weights
        in_level = _in_level(index, [x.shape[2:].numel() * self.num_anchors for x in features])
        sums = torch.where(in_level.unsqueeze(1), torch.stack([bce, box]), 0.0).sum(dim=(2, 3))
        if self.softmax or not self.multilevel:
            cls_norm = (in_level & used).sum(dim=(1, 2)).clamp(min=1)
        else:
            cls_norm = cfg.TRAIN.RPN_BATCH_SIZE_PER_IM * len(index)
        cls, box = (sums[:, 0] / cls_norm).unbind(), (sums[:, 1] / len(index)).unbind()
        losses = {}
        for i, name in enumerate(self.level_names):
            losses[f"loss_rpn_cls{name}"] = cls[i]
            losses[f"loss_rpn_bbox{name}"] = box[i]
        return losses


def _in_level(index: Tensor, counts: list[int]) -> Tensor:
    """(L, N, S) bool: which of the anchors `index` (N, S) of all levels side by side are of each
    level, of so many anchors each."""
    ends = itertools.accumulate(counts)
    return torch.stack(
        [(index >= end - count) & (index < end) for end, count in zip(ends, counts, strict=True)]
    )


class single_scale_rpn_outputs(_RPN):
    """RPN on one feature map."""

    prefix = "RPN"
    blob_suffix = ""
    multilevel = False

    def __init__(self, dim_in: int) -> None:
        stride = cfg.RPN.STRIDE
        cells = generate_anchors(stride, cfg.RPN.SIZES, cfg.RPN.ASPECT_RATIOS)
        super().__init__(dim_in, [cells], [stride], [""])


class fpn_rpn_outputs(_RPN):
    """RPN whose convolutions are shared by all pyramid levels, one anchor size a level."""

    prefix = "FPN_RPN"
    multilevel = True

    def __init__(self, dim_in: int) -> None:
        low, high = cfg.FPN.RPN_MIN_LEVEL, cfg.FPN.RPN_MAX_LEVEL
        self.blob_suffix = f"_fpn{low}"
        strides = [2**level for level in range(low, high + 1)]
        start = cfg.FPN.RPN_ANCHOR_START_SIZE
        cells = [
            generate_anchors(stride, (start * stride // strides[0],), cfg.FPN.RPN_ASPECT_RATIOS)
            for stride in strides
        ]
        names = [f"_fpn{level}" for level in range(low, high + 1)]
        super().__init__(dim_in, cells, strides, names)


def _proposal_options(mode) -> dict:
    """Proposal limits of cfg.TRAIN or cfg.TEST."""
    return {
        "pre_nms_top_n": mode.RPN_PRE_NMS_TOP_N,
        "post_nms_top_n": mode.RPN_POST_NMS_TOP_N,
        "nms_thresh": mode.RPN_NMS_THRESH,
        "min_size": mode.RPN_MIN_SIZE,
        "xform_clip": cfg.BBOX_XFORM_CLIP,
    }
