"""A whole training step on a small made-up batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

TINY = """
MODEL: {TYPE: generalized_rcnn, CONV_BODY: FPN.fpn_ResNet50_conv5_body, FASTER_RCNN: True,
        MASK_ON: True, NUM_CLASSES: 4, LOAD_IMAGENET_PRETRAINED_WEIGHTS: False}
RESNETS: {USE_GN: True, FREEZE_AT: 0, WIDTH_PER_GROUP: 8, STEM_OUT_CHANNELS: 8, STRIDE_1X1: False,
          RES2_OUT_CHANNELS: 16, TRANS_FUNC: bottleneck_gn_transformation,
          STEM_FUNC: basic_gn_stem, SHORTCUT_FUNC: basic_gn_shortcut}
GROUP_NORM: {NUM_GROUPS: 4}
FPN: {FPN_ON: True, MULTILEVEL_ROIS: True, MULTILEVEL_RPN: True, USE_GN: True, DIM: 16}
FAST_RCNN: {ROI_BOX_HEAD: fast_rcnn_heads.roi_2mlp_head, ROI_XFORM_METHOD: RoIAlign,
            ROI_XFORM_RESOLUTION: 7, ROI_XFORM_SAMPLING_RATIO: 2, MLP_HEAD_DIM: 32}
MRCNN: {ROI_MASK_HEAD: mask_rcnn_heads.mask_rcnn_fcn_head_v1up, RESOLUTION: 28, DILATION: 1,
        ROI_XFORM_RESOLUTION: 14, ROI_XFORM_SAMPLING_RATIO: 2, DIM_REDUCED: 16,
        CONV_INIT: MSRAFill}
