"""Generalized R-CNN: backbone, RPN, and heads, assembled from the config."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

import ops
import utils.blob as blob_utils
import utils.fpn as fpn_utils
from core.config import cfg
from core.errors import UserError
from modeling import (
    fast_rcnn_heads,
    keypoint_rcnn_heads,
    mask_rcnn_heads,
    retinanet_heads,
    rfcn_heads,
    rpn_heads,
)
from modeling.generate_proposals import Proposals
from roi_data.fast_rcnn import RoIPool, SampledRoIs, roi_pool_of, sample_rois
from roi_data.keypoint_rcnn import keypoint_targets
from roi_data.mask_rcnn import GroundTruthMasks, mask_targets
from roi_data.rpn import rpn_targets

# Six published keypoint configs name the box head by its old module.
MODULE_ALIASES = {"head_builder": "fast_rcnn_heads"}


def get_func(name: str) -> Callable:
    """The class or function that a config names as `file.Name` in `lib/modeling/`.

    Raises:
        UserError: when there is no such file or name.
    """
    module_name, _, attribute = name.rpartition(".")
    module_name = MODULE_ALIASES.get(module_name, module_name)
    try:
        return getattr(importlib.import_module(f"modeling.{module_name}"), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the config names {name!r}, but lib/modeling has no such file and class: use "
            "'file.ClassName', as in 'FPN.fpn_ResNet50_conv5_body'"
        ) from error


class Generalized_RCNN(nn.Module):
    """Fast, Faster, Mask and Keypoint R-CNN, an RPN alone or RetinaNet, with or without a feature
    pyramid, as the config says.

    Train mode: `model(**batch)` for a batch of `roi_data.loader` returns `{'losses': {...},
    'metrics': {...}}`, all scalars on the model's device; the forward does not wait for the
    device. Eval mode: `model(data, im_info)` returns `rois` (R, 5) in network-input pixels,
    `cls_score` (R, C) probabilities, `bbox_pred` (R, 4C) deltas and `blob_conv`; with
    MODEL.RPN_ONLY `rois` and `rpn_roi_probs` (R,). `propose()` gives the proposals by image.
    With RETINANET.RETINANET_ON the fields of `retinanet_heads.Candidates`.
    With `padded=True` `rois` are equally many of each image, empty slots with batch index -1, and
    the forward does not wait for the device.
    A model without an RPN (MODEL.FASTER_RCNN False) trains from the batch's `proposals` and is
    tested as `model(data, im_info, rois=...)`.

    Raises:
        UserError: the config asks for what is not there, or ImageNet weights are missing.
    """

    def __init__(self) -> None:
        super().__init__()
        means = torch.as_tensor(cfg.PIXEL_MEANS, dtype=torch.float64).reshape(3)
        self.register_buffer("pixel_means", means, persistent=False)
        self.Conv_Body = get_func(cfg.MODEL.CONV_BODY)()
        dim_in, scale = self.Conv_Body.dim_out, self.Conv_Body.spatial_scale
        if cfg.MODEL.FASTER_RCNN or cfg.MODEL.RPN_ONLY:
            self.RPN = rpn_heads.generic_rpn_outputs(dim_in, scale)
        self.roi_levels = None
        # Maps (fine to coarse) that the RPN and the RoI heads use: all of them without a pyramid.
        self.rpn_maps = self.roi_maps = slice(None)
        if cfg.FPN.FPN_ON:
            finest = self.Conv_Body.min_level
            levels = (finest, finest)  # the finest alone, unless MULTILEVEL_RPN
            if cfg.FPN.MULTILEVEL_RPN:
                levels = (cfg.FPN.RPN_MIN_LEVEL, cfg.FPN.RPN_MAX_LEVEL)
            self.rpn_maps = slice(levels[0] - finest, levels[1] - finest + 1)
        if cfg.RETINANET.RETINANET_ON:
            self.RetinaNet_Outs = retinanet_heads.fpn_retinanet_outputs(dim_in)
        elif not cfg.MODEL.RPN_ONLY:
            self._add_roi_heads(dim_in, scale)
        if cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS:
            from utils.imagenet_weights import load_pretrained_imagenet_weights

            load_pretrained_imagenet_weights(self)
        if cfg.TRAIN.FREEZE_CONV_BODY:
            for parameter in self.Conv_Body.parameters():
                parameter.requires_grad = False

    def _add_roi_heads(self, dim_in: int, scale: list[float] | float) -> None:
        """Heads on RoIs pooled from maps of dim_in channels; scale: each map's, coarse to fine."""
        if cfg.FPN.FPN_ON and not cfg.FPN.MULTILEVEL_ROIS:
            scale = scale[-1]
        elif cfg.FPN.FPN_ON:
            finest = self.Conv_Body.min_level
            self.roi_levels = (cfg.FPN.ROI_MIN_LEVEL, cfg.FPN.ROI_MAX_LEVEL)
            self.roi_maps = slice(self.roi_levels[0] - finest, self.roi_levels[1] - finest + 1)
            scale = scale[::-1][self.roi_maps][::-1]
        if cfg.MODEL.TYPE.endswith("rfcn"):
            self.Box_Head = rfcn_heads.rfcn_head(dim_in, self.roi_feature_transform, scale)
            self.Box_Outs = rfcn_heads.rfcn_outputs()
        else:
            self.Box_Head = get_func(cfg.FAST_RCNN.ROI_BOX_HEAD)(
                dim_in, self.roi_feature_transform, scale
            )
            self.Box_Outs = fast_rcnn_heads.fast_rcnn_outputs(self.Box_Head.dim_out)
        if cfg.MODEL.MASK_ON:
            self.Mask_Head = get_func(cfg.MRCNN.ROI_MASK_HEAD)(
                dim_in, self.roi_feature_transform, scale
            )
            if cfg.MODEL.SHARE_RES5:
                self.Mask_Head.share_res5_module(self.Box_Head.res5)
            self.Mask_Outs = mask_rcnn_heads.mask_rcnn_outputs(self.Mask_Head.dim_out)
        if cfg.MODEL.KEYPOINTS_ON:
            self.Keypoint_Head = get_func(cfg.KRCNN.ROI_KEYPOINTS_HEAD)(
                dim_in, self.roi_feature_transform, scale
            )
            self.Keypoint_Outs = keypoint_rcnn_heads.keypoint_outputs(self.Keypoint_Head.dim_out)

    @property
    def detectron_weight_mapping(self) -> tuple[dict[str, str | None], list[str]]:
        """Parameter name -> blob name (None: nothing to load), and blobs that go unused."""
        mapping: dict[str, str | None] = {}
        orphans: list[str] = []
        for name, child in self.named_children():
            child_mapping, child_orphans = child.detectron_weight_mapping()
            mapping.update({f"{name}.{key}": blob for key, blob in child_mapping.items()})
            orphans.extend(child_orphans)
        return mapping, orphans

    def forward(self, data: Tensor, im_info: Tensor, **inputs) -> dict:
        if self.training:
            return self._forward_train(data, im_info, **inputs)
        return self._forward_test(data, im_info, **inputs)

    def _forward_test(
        self, data: Tensor, im_info: Tensor, rois: Tensor | None = None, padded: bool = False
    ) -> dict:
        features = self._features(data)
        if cfg.RETINANET.RETINANET_ON:
            logits, deltas = self.RetinaNet_Outs.predict(features[self.rpn_maps])
            return self.RetinaNet_Outs.candidates(logits, deltas)._asdict()
        if rois is None:
            proposals = self._proposals(features, im_info)
            rois = _as_rois(proposals.boxes, proposals.valid)
            if not padded:
                rois = rois[proposals.valid.flatten()]
            if cfg.MODEL.RPN_ONLY:
                return {"rois": rois, "rpn_roi_probs": proposals.scores[proposals.valid]}
        blob_conv = self._roi_maps(features)
        cls_score, bbox_pred = self.Box_Outs(self.Box_Head(blob_conv, {"rois": rois}))
        return {
            "rois": rois,
            "cls_score": cls_score,
            "bbox_pred": bbox_pred,
            "blob_conv": blob_conv,
        }

    def _forward_train(
        self,
        data: Tensor,
        im_info: Tensor,
        *,
        im_meta: Tensor,
        blob_size: tuple[int, int],
        gt_boxes: Tensor,
        gt_classes: Tensor,
        gt_crowd: Tensor,
        gt_keypoints: Tensor | None = None,
        proposals: Tensor | None = None,
        proposals_valid: Tensor | None = None,
        image_ids: list | None = None,
        **gt_masks: Tensor,
    ) -> dict:
        data = blob_utils.images_to_blob(data, im_meta, blob_size, self.pixel_means)
        features = self._features(data)
        scale = im_info[:, 2].view(-1, 1, 1)
        gt_own = (gt_classes > 0) & ~gt_crowd
        if cfg.RETINANET.RETINANET_ON:
            return self.RetinaNet_Outs.training_outputs(
                features[self.rpn_maps], gt_boxes * scale, gt_classes, gt_own, im_info
            )
        losses: dict[str, Tensor] = {}
        from_files = not (cfg.MODEL.FASTER_RCNN or cfg.MODEL.RPN_ONLY)
        if not from_files:
            rpn_features = features[self.rpn_maps]
            targets = rpn_targets(
                torch.cat(self.RPN.anchors(rpn_features)),
                gt_boxes * scale,
                gt_own,
                im_info,
                positive_overlap=cfg.TRAIN.RPN_POSITIVE_OVERLAP,
                negative_overlap=cfg.TRAIN.RPN_NEGATIVE_OVERLAP,
                batch_size=cfg.TRAIN.RPN_BATCH_SIZE_PER_IM,
                fg_fraction=cfg.TRAIN.RPN_FG_FRACTION,
                straddle_thresh=cfg.TRAIN.RPN_STRADDLE_THRESH,
            )
            losses |= self.RPN.losses(rpn_features, targets)
            if cfg.MODEL.RPN_ONLY:
                return {"losses": losses, "metrics": {}}
            with torch.no_grad():
                found = self._proposals(features, im_info)
            proposals, proposals_valid = found.boxes * (1.0 / scale), found.valid
        elif proposals is None:  # the files have none for any of the images
            proposals, proposals_valid = gt_boxes[:, :0], gt_own[:, :0]
        # Matching is done in the original image's frame, pooling in the network's.
        pool = roi_pool_of(proposals, proposals_valid, gt_boxes, gt_classes, gt_crowd)
        sampled = sample_rois(
            pool,
            gt_boxes,
            batch_size=cfg.TRAIN.BATCH_SIZE_PER_IM,
            fg_fraction=cfg.TRAIN.FG_FRACTION,
            fg_thresh=cfg.TRAIN.FG_THRESH,
            bg_thresh_hi=cfg.TRAIN.BG_THRESH_HI,
            bg_thresh_lo=cfg.TRAIN.BG_THRESH_LO,
            bbox_thresh=cfg.TRAIN.BBOX_THRESH,
            bbox_reg_weights=cfg.MODEL.BBOX_REG_WEIGHTS,
            # Detectron regresses file proposals to objects only, not to crowd regions.
            regress_to=gt_own if from_files else None,
        )
        rois = _as_rois(sampled.boxes * scale, sampled.valid)
        blob_conv = self._roi_maps(features)
        box_feat = self.Box_Head(blob_conv, {"rois": rois})
        res5_feat = None
        if cfg.MODEL.SHARE_RES5:
            box_feat, res5_feat = box_feat
        losses["loss_cls"], losses["loss_bbox"], accuracy = fast_rcnn_heads.fast_rcnn_losses(
            *self.Box_Outs(box_feat),
            sampled.labels.flatten(),
            sampled.valid.flatten(),
            sampled.bbox_targets.flatten(0, 1),
            sampled.regressed.flatten(),
        )
        if cfg.MODEL.MASK_ON:
            masks = GroundTruthMasks(**gt_masks)
            losses["loss_mask"] = self._mask_loss(
                blob_conv, res5_feat, sampled, scale, gt_boxes, gt_own, masks
            )
        if cfg.MODEL.KEYPOINTS_ON:
            losses["loss_kps"] = self._keypoint_loss(blob_conv, pool, scale, gt_keypoints)
        return {"losses": losses, "metrics": {"accuracy_cls": accuracy}}

    def _mask_loss(
        self,
        blob_conv: list[Tensor] | Tensor,
        res5_feat: Tensor | None,
        sampled: SampledRoIs,
        scale: Tensor,
        gt_boxes: Tensor,
        gt_own: Tensor,
        masks: GroundTruthMasks,
    ) -> Tensor:
        # Foreground comes first among an image's slots and fills at most its quota of them.
        slots = _foreground_quota()
        boxes, foreground = sampled.boxes[:, :slots], sampled.foreground[:, :slots]
        targets, valid = mask_targets(
            boxes, foreground, gt_boxes, gt_own, masks, cfg.MRCNN.RESOLUTION
        )
        if res5_feat is not None:
            per_image = res5_feat.view(len(boxes), -1, *res5_feat.shape[1:])
            features = self.Mask_Head.upsample(per_image[:, :slots].flatten(0, 1))
        else:
            rois = _as_rois(boxes * scale, foreground)
            features = self.Mask_Head(blob_conv, {"mask_rois": rois})
        labels = sampled.labels[:, :slots].flatten()
        logits = self.Mask_Outs.of_class(features, labels)
        return mask_rcnn_heads.mask_rcnn_loss(logits, targets, valid, cfg.MRCNN.WEIGHT_LOSS_MASK)

    def _keypoint_loss(
        self,
        blob_conv: list[Tensor] | Tensor,
        pool: RoIPool,
        scale: Tensor,
        gt_keypoints: Tensor,
    ) -> Tensor:
        targets = keypoint_targets(
            pool.boxes,
            pool.max_overlap,
            pool.gt_index,
            gt_keypoints,
            fg_thresh=cfg.TRAIN.FG_THRESH,
            max_rois=_foreground_quota(),
            heatmap_size=cfg.KRCNN.HEATMAP_SIZE,
        )
        rois = _as_rois(targets.boxes * scale, targets.valid)
        features = self.Keypoint_Head(blob_conv, {"keypoint_rois": rois})
        normalizer = None
        if not cfg.KRCNN.NORMALIZE_BY_VISIBLE_KEYPOINTS:
            images, _, num_keypoints = gt_keypoints.shape[:3]
            normalizer = float(
                images * cfg.TRAIN.BATCH_SIZE_PER_IM * cfg.TRAIN.FG_FRACTION * num_keypoints
            )
        return keypoint_rcnn_heads.keypoint_loss(
            self.Keypoint_Outs(features),
            targets.bins.flatten(0, 1),
            targets.weights.flatten(0, 1),
            normalizer,
            cfg.KRCNN.LOSS_WEIGHT,
        )

    @torch.no_grad()
    def propose(self, data: Tensor, im_info: Tensor) -> Proposals:
        """Proposals of the RPN, image by image; what RPN_ONLY models are for.

        Args:
            data: (N, 3, H, W) float32, im_info: (N, 3), as utils.blob.prep_images gives them.

        Returns:
            boxes (N, K, 4) in network-input pixels, scores (N, K) float32, by descending score; an
            image's unused slots have score -1 (`valid` tells). In eval mode K is at most
            TEST.RPN_POST_NMS_TOP_N, levels being joined after their own NMS without a second one.
        """
        return self._proposals(self._features(data), im_info)

    def _proposals(self, features: list[Tensor], im_info: Tensor) -> Proposals:
        logits, deltas = self.RPN.predict(features[self.rpn_maps])
        return self.RPN.propose(logits, deltas, im_info)

    def _features(self, data: Tensor) -> list[Tensor]:
        """Backbone maps, fine to coarse."""
        maps = self.Conv_Body(data)
        return maps[::-1] if isinstance(maps, list) else [maps]

    def _roi_maps(self, features: list[Tensor]) -> list[Tensor] | Tensor:
        """The maps that RoIs are pooled from: coarse to fine, or one map without a pyramid."""
        if self.roi_levels is None:
            return features[0]
        return features[self.roi_maps][::-1]

    @torch.no_grad()
    def convbody_net(self, data: Tensor) -> list[Tensor] | Tensor:
        """`blob_conv` of images data (N, 3, H, W): what mask_net() pools from."""
        return self._roi_maps(self._features(data))

    @torch.no_grad()
    def mask_net(
        self,
        blob_conv: list[Tensor] | Tensor,
        rpn_blob: dict[str, Tensor],
        labels: Tensor | None = None,
    ) -> Tensor:
        """Mask probabilities (R, C, M, M) of `rpn_blob['mask_rois']` (R, 5); with labels (R,)
        int64 only those of each RoI's class, (R, M, M)."""
        features = self.Mask_Head(blob_conv, rpn_blob)
        return self.Mask_Outs(features) if labels is None else self.Mask_Outs(features, labels)

    @torch.no_grad()
    def keypoint_net(self, blob_conv: list[Tensor] | Tensor, rpn_blob: dict[str, Tensor]) -> Tensor:
        """Heat-map logits (R, K, S, S) of `rpn_blob['keypoint_rois']` (R, 5)."""
        return self.Keypoint_Outs(self.Keypoint_Head(blob_conv, rpn_blob))

    def roi_feature_transform(
        self,
        blobs_in: list[Tensor] | Tensor,
        rpn_ret: dict[str, Tensor],
        blob_rois: str = "rois",
        method: str = "RoIAlign",
        resolution: int = 7,
        spatial_scale: list[float] | float = 1.0 / 16.0,
        sampling_ratio: int = 0,
    ) -> Tensor:
        """Pool RoIs to a fixed size; with a pyramid each from the level of its size.

        Args:
            blobs_in: maps (N, C, H, W), coarse to fine, or one map.
            rpn_ret: holds the RoIs (R, 5) under the name blob_rois; a negative batch index
                marks an empty slot, whose features are 0.
            method: RoIAlign, RoIPoolF, RoICrop (with cfg.CROP_RESIZE_WITH_MAX_POOL) or PSRoIPool
                (every cell from channels of its own: C is divided by resolution squared).
            spatial_scale: of each map, in their order.
            sampling_ratio: of RoIAlign.

        Returns:
            (R, C, resolution, resolution), in the order of the RoIs.

        Raises:
            UserError: an unknown method.
        """
        rois = rpn_ret[blob_rois]
        levels = None
        if not isinstance(blobs_in, Tensor):
            low, high = self.roi_levels
            levels = fpn_utils.map_rois_to_fpn_levels(
                rois[:, 1:], low, high, cfg.FPN.ROI_CANONICAL_SCALE, cfg.FPN.ROI_CANONICAL_LEVEL
            )
            levels = high - levels  # index of the level's map: blobs_in runs from coarse to fine
        if method == "RoIAlign":
            return ops.roi_align(
                blobs_in, rois, resolution, spatial_scale, sampling_ratio, levels=levels
            )
        if method == "RoIPoolF":
            return ops.roi_pool(blobs_in, rois, resolution, spatial_scale, levels)
        if method == "RoICrop":
            max_pool = cfg.CROP_RESIZE_WITH_MAX_POOL
            return ops.roi_crop(blobs_in, rois, resolution, spatial_scale, levels, max_pool)
        if method == "PSRoIPool":
            return ops.ps_roi_pool(blobs_in, rois, resolution, spatial_scale, levels)
        raise UserError(f"ROI_XFORM_METHOD {method!r} is not RoIAlign, RoIPoolF or RoICrop")


def _foreground_quota() -> int:
    """Most foreground RoIs of an image in training."""
    return round(cfg.TRAIN.FG_FRACTION * cfg.TRAIN.BATCH_SIZE_PER_IM)


def _as_rois(boxes: Tensor, valid: Tensor) -> Tensor:
    """Boxes (N, K, 4) of N images as RoIs (N * K, 5); empty slots get batch index -1."""
    index = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype).view(-1, 1)
    index = torch.where(valid, index, -1.0)
    return torch.cat([index.unsqueeze(-1), boxes], dim=-1).flatten(0, 1)
