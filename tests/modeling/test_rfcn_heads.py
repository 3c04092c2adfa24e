"""R-FCN against position-sensitive pooling and voting written out."""

from __future__ import annotations

import math

import pytest
import torch
from test_train_step import make_batch

OPTIONS = {
    "MODEL.TYPE": "rfcn",
    "MODEL.CONV_BODY": "ResNet.ResNet50_conv5_body",
    "MODEL.FASTER_RCNN": True,
    "MODEL.NUM_CLASSES": 3,
    "MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS": False,
    "RESNETS.RES5_DILATION": 2,
}


@pytest.fixture
def build(cfg):
    from core.config import assert_and_infer_cfg, merge_cfg_from_list

    def build(options=None, device="cpu"):
        from modeling.model_builder import Generalized_RCNN

        merged = OPTIONS | (options or {})
        merge_cfg_from_list([x for pair in merged.items() for x in pair])
        assert_and_infer_cfg()
        torch.manual_seed(0)
        with torch.device(device):
            return Generalized_RCNN()

    return build


def half_away(x: float) -> int:
    return int(math.floor(abs(x) + 0.5)) * (1 if x >= 0 else -1)


def votes(maps, roi, scale, grid, channels):
    """Mean over the grid of the mean of each cell's own channel: (channels,) of one RoI."""
    index, x1, y1, x2, y2 = roi
    x0, y0 = half_away(x1) * scale, half_away(y1) * scale
    bin_w = max((half_away(x2) + 1) * scale - x0, 0.1) / grid
    bin_h = max((half_away(y2) + 1) * scale - y0, 0.1) / grid
    height, width = maps.shape[2:]
    out = torch.zeros(channels, dtype=torch.float64)
    for c in range(channels):
        for py in range(grid):
            for px in range(grid):
                top = min(max(math.floor(y0 + py * bin_h), 0), height)
                bottom = min(max(math.ceil(y0 + (py + 1) * bin_h), 0), height)
                left = min(max(math.floor(x0 + px * bin_w), 0), width)
                right = min(max(math.ceil(x0 + (px + 1) * bin_w), 0), width)
                cell = maps[int(index), (c * grid + py) * grid + px, top:bottom, left:right]
                out[c] += cell.double().mean() if cell.numel() else 0.0
    return out / grid**2


ROIS = torch.tensor(
    [[0.0, 3, 5, 100, 70], [1, 20.5, 0, 60, 111], [0, 0, 0, 8, 8], [1, 90, 80, 140, 130]]
)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("grid", [3, 2])
def test_scores_and_deltas_are_the_cells_votes(agnostic, grid, cfg):
    from modeling.rfcn_heads import rfcn_head, rfcn_outputs
    from ops import ps_roi_pool

    cfg.MODEL.TYPE, cfg.MODEL.NUM_CLASSES = "rfcn", 3
    cfg.MODEL.CLS_AGNOSTIC_BBOX_REG, cfg.RFCN.PS_GRID_SIZE = agnostic, grid

    def transform(x, rpn_ret, blob_rois, method, resolution, spatial_scale, sampling_ratio):
        assert method == "PSRoIPool"
        return ps_roi_pool(x, rpn_ret[blob_rois], resolution, spatial_scale)

    torch.manual_seed(0)
    head, outputs = rfcn_head(6, transform, 1 / 16), rfcn_outputs().eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 6, 7, 8)
    cls_score, bbox_pred = outputs(head(x, {"rois": ROIS}))
    slots = 2 if agnostic else 3
    assert cls_score.shape == (4, 3) and bbox_pred.shape == (4, 4 * slots)
    for r, roi in enumerate(ROIS.tolist()):
        logits = votes(head.conv_cls(x), roi, 1 / 16, grid, 3)
        deltas = votes(head.conv_bbox_pred(x), roi, 1 / 16, grid, 4 * slots)
        torch.testing.assert_close(cls_score[r].double(), logits.softmax(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(bbox_pred[r].double(), deltas, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("kind", ["rfcn", "ResNet50_rfcn"])
def test_blobs_are_detectrons(kind, agnostic, build):
    model = build({"MODEL.TYPE": kind, "MODEL.CLS_AGNOSTIC_BBOX_REG": agnostic}, device="meta")
    mapping, _ = model.detectron_weight_mapping
    shapes = {
        mapping[n]: tuple(p.shape) for n, p in model.Box_Head.state_dict(prefix="Box_Head.").items()
    }
    dim, slots = (1024 if kind != "rfcn" else 2048), (2 if agnostic else 3)
    expected = {
        "conv_cls_w": (27, dim, 1, 1),
        "conv_cls_b": (27,),
        "conv_bbox_pred_w": (36 * slots, dim, 1, 1),
        "conv_bbox_pred_b": (36 * slots,),
    }
    if kind != "rfcn":
        expected |= {"conv_dim_reduce_w": (1024, 2048, 1, 1), "conv_dim_reduce_b": (1024,)}
    assert shapes == expected
    assert model.Conv_Body.spatial_scale == 1 / 16
    assert not any(name.startswith("Box_Outs.") for name, _ in model.named_parameters())


def test_it_trains_on_proposals_from_files_without_an_rpn(cfg, build):
    narrow = {"RESNETS.WIDTH_PER_GROUP": 4, "RESNETS.RES2_OUT_CHANNELS": 8, "MODEL.NUM_CLASSES": 4}
    model = build(narrow | {"MODEL.FASTER_RCNN": False}).train()
    batch = make_batch(objects=3)
    masks = {key for key in batch if "poly" in key or "mask" in key or "object_off" in key}
    batch = {key: value for key, value in batch.items() if key not in masks}
    batch["proposals"] = batch["gt_boxes"][:, :3] + 2
    batch["proposals_valid"] = torch.ones(2, 3, dtype=torch.bool)
    losses = model(**batch)["losses"]
    assert set(losses) == {"loss_cls", "loss_bbox"}
    sum(losses.values()).backward()
    for layer in (model.Box_Head.conv_cls, model.Box_Head.conv_bbox_pred):
        assert layer.weight.grad.abs().sum() > 0


def test_the_reduction_is_rectified(build):
    head = build({"MODEL.TYPE": "ResNet50_rfcn", "RESNETS.RES2_OUT_CHANNELS": 4}).Box_Head
    x = torch.randn(1, 32, 4, 4)
    torch.nn.init.constant_(head.conv_dim_reduce.bias, -1e9)
    torch.nn.init.normal_(head.conv_cls.bias)
    out = head(x, {"rois": torch.tensor([[0.0, 0, 0, 63, 63]])})
    expected = head.conv_cls.bias.view(3, 9).mean(dim=1)  # nothing passes but the bias
    torch.testing.assert_close(out[0, :3], expected)