TRAIN: {BATCH_SIZE_PER_IM: 32, RPN_PRE_NMS_TOP_N: 200, RPN_POST_NMS_TOP_N: 100}
"""
C4 = {
    "MODEL.CONV_BODY": "ResNet.ResNet50_conv4_body",
    "FPN.FPN_ON": False,
    "FPN.MULTILEVEL_ROIS": False,
    "FPN.MULTILEVEL_RPN": False,
    "FAST_RCNN.ROI_BOX_HEAD": "ResNet.ResNet_roi_conv5_head",
    "FAST_RCNN.ROI_XFORM_RESOLUTION": 14,
    "MRCNN.ROI_MASK_HEAD": "mask_rcnn_heads.mask_rcnn_fcn_head_v0upshare",
    "MRCNN.RESOLUTION": 14,
}


@pytest.fixture
def build(cfg, tmp_path):
    from core.config import assert_and_infer_cfg, merge_cfg_from_file, merge_cfg_from_list

    def build(options: dict | None = None):
        from modeling.model_builder import Generalized_RCNN

        (tmp_path / "tiny.yaml").write_text(TINY)
        merge_cfg_from_file(str(tmp_path / "tiny.yaml"))
        merge_cfg_from_list([x for pair in (options or {}).items() for x in pair])
        assert_and_infer_cfg()
        torch.manual_seed(0)
        return Generalized_RCNN().train()

    return build


def make_batch(objects: int = 2, slots: int = 8, blob_size=(128, 160)) -> dict:
    """Two noise images of 100 x 120 at scale 1.25, each with `objects` square objects.

    The last object of an image is a crowd region, the one before it has no mask.
    """
    rng = np.random.RandomState(0)
    n, h, w, scale = 2, 100, 120, 1.25
    boxes, classes = np.zeros((n, slots, 4), np.float32), np.zeros((n, slots), np.int64)
    has_mask = np.zeros((n, slots), bool)
    coords, poly_offsets, object_offsets = [], [0], [0]
    for i in range(n):
        for g in range(slots):
            if g < objects:
                x, y, side = rng.randint(0, 60), rng.randint(0, 50), rng.randint(20, 48)
                boxes[i, g], classes[i, g] = (x, y, x + side, y + side), 1 + g % 3
                if g == 0 or g < objects - 2:
                    coords += [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]
                    poly_offsets.append(len(coords))
                    has_mask[i, g] = True
            object_offsets.append(len(poly_offsets) - 1)
    crowd = np.zeros((n, slots), bool)
    crowd[:, objects - 1] = objects > 1
    pixels = rng.randint(0, 256, n * h * w * 3).astype(np.uint8)
    meta = [[i * h * w * 3, h, w, i % 2, 125, 150, 0, 0, 1 / scale] for i in range(n)]
    batch = {
        "data": pixels,
        "im_meta": np.array(meta, np.float64),
        "im_info": np.array([[125, 150, scale]] * n, np.float32),
        "gt_boxes": boxes,
        "gt_classes": classes,
        "gt_crowd": crowd,
        "gt_poly_coords": np.array(coords, np.float32).reshape(-1, 2),
        "gt_poly_offsets": np.array(poly_offsets),
        "gt_object_offsets": np.array(object_offsets),
        "gt_poly_boxes": boxes * has_mask[..., None],
        "gt_has_mask": has_mask,
        "gt_bitmasks": np.zeros((0, 1, 1), np.uint8),
        "gt_bitmask_index": np.full((n, slots), -1),
    }
    return {k: torch.from_numpy(v) for k, v in batch.items()} | {"blob_size": blob_size}


def to(batch: dict, device: str) -> dict:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


LEVELS = [f"_fpn{k}" for k in range(2, 7)]
# The RPN and the RoI heads need not use the same levels.
RPN_COARSER = {"FPN.RPN_MIN_LEVEL": 3, "FPN.RPN_MAX_LEVEL": 5}
ROIS_COARSER = {"FPN.ROI_MIN_LEVEL": 3, "FPN.ROI_MAX_LEVEL": 4}


@pytest.mark.parametrize(
    "options,levels",
    [({}, LEVELS), (C4, [""]), (RPN_COARSER, LEVELS[1:4]), (ROIS_COARSER, LEVELS)],
    ids=["FPN", "C4", "RPN_COARSER", "ROIS_COARSER"],
)
def test_a_step_gives_every_loss_and_every_gradient(options, levels, build):
    model = build(options)
    out = model(**make_batch(objects=4))
    names = {f"loss_rpn_{kind}{level}" for kind in ("cls", "bbox") for level in levels}
    assert set(out["losses"]) == names | {"loss_cls", "loss_bbox", "loss_mask"}
    assert set(out["metrics"]) == {"accuracy_cls"}
    assert all(torch.isfinite(loss) for loss in out["losses"].values())
    assert out["losses"]["loss_mask"] > 0
    sum(out["losses"].values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_padding_of_the_ground_truth_changes_nothing(build):
    model = build()
    losses = []
    for slots in (8, 16):
        torch.manual_seed(7)
        batch = make_batch(slots=slots)
        # Draws depend on the shape of the pool: leave nothing to draw.
        out = model(**batch)["losses"]
        losses.append(sum(v.item() for k, v in out.items() if k.startswith("loss_rpn")))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_batch_without_objects_trains_on_background(build):
    model = build()
    out = model(**make_batch(objects=0))
    total = sum(out["losses"].values())
    assert torch.isfinite(total)
    assert out["losses"]["loss_bbox"] == 0 and out["losses"]["loss_mask"] == 0
    total.backward()


@pytest.mark.parametrize("method", ["RoIAlign", "RoIPoolF", "RoICrop"])
@pytest.mark.parametrize("options", [{}, C4], ids=["FPN", "C4"])
def test_learning_lowers_the_loss(options, method, build):
    methods = {f"{head}.ROI_XFORM_METHOD": method for head in ("FAST_RCNN", "MRCNN")}
    model = build(options | methods)
    batch = make_batch(objects=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history = []
    for _ in range(15):
        loss = sum(model(**batch)["losses"].values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert np.mean(history[-3:]) < 0.7 * np.mean(history[:3])


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, C4], ids=["FPN", "C4"])
def test_the_forward_never_waits_for_the_gpu(options, build):
    model = build(options).cuda()
    batch = to(make_batch(objects=4), "cuda")
    model(**batch)  # libraries load
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = model(**batch)
        total = sum(out["losses"].values())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    total.backward()
    assert torch.isfinite(total)


@pytest.mark.gpu
def test_gpu_and_cpu_agree_where_nothing_is_drawn(build):
    """Maps, RPN predictions and proposals: the parts of a step without randomness."""
    torch.backends.cudnn.allow_tf32 = False
    model, batch = build().eval(), make_batch()
    results = []
    for device in ("cpu", "cuda"):
        model, moved = model.to(device), to(batch, device)
        import utils.blob as blob_utils

        data = blob_utils.images_to_blob(
            moved["data"], moved["im_meta"], moved["blob_size"], model.pixel_means
        )
        with torch.no_grad():
            out = model(data, moved["im_info"])
        results.append((data.cpu(), out["rois"].cpu(), out["cls_score"].cpu()))
    torch.backends.cudnn.allow_tf32 = True
    (data, rois, scores), (data_gpu, rois_gpu, scores_gpu) = results
    torch.testing.assert_close(data_gpu, data, atol=1e-3, rtol=0)
    assert len(rois) == len(rois_gpu)
    torch.testing.assert_close(rois_gpu[:50], rois[:50], atol=2e-2, rtol=0)
    torch.testing.assert_close(scores_gpu[:50], scores[:50], atol=1e-4, rtol=0)
