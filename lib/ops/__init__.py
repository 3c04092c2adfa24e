"""The compiled operators, one a file; each runs on CPU and CUDA with the same results."""

from .anchor_windows import anchor_windows
from .box_voting import SCORING_METHODS as VOTING_METHODS
from .box_voting import box_voting
from .conv_act import conv_act
from .group_norm import group_norm
from .image_batch import image_batch
from .match_anchors import AnchorMatches, match_anchors
from .max_pool import max_pool
from .nms import batched_nms, nms
from .paste_masks import masks_to_rles, paste_masks
from .polygons_to_masks import polygons_to_masks
from .ps_roi_pool import ps_roi_pool
from .roi_align import roi_align
from .roi_crop import roi_crop
from .roi_pool import roi_pool
from .sample_anchors import sample_anchors
from .sigmoid_focal_loss import sigmoid_focal_loss
from .soft_nms import METHODS as SOFT_NMS_METHODS
from .soft_nms import batched_soft_nms, soft_nms
from .upsample_add import upsample_add

__all__ = [
    "AnchorMatches",
    "SOFT_NMS_METHODS",
    "VOTING_METHODS",
    "anchor_windows",
    "batched_nms",
    "batched_soft_nms",
    "box_voting",
    "conv_act",
    "group_norm",
    "image_batch",
    "masks_to_rles",
    "match_anchors",
    "max_pool",
    "nms",
    "paste_masks",
    "polygons_to_masks",
    "ps_roi_pool",
    "roi_align",
    "roi_crop",
    "roi_pool",
    "sample_anchors",
    "sigmoid_focal_loss",
    "soft_nms",
    "upsample_add",
]
