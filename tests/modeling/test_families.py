"""Every kind of model learns on two real photographs of people, and detects on one of them."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch

BASE = {
    "MODEL.TYPE": "generalized_rcnn",
    "MODEL.FASTER_RCNN": True,
    "MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS": False,
    "FAST_RCNN.ROI_XFORM_METHOD": "RoIAlign",
    "FAST_RCNN.ROI_XFORM_RESOLUTION": 7,
    "FAST_RCNN.MLP_HEAD_DIM": 16,
    "FAST_RCNN.CONV_HEAD_DIM": 8,
    "FAST_RCNN.NUM_STACKED_CONVS": 2,
    "MRCNN.DIM_REDUCED": 8,
    "MRCNN.DILATION": 1,
    "KRCNN.NUM_KEYPOINTS": 17,
    "KRCNN.CONV_HEAD_DIM": 8,
    "KRCNN.NUM_STACKED_CONVS": 2,
    "RPN.SIZES": (16, 32, 64),
    "TRAIN.SCALES": (96,),
    "TRAIN.MAX_SIZE": 144,
    "TRAIN.BATCH_SIZE_PER_IM": 16,
    "TRAIN.RPN_PRE_NMS_TOP_N": 100,
    "TRAIN.RPN_POST_NMS_TOP_N": 50,
    "TEST.SCALE": 96,
    "TEST.MAX_SIZE": 144,
    "TEST.RPN_PRE_NMS_TOP_N": 100,
    "TEST.RPN_POST_NMS_TOP_N": 50,
    "TEST.DETECTIONS_PER_IM": 4,
}
RESNET = {
    "MODEL.CONV_BODY": "ResNet.ResNet50_conv4_body",
    "RESNETS.FREEZE_AT": 0,
    "RESNETS.STEM_OUT_CHANNELS": 8,
    "RESNETS.WIDTH_PER_GROUP": 4,
    "RESNETS.RES2_OUT_CHANNELS": 16,
    "RESNETS.USE_GN": True,
    "RESNETS.TRANS_FUNC": "bottleneck_gn_transformation",
    "RESNETS.STEM_FUNC": "basic_gn_stem",
    "RESNETS.SHORTCUT_FUNC": "basic_gn_shortcut",
    "GROUP_NORM.NUM_GROUPS": 4,
    "FAST_RCNN.ROI_BOX_HEAD": "ResNet.ResNet_roi_conv5_head",
}
C5 = RESNET | {
    "MODEL.CONV_BODY": "ResNet.ResNet50_conv5_body",
    "FAST_RCNN.ROI_BOX_HEAD": "fast_rcnn_heads.roi_2mlp_head",
    "RPN.STRIDE": 32,
}
DILATED = C5 | {"RESNETS.RES5_DILATION": 2, "RPN.STRIDE": 16}
P2ONLY = C5 | {
    "MODEL.CONV_BODY": "FPN.fpn_ResNet50_conv5_P2only_body",
    "FPN.DIM": 8,
    "RPN.STRIDE": 4,
}
FPN = P2ONLY | {
    "MODEL.CONV_BODY": "FPN.fpn_ResNet50_conv5_body",
    "FPN.FPN_ON": True,
    "FPN.MULTILEVEL_ROIS": True,
    "FPN.MULTILEVEL_RPN": True,
}
MASK = {"MODEL.MASK_ON": True, "MRCNN.ROI_XFORM_RESOLUTION": 14, "MRCNN.RESOLUTION": 28}
V1UP = MASK | {"MRCNN.ROI_MASK_HEAD": "mask_rcnn_heads.mask_rcnn_fcn_head_v1up"}
POSE = {
    "MODEL.KEYPOINTS_ON": True,
    "KRCNN.ROI_KEYPOINTS_HEAD": "keypoint_rcnn_heads.roi_pose_head_v1convX",
    "KRCNN.ROI_XFORM_RESOLUTION": 14,
    "KRCNN.USE_DECONV_OUTPUT": True,
    "KRCNN.UP_SCALE": 2,
    "KRCNN.HEATMAP_SIZE": 56,
}
FAMILIES = {
    "VGG16": {
        "MODEL.CONV_BODY": "VGG16.VGG16_conv5_body",
        "FAST_RCNN.ROI_BOX_HEAD": "VGG16.VGG16_roi_fc_head",
    },
    "VGG_CNN_M_1024": {
        "MODEL.CONV_BODY": "VGG_CNN_M_1024.VGG_CNN_M_1024_conv5_body",
        "FAST_RCNN.ROI_BOX_HEAD": "VGG_CNN_M_1024.VGG_CNN_M_1024_roi_fc_head",
        "FAST_RCNN.ROI_XFORM_METHOD": "RoIPoolF",
    },
    "C4 with res5 heads": RESNET | MASK | POSE | {
        "MRCNN.ROI_MASK_HEAD": "mask_rcnn_heads.mask_rcnn_fcn_head_v0up",
        "MRCNN.RESOLUTION": 14,
        "KRCNN.ROI_KEYPOINTS_HEAD": "keypoint_rcnn_heads.ResNet_roi_conv5_head_for_keypoints",
        "KRCNN.USE_DECONV": True,
        "KRCNN.USE_DECONV_OUTPUT": False,
        "KRCNN.HEATMAP_SIZE": 28,
    },
    "C4 with a dilated mask head": RESNET | MASK | {
        "MRCNN.ROI_MASK_HEAD": "mask_rcnn_heads.mask_rcnn_fcn_head_v0up",
        "MRCNN.DILATION": 2,
    },
    "C5": C5 | V1UP | {"MODEL.CLS_AGNOSTIC_BBOX_REG": True, "MRCNN.CLS_SPECIFIC_MASK": False},
    "dilated C5": DILATED | MASK | {
        "FAST_RCNN.ROI_BOX_HEAD": "fast_rcnn_heads.roi_Xconv1fc_head",
        "MRCNN.ROI_MASK_HEAD": "mask_rcnn_heads.mask_rcnn_fcn_head_v1up4convs",
        "MRCNN.USE_FC_OUTPUT": True,
    },
    "P2 only": P2ONLY | V1UP | {"MRCNN.UPSAMPLE_RATIO": 2, "MRCNN.RESOLUTION": 56},
    "FPN, RPN on its finest level": FPN | {"FPN.MULTILEVEL_RPN": False},
    "FPN, RoIs on its finest level": FPN | {"FPN.MULTILEVEL_ROIS": False},
    "FPN, its finest level alone": FPN | {
        "FPN.MULTILEVEL_RPN": False,
        "FPN.MULTILEVEL_ROIS": False,
    },
    "ResNeXt FPN": FPN | MASK | POSE | {
        "RESNETS.NUM_GROUPS": 2,
        "FPN.USE_GN": True,
        "FAST_RCNN.ROI_BOX_HEAD": "fast_rcnn_heads.roi_Xconv1fc_gn_head",
        "MRCNN.ROI_MASK_HEAD": "mask_rcnn_heads.mask_rcnn_fcn_head_v1up4convs_gn",
    },
    "softmax RPN": FPN | {
        "RPN.CLS_ACTIVATION": "softmax",
        "RPN.OUT_DIM_AS_IN_DIM": False,
        "RPN.OUT_DIM": 12,
    },
    "R-FCN": DILATED | {"MODEL.TYPE": "rfcn", "FAST_RCNN.ROI_BOX_HEAD": ""},
    "reduced R-FCN": DILATED | {
        "MODEL.TYPE": "ResNet50_rfcn",
        "MODEL.CLS_AGNOSTIC_BBOX_REG": True,
        "RFCN.PS_GRID_SIZE": 7,
    },
}  # fmt: skip


@pytest.fixture
def people(shared, cfg, tmp_path, monkeypatch):
    """`people(options)`: model, batch and a photograph, for two pictures with keypoints."""
    from core.config import assert_and_infer_cfg, merge_cfg_from_list
    from datasets.dataset_catalog import resolve_dataset
    from datasets.roidb import combined_roidb_for_training
    from modeling import VGG16, VGG_CNN_M_1024
    from roi_data.loader import build_train_loader

    # Real bodies, but not 120 million numbers of fully connected layers.
    for module in (VGG16.VGG16_roi_fc_head, VGG_CNN_M_1024.VGG_CNN_M_1024_roi_fc_head):
        monkeypatch.setattr(module, "fc_dims", (16, 16))
    source = json.loads(
        (shared / "data/coco/annotations/person_keypoints_train2017.json").read_text()
    )
    posing = [a["image_id"] for a in source["annotations"] if a["num_keypoints"] > 8]
    chosen = sorted(set(posing))[:2]
    source["images"] = [i for i in source["images"] if i["id"] in chosen]
    source["annotations"] = [a for a in source["annotations"] if a["image_id"] in chosen]
    (tmp_path / "two.json").write_text(json.dumps(source))
    images = shared / "data/coco/images/train2017"

    def build(options):
        from modeling.model_builder import Generalized_RCNN

        cfg.DATA_DIR = str(tmp_path / "data")
        merge_cfg_from_list([x for pair in (BASE | options).items() for x in pair])
        dataset = resolve_dataset(f"{tmp_path / 'two.json'}:{images}")
        cfg.TRAIN.DATASETS, cfg.MODEL.NUM_CLASSES = dataset.train_names, dataset.num_classes
        assert_and_infer_cfg()
        torch.manual_seed(0)
        roidb, ratio_list, ratio_index = combined_roidb_for_training(cfg.TRAIN.DATASETS, ())
        loader = build_train_loader(roidb, ratio_list, ratio_index, batch_size=2, num_workers=0)
        batch = {key: value[0] for key, value in next(iter(loader)).items()}
        photograph = cv2.imread(str(images / source["images"][0]["file_name"]))
        return Generalized_RCNN(), batch, photograph

    return build


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_and_a_detection(family, people, cfg):
    from core.test import im_detect_all

    model, batch, photograph = people(FAMILIES[family])
    trained = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for _ in range(2):
        losses = model(**batch)["losses"]
        kinds = {name.split("_fpn")[0] for name in losses}
        expected = {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"}
        expected |= {"loss_mask"} if cfg.MODEL.MASK_ON else set()
        expected |= {"loss_kps"} if cfg.MODEL.KEYPOINTS_ON else set()
        assert kinds == expected
        for name, loss in losses.items():
            assert torch.isfinite(loss), name
        assert all(losses[name] > 0 for name in expected & set(losses))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{name} learns nothing"
                assert torch.isfinite(parameter.grad).all(), name
        optimizer.step()
    assert any(not torch.equal(p, trained[n]) for n, p in model.named_parameters() if n in trained)

    cls_boxes, cls_segms, cls_keyps = im_detect_all(model.eval(), photograph)
    found = len(cls_boxes[1])
    assert found and np.isfinite(cls_boxes[1]).all()
    height, width = photograph.shape[:2]
    assert (cls_boxes[1][:, :4] <= [width - 1, height - 1] * 2).all()
    if cfg.MODEL.MASK_ON:
        assert [rle["size"] for rle in cls_segms[1]] == [[height, width]] * found
    if cfg.MODEL.KEYPOINTS_ON:
        assert [points.shape for points in cls_keyps[1]] == [(4, 17)] * found
    mapping, _ = model.detectron_weight_mapping
    assert set(mapping) == set(model.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("amp", [False, True])
def test_the_forward_never_waits_for_the_gpu(family, amp, people):
    model, batch, _ = people(FAMILIES[family])
    model = model.cuda().train()
    batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        model(**batch)  # libraries load
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            total = sum(model(**batch)["losses"].values())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    total.backward()
    assert torch.isfinite(total)


def test_keypoint_losses_fall(people):
    model, batch, _ = people(FPN | POSE | {"FPN.USE_GN": True, "KRCNN.CONV_INIT": "MSRAFill"})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history = []
    for _ in range(30):
        losses = model.train()(**batch)["losses"]
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append(losses["loss_kps"].item())
    assert np.mean(history[-3:]) < 0.85 * np.mean(history[:3])
