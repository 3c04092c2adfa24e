"""Detectron's configs are taken as they are, and every change of a name is said once."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import yaml
from test_config import as_json, flat

from core import config
from core.config import ConfigError, UnknownKeyError, UnknownOptionError
from core.detectron_config import IMAGENET_FILES
from datasets.dataset_catalog import get_entry
from detectron_configs import config_table, detectron_yaml, family_config, table_stems

# What Detectron's files say and this family's leave to --dataset or say otherwise.
OWN_BUSINESS = {"TRAIN.DATASETS", "TEST.DATASETS", "OUTPUT_DIR", "MODEL.NUM_CLASSES"}
# The same ImageNet weights in Caffe's own format.
CAFFE = {"R-50.pkl": "resnet50_caffe.pth", "R-101.pkl": "resnet101_caffe.pth"}


@pytest.fixture
def merge(tmp_path, cfg, caplog):
    """Merge YAML text, and give the sentences that were logged."""
    caplog.set_level(logging.INFO)

    def merge(text):
        path = tmp_path / "detectron.yaml"
        path.write_text(text)
        caplog.clear()
        config.merge_cfg_from_file(path)
        return [message.removeprefix(f"{path}: ") for message in caplog.messages]

    return merge


@pytest.mark.parametrize("stem", table_stems())
def test_detectrons_file_and_this_familys_are_one_config(stem, cfg, merge):
    merge(detectron_yaml(stem))
    detectrons = flat(cfg)
    config.reset_cfg()
    config.merge_cfg_from_file(family_config(stem))
    ours = flat(cfg)
    weights = Path(detectrons.pop("RESNETS.IMAGENET_PRETRAINED_WEIGHTS")).name
    expected = Path(ours.pop("RESNETS.IMAGENET_PRETRAINED_WEIGHTS")).name
    assert expected == CAFFE.get(weights, weights)
    for key, value in ours.items():
        # Six published keypoint configs keep the alias, which is the same head.
        if as_json(value) != "head_builder.roi_2mlp_head" and key not in OWN_BUSINESS:
            assert as_json(detectrons[key]) == as_json(value), key


class TestNames:
    @pytest.mark.parametrize(
        ("key", "old", "new"),
        [
            ("MODEL.CONV_BODY", "FPN.add_fpn_ResNet50_conv5_body", "FPN.fpn_ResNet50_conv5_body"),
            ("MODEL.CONV_BODY", "VGG16.add_VGG16_conv5_body", "VGG16.VGG16_conv5_body"),
            (
                "FAST_RCNN.ROI_BOX_HEAD",
                "head_builder.add_roi_2mlp_head",
                "fast_rcnn_heads.roi_2mlp_head",
            ),
            (
                "MRCNN.ROI_MASK_HEAD",
                "mask_rcnn_heads.ResNet_mask_rcnn_fcn_head_v0upshare",
                "mask_rcnn_heads.mask_rcnn_fcn_head_v0upshare",
            ),
            (
                "KRCNN.ROI_KEYPOINTS_HEAD",
                "keypoint_rcnn_heads.add_roi_pose_head_v1convX",
                "keypoint_rcnn_heads.roi_pose_head_v1convX",
            ),
            (
                "KRCNN.ROI_KEYPOINTS_HEAD",
                "keypoint_rcnn_heads.add_ResNet_roi_conv5_head_for_keypoints",
                "keypoint_rcnn_heads.ResNet_roi_conv5_head_for_keypoints",
            ),
        ],
    )
    def test_functions(self, cfg, merge, key, old, new):
        group, name = key.split(".")
        messages = merge(f"{group}: {{{name}: {old}}}")
        assert cfg[group][name] == new
        assert f"{key} {old} is {new} here" in messages

    def test_names_of_this_family_stay(self, cfg, merge):
        text = "FAST_RCNN: {ROI_BOX_HEAD: head_builder.roi_2mlp_head}"
        assert merge(text) == []
        assert cfg.FAST_RCNN.ROI_BOX_HEAD == "head_builder.roi_2mlp_head"

    @pytest.mark.parametrize("kind", ["mask_rcnn", "keypoint_rcnn", "rpn", "faster_rcnn"])
    def test_old_model_types_are_one(self, cfg, merge, kind):
        assert merge(f"MODEL: {{TYPE: {kind}}}") == [
            f"MODEL.TYPE {kind} is taken as generalized_rcnn"
        ]
        assert cfg.MODEL.TYPE == "generalized_rcnn" and not cfg.TRAIN.FREEZE_CONV_BODY

    def test_frozen_features(self, cfg, merge):
        merge("MODEL: {TYPE: keypoint_rcnn_frozen_features}")
        assert cfg.MODEL.TYPE == "generalized_rcnn" and cfg.TRAIN.FREEZE_CONV_BODY

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [
            (
                "VGG16_faster_rcnn",
                {
                    "MODEL.TYPE": "generalized_rcnn",
                    "MODEL.CONV_BODY": "VGG16.VGG16_conv5_body",
                    "FAST_RCNN.ROI_BOX_HEAD": "VGG16.VGG16_roi_fc_head",
                    "MODEL.FASTER_RCNN": True,
                    "TRAIN.FREEZE_CONV_BODY": False,
                },
            ),
            (
                "ResNet101_rpn_conv4_frozen_features",
                {
                    "MODEL.TYPE": "generalized_rcnn",
                    "MODEL.CONV_BODY": "ResNet.ResNet101_conv4_body",
                    "MODEL.RPN_ONLY": True,
                    "TRAIN.FREEZE_CONV_BODY": True,
                },
            ),
            (
                "ResNet50_rfcn",
                {
                    "MODEL.TYPE": "ResNet50_rfcn",
                    "MODEL.CONV_BODY": "ResNet.ResNet50_conv5_body",
                    "MODEL.FASTER_RCNN": False,
                },
            ),
        ],
    )
    def test_fixed_models_become_their_parts(self, cfg, merge, kind, expected):
        assert len(merge(f"MODEL: {{TYPE: {kind}}}")) == 1
        ours = flat(cfg)
        assert {key: ours[key] for key in expected} == expected


class TestKeys:
    def test_renamed_keys(self, cfg, merge):
        messages = merge(
            "TRAIN: {DATASET: 'coco_2014_train:coco_2014_valminusminival', FREEZE_AT: 3}\n"
            "TEST: {SCALES: '(500,)', DATASET: voc_2007_test, PROPOSAL_FILE: a.pkl}\n"
            "MODEL: {PS_GRID_SIZE: 7, ROI_HEAD: fast_rcnn_heads.add_roi_2mlp_head}\n"
            "MRCNN: {MASK_HEAD_NAME: mask_rcnn_heads.mask_rcnn_fcn_head_v1up}\n"
        )
        assert cfg.TRAIN.DATASETS == ("coco_2014_train", "coco_2014_valminusminival")
        assert cfg.TEST.DATASETS == ("voc_2007_test",) and cfg.TEST.PROPOSAL_FILES == ("a.pkl",)
        assert cfg.RESNETS.FREEZE_AT == 3 and cfg.TEST.SCALE == 500 and cfg.RFCN.PS_GRID_SIZE == 7
        assert cfg.FAST_RCNN.ROI_BOX_HEAD == "fast_rcnn_heads.roi_2mlp_head"
        assert cfg.MRCNN.ROI_MASK_HEAD == "mask_rcnn_heads.mask_rcnn_fcn_head_v1up"
        assert "TRAIN.FREEZE_AT 3 is taken as RESNETS.FREEZE_AT 3" in messages

    def test_a_renamed_key_gives_way_to_its_new_name(self, cfg, merge):
        messages = merge("TEST: {SCALES: [500], SCALE: 400}")
        assert cfg.TEST.SCALE == 400
        assert messages == ["TEST.SCALES is ignored: the file has TEST.SCALE, its new name, too"]

    def test_several_test_scales_have_no_equal(self, merge):
        with pytest.raises(ConfigError, match=r"TEST.SCALE must be an int like 600"):
            merge("TEST: {SCALES: [500, 600]}")

    def test_deprecated_and_foreign_keys_are_ignored_and_said(self, shared, cfg, merge):
        before = {key: as_json(value) for key, value in flat(cfg).items()}
        spec = yaml.safe_load((shared / "spec/detectron_config_keys.yaml").read_text())
        foreign = [key for key in spec["keys"] if key not in before]
        foreign = [k for k in foreign if not k.endswith(("WEIGHTS", "FREEZE_AT"))]
        ignored = [key for key in spec["deprecated_ignored"] if key not in before]
        assert len(foreign) > 10 and len(ignored) == 7
        text = "".join(f"{key}: 1\n" for key in foreign + ignored if "." not in key)
        nested = {}
        for key in foreign + ignored:
            if "." in key:
                group, name = key.split(".")
                nested.setdefault(group, {})[name] = 1
        messages = merge(text + yaml.safe_dump(nested))
        assert {key: as_json(value) for key, value in flat(cfg).items()} == before
        assert len(messages) == len(foreign + ignored)
        assert all(" is ignored" in message for message in messages)

    def test_other_unknown_keys_stay_errors(self, merge):
        with pytest.raises(UnknownKeyError, match="unknown config key TRAIN.WEIGHT;"):
            merge("TRAIN: {WEIGHT: a.pkl}")

    def test_the_command_line_understands_them_too(self, cfg):
        body = "FPN.add_fpn_ResNet50_conv5_body"
        config.merge_cfg_from_list(["TRAIN.FREEZE_AT", "0", "MODEL.CONV_BODY", body])
        assert cfg.RESNETS.FREEZE_AT == 0
        assert cfg.MODEL.CONV_BODY == "FPN.fpn_ResNet50_conv5_body"
        assert cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS
        with pytest.raises(UnknownOptionError, match="TRAIN.FREEZE;"):
            config.merge_cfg_from_list(["TRAIN.FREEZE", "0"])

    def test_a_translation_is_said_once(self, cfg, merge):
        assert merge("TRAIN: {FREEZE_AT: 0}") == [
            "TRAIN.FREEZE_AT 0 is taken as RESNETS.FREEZE_AT 0"
        ]
        assert merge("TRAIN: {FREEZE_AT: 0}") == []


BODY = "MODEL: {CONV_BODY: ResNet.add_ResNet50_conv4_body}\n"


def test_data_sets_are_known_and_give_way_to_the_command_line(cfg, merge):
    names = {
        name
        for table in config_table().values()
        for key in ("TRAIN.DATASETS", "TEST.DATASETS")
        for name in table[key]
    }
    assert all(get_entry(name).name == name for name in names)
    messages = merge(
        f"{BODY}TRAIN: {{DATASETS: [coco_2014_train]}}\nTEST: {{DATASETS: [coco_2014_minival]}}"
    )
    assert cfg.TRAIN.DATASETS == ("coco_2014_train",)
    assert "--dataset of the scripts comes before TRAIN.DATASETS, TEST.DATASETS" in messages


class TestWeights:
    @pytest.mark.parametrize("name", IMAGENET_FILES)
    def test_imagenet_weights_of_detectron(self, cfg, merge, name):
        merge(f"{BODY}TRAIN: {{WEIGHTS: 'https://dl.fbaipublicfiles.com/detectron/x/{name}'}}")
        assert f"data/pretrained_model/{name}" == cfg.RESNETS.IMAGENET_PRETRAINED_WEIGHTS
        assert cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS

    def test_a_copy_of_them_stays_where_it_is(self, cfg, merge):
        merge(f"{BODY}TRAIN: {{WEIGHTS: /models/R-50.pkl}}")
        assert cfg.RESNETS.IMAGENET_PRETRAINED_WEIGHTS == "/models/R-50.pkl"

    def test_trained_weights_are_for_the_command_line(self, cfg, merge, shared):
        zoo = json.loads((shared / "spec/model_zoo.json").read_text())
        for stem, entry in zoo.items():
            if entry.get("url"):
                messages = merge(f"{BODY}TRAIN: {{WEIGHTS: '{entry['url']}'}}")
                assert any(m.endswith(f"--load_detectron zoo://{stem}") for m in messages), stem
        assert "TEST.WEIGHTS is ignored: give --load_detectron mine.pkl" in merge(
            "TEST: {WEIGHTS: mine.pkl}"
        )

    def test_no_weights_means_random_ones_as_in_detectron(self, cfg, merge):
        assert "without TRAIN.WEIGHTS a training starts from random weights" in merge(BODY)
        assert not cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS

    def test_but_not_in_a_config_of_this_family(self, cfg, merge):
        assert merge(BODY.replace("add_", "")) == []
        assert cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS
