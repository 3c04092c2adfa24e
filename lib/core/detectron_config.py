"""Detectron's configs in this family's words, so that they can be merged unmodified.

Works on flat configs (`{"TRAIN.WEIGHTS": ..., ...}`) and says in a sentence each what it changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

# ImageNet weights that tools/download_imagenet_weights.py knows, by Detectron's file names.
IMAGENET_FILES = (
    "R-50.pkl",
    "R-101.pkl",
    "R-50-GN.pkl",
    "R-101-GN.pkl",
    "X-101-32x8d.pkl",
    "X-101-64x4d.pkl",
    "X-152-32x8d-IN5k.pkl",
)
PRETRAINED_DIR = "data/pretrained_model"

_FUNCTION_KEYS = (
    "MODEL.CONV_BODY",
    "FAST_RCNN.ROI_BOX_HEAD",
    "MRCNN.ROI_MASK_HEAD",
    "KRCNN.ROI_KEYPOINTS_HEAD",
)
_GN_FUNCTION_KEYS = ("RESNETS.TRANS_FUNC", "RESNETS.STEM_FUNC", "RESNETS.SHORTCUT_FUNC")

# Keys that Detectron once knew and ignores.
_DEPRECATED = frozenset({
    "FINAL_MSG",
    "MODEL.DILATION",
    "ROOT_GPU_ID",
    "RPN.ON",
    "TRAIN.BBOX_NORMALIZE_TARGETS_PRECOMPUTED",
    "TRAIN.DROPOUT",
    "USE_GPU_NMS",
    "TEST.NUM_TEST_IMAGES",
})  # fmt: skip
# Keys of Detectron that mean nothing here, and why.
_WITHOUT_MEANING = {
    "TRAIN.GENERATE_PROPOSALS_ON_GPU": "proposals are made where the model is",
    "TEST.GENERATE_PROPOSALS_ON_GPU": "proposals are made where the model is",
    "TRAIN.AUTO_RESUME": "to go on with a training give --load_ckpt and --resume",
    "TRAIN.COPY_WEIGHTS": "weights stay where they are",
    "DATA_LOADER.MINIBATCH_QUEUE_SIZE": "the loader has queues of its own",
    "DATA_LOADER.BLOBS_QUEUE_CAPACITY": "the loader has queues of its own",
    "MODEL.EXECUTION_TYPE": "it is Caffe2's",
    "USE_NCCL": "it is Caffe2's",
    "MEMONGER": "it is Caffe2's",
    "MEMONGER_SHARE_ACTIVATIONS": "it is Caffe2's",
    "DOWNLOAD_CACHE": "downloads are kept under DATA_DIR",
    "CLUSTER.ON_CLUSTER": "it is for one cluster",
}


def _split(value: Any) -> Any:
    """`a:b` as Detectron once joined names, as a tuple."""
    return tuple(value.split(":")) if isinstance(value, str) else value


def _single(value: Any) -> Any:
    """The one item of `(600,)`, which may stand there as text."""
    if isinstance(value, str) and (match := re.fullmatch(r"[(\[]\s*(\d+)\s*,?\s*[)\]]", value)):
        return int(match[1])
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def _same(value: Any) -> Any:
    return value


_RENAMED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "TRAIN.FREEZE_AT": ("RESNETS.FREEZE_AT", _same),
    "MODEL.PS_GRID_SIZE": ("RFCN.PS_GRID_SIZE", _same),
    "MODEL.ROI_HEAD": ("FAST_RCNN.ROI_BOX_HEAD", _same),
    "MRCNN.MASK_HEAD_NAME": ("MRCNN.ROI_MASK_HEAD", _same),
    "TRAIN.DATASET": ("TRAIN.DATASETS", _split),
    "TRAIN.PROPOSAL_FILE": ("TRAIN.PROPOSAL_FILES", _split),
    "TEST.SCALES": ("TEST.SCALE", _single),
    "TEST.DATASET": ("TEST.DATASETS", _split),
    "TEST.PROPOSAL_FILE": ("TEST.PROPOSAL_FILES", _split),
}

# Old names of the one builder of all R-CNNs.
_SAME_TYPES = frozenset({
    "fast_rcnn",
    "mask_rcnn",
    "keypoint_rcnn",
    "mask_and_keypoint_rcnn",
    "rpn",
    "fpn_rpn",
    "faster_rcnn",
})  # fmt: skip
# Detectron's fixed models: a backbone and what stands on it, such as VGG16_fast_rcnn.
_RECIPE = re.compile(
    r"(VGG16|VGG_CNN_M_1024|ResNet50|ResNet101)_(fast_rcnn|faster_rcnn|rpn_conv4|rpn|rfcn)"
)
_FROZEN = "_frozen_features"


def translate(
    values: Mapping[str, Any], is_known: Callable[[str], bool], *, whole: bool
) -> tuple[dict[str, Any], list[str]]:
    """Rewrite a flat config of Detectron's; one of this family comes back as it is.

    Args:
        values: full key -> value as YAML or the command line gives it.
        is_known: does this project have the key? Known keys are never dropped.
        whole: these are all keys of a file, so that what it lacks means something too.

    Returns:
        (values in this family's words, a sentence for every change)
    """
    out: dict[str, Any] = {}
    notes: list[str] = []
    is_detectron = any("add_" in str(values.get(key, "")) for key in _FUNCTION_KEYS)
    for key, value in values.items():
        if is_known(key):
            out[key] = value
        elif key in _RENAMED:
            new_key, convert = _RENAMED[key]
            if new_key in values:
                notes.append(f"{key} is ignored: the file has {new_key}, its new name, too")
            else:
                out[new_key] = convert(value)
                notes.append(f"{key} {value} is taken as {new_key} {out[new_key]}")
        elif key in _DEPRECATED:
            notes.append(f"{key} is ignored, as Detectron does: it is deprecated")
        elif key in _WITHOUT_MEANING:
            notes.append(f"{key} is ignored: {_WITHOUT_MEANING[key]}")
        elif key == "TRAIN.WEIGHTS":
            notes += _translate_train_weights(str(value or ""), out)
        elif key == "TEST.WEIGHTS":
            if value:
                notes.append(f"TEST.WEIGHTS is ignored: give --load_detectron {_zoo_name(value)}")
        else:
            out[key] = value
    notes += _translate_type(out)
    notes += _translate_functions(out)
    notes += _translate_group_norm(out, whole)
    if whole and is_detectron:
        notes += _complete(values, out)
    return out, notes


def _translate_train_weights(weights: str, out: dict[str, Any]) -> list[str]:
    if not weights:
        return []
    name = PurePosixPath(weights).name
    if name not in IMAGENET_FILES and "/ImageNetPretrained/" not in weights:
        return [
            f"TRAIN.WEIGHTS is ignored: to start from a trained model give --load_detectron "
            f"{_zoo_name(weights)}"
        ]
    is_url = "://" in weights
    out["RESNETS.IMAGENET_PRETRAINED_WEIGHTS"] = f"{PRETRAINED_DIR}/{name}" if is_url else weights
    out["MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS"] = True
    return [
        f"TRAIN.WEIGHTS {weights} is taken as RESNETS.IMAGENET_PRETRAINED_WEIGHTS "
        f"{out['RESNETS.IMAGENET_PRETRAINED_WEIGHTS']}"
    ]


def _zoo_name(weights: str) -> str:
    """`zoo://<config stem>` of a published model's address, anything else as it is."""
    match = re.search(r"/(?:\d\d_20\d\d_\w+)/([^/]+?)(?:\.yaml|_\d{4})\.[^/]+/", str(weights))
    return f"zoo://{match[1]}" if match else str(weights)


def _translate_type(out: dict[str, Any]) -> list[str]:
    old = str(out.get("MODEL.TYPE", ""))
    kind = old.removesuffix(_FROZEN)
    recipe = _RECIPE.fullmatch(kind)
    if kind not in _SAME_TYPES and recipe is None:
        return []
    if kind != old:
        out["TRAIN.FREEZE_CONV_BODY"] = True
    if recipe is not None:
        for key, value in _recipe_keys(*recipe.groups()).items():
            out.setdefault(key, value)
        if recipe[2] == "rfcn":  # unlike others it has a layer of its own
            return [f"MODEL.TYPE {old} is taken with MODEL.CONV_BODY {out['MODEL.CONV_BODY']}"]
    out["MODEL.TYPE"] = "generalized_rcnn"
    frozen = " with TRAIN.FREEZE_CONV_BODY True" if kind != old else ""
    return [f"MODEL.TYPE {old} is taken as generalized_rcnn{frozen}"]


def _recipe_keys(body: str, model: str) -> dict[str, Any]:
    if body.startswith("ResNet"):
        stage = "conv5" if model == "rfcn" else "conv4"
        keys = {"MODEL.CONV_BODY": f"ResNet.{body}_{stage}_body"}
        head = "ResNet.ResNet_roi_conv5_head"
    else:
        keys = {"MODEL.CONV_BODY": f"{body}.{body}_conv5_body"}
        head = f"{body}.{body}_roi_fc_head"
    if model in ("fast_rcnn", "faster_rcnn"):
        keys["FAST_RCNN.ROI_BOX_HEAD"] = head
    if model == "faster_rcnn":
        keys["MODEL.FASTER_RCNN"] = True
    if model.startswith("rpn"):
        keys["MODEL.RPN_ONLY"] = True
    return keys


def _translate_functions(out: dict[str, Any]) -> list[str]:
    notes = []
    for key in _FUNCTION_KEYS:
        old = out.get(key)
        if not isinstance(old, str):
            continue
        module, dot, function = old.rpartition(".")
        module = module.removeprefix("detectron.modeling.")
        new = function.removeprefix("add_")
        if module == "mask_rcnn_heads":
            new = new.removeprefix("ResNet_")
        if module == "head_builder" and new != function:
            module = "fast_rcnn_heads"
        if (new := f"{module}{dot}{new}") != old:
            out[key] = new
            notes.append(f"{key} {old} is {new} here")
    return notes


def _translate_group_norm(out: dict[str, Any], whole: bool) -> list[str]:
    """Detectron goes by the functions alone; here RESNETS.USE_GN says it too."""
    used = [key for key in _GN_FUNCTION_KEYS if "_gn_" in str(out.get(key, ""))]
    if not whole or len(used) < len(_GN_FUNCTION_KEYS) or "RESNETS.USE_GN" in out:
        return []
    out["RESNETS.USE_GN"] = True
    return ["RESNETS.USE_GN is True because of RESNETS.TRANS_FUNC"]


def _complete(values: Mapping[str, Any], out: dict[str, Any]) -> list[str]:
    notes = []
    if not values.get("TRAIN.WEIGHTS") and "RESNETS.IMAGENET_PRETRAINED_WEIGHTS" not in values:
        out.setdefault("MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS", False)
        notes.append("without TRAIN.WEIGHTS a training starts from random weights")
    if out.pop("ROOT_DIR", None):
        notes.append("ROOT_DIR is ignored: it is where this project lies")
    named = [k for k in ("MODEL.NUM_CLASSES", "TRAIN.DATASETS", "TEST.DATASETS") if out.get(k)]
    if named:
        notes.append(f"--dataset of the scripts comes before {', '.join(named)}")
    return notes
