"""The compiled operators, one a file; each runs on CPU and CUDA with the same results."""

from .image_batch import image_batch
from .nms import batched_nms, nms
from .polygons_to_masks import polygons_to_masks
from .roi_align import roi_align

__all__ = ["batched_nms", "image_batch", "nms", "polygons_to_masks", "roi_align"]
