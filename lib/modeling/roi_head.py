"""What all RoI heads share: pooling their RoIs as their group of the config asks."""

from __future__ import annotations

from torch import Tensor, nn


class RoIHead(nn.Module):
    """RoI pooling in front of a subclass's layers.

    Args:
        roi_xform_func: `Generalized_RCNN.roi_feature_transform`, or one like it.
        spatial_scale: of the maps, as roi_xform_func takes it.
        options: config group with ROI_XFORM_METHOD, _RESOLUTION and _SAMPLING_RATIO.
        blob_rois: name of the head's RoIs (R, 5) in `rpn_ret`.
    """

    def __init__(self, roi_xform_func, spatial_scale, options, blob_rois: str) -> None:
        super().__init__()
        self.roi_xform = roi_xform_func
        self.spatial_scale = spatial_scale
        self.pooling = {
            "blob_rois": blob_rois,
            "method": options.ROI_XFORM_METHOD,
            "resolution": options.ROI_XFORM_RESOLUTION,
            "sampling_ratio": options.ROI_XFORM_SAMPLING_RATIO,
        }

    def pool(self, x, rpn_ret: dict[str, Tensor]) -> Tensor:
        """Features (R, C, resolution, resolution) of the head's RoIs from the maps x."""
        return self.roi_xform(x, rpn_ret, spatial_scale=self.spatial_scale, **self.pooling)
