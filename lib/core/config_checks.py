"""Combinations of config keys that cannot work, a sentence for each."""

from __future__ import annotations

import math
from collections.abc import Iterator

from core.attr_dict import AttrDict

SOLVER_TYPES = ("SGD", "Adam", "AdamW")
LR_POLICIES = (
    "step",
    "steps_with_decay",
    "steps_with_lrs",
    "cosine_decay",
    "exp_decay",
    "cosine",  # short for the two before
    "exp",
)
WARM_UP_METHODS = ("constant", "linear")
ROI_XFORM_METHODS = ("RoIPoolF", "RoICrop", "RoIAlign")
CONV_INITS = ("GaussianFill", "MSRAFill")
MODEL_TYPES = ("", "generalized_rcnn", "retinanet", "rfcn", "ResNet50_rfcn", "ResNet101_rfcn")
BOX_HEURISTICS = ("ID", "AVG", "UNION")
MASK_HEURISTICS = ("SOFT_AVG", "SOFT_MAX", "LOGIT_AVG")
PERSON_KEYPOINTS = 17
KEYPOINT_HEURISTICS = ("HM_AVG", "HM_MAX")
# What the operators take.
MOST_LEVELS = 8
MOST_DRAWN_ANCHORS = 2048


def config_problems(cfg: AttrDict, complete: bool) -> Iterator[str]:
    """Say what in `cfg` cannot work; nothing for a good config.

    Args:
        cfg: the config after inference.
        complete: no key will be set later (so MODEL.NUM_CLASSES must be known).
    """
    yield from _choice_problems(cfg)
    yield from _data_problems(cfg)
    yield from _schedule_problems(cfg)
    yield from _pyramid_problems(cfg)
    yield from _upsampling_problems(cfg)
    yield from _augmentation_problems(cfg)
    if cfg.MODEL.CONV_BODY:
        yield from _model_problems(cfg, complete)
        yield from _norm_problems(cfg)
        yield from _group_norm_problems(cfg)


def _choice_problems(cfg: AttrDict) -> Iterator[str]:
    choices = {
        "MODEL.TYPE": (cfg.MODEL.TYPE, MODEL_TYPES),
        "DATA_LOADER.ON_BAD_IMAGE": (cfg.DATA_LOADER.ON_BAD_IMAGE, ("raise", "skip")),
        "SOLVER.TYPE": (cfg.SOLVER.TYPE, SOLVER_TYPES),
        "SOLVER.LR_POLICY": (cfg.SOLVER.LR_POLICY, LR_POLICIES),
        "SOLVER.WARM_UP_METHOD": (cfg.SOLVER.WARM_UP_METHOD, WARM_UP_METHODS),
        "FAST_RCNN.ROI_XFORM_METHOD": (cfg.FAST_RCNN.ROI_XFORM_METHOD, ROI_XFORM_METHODS),
        "MRCNN.ROI_XFORM_METHOD": (cfg.MRCNN.ROI_XFORM_METHOD, ROI_XFORM_METHODS),
        "KRCNN.ROI_XFORM_METHOD": (cfg.KRCNN.ROI_XFORM_METHOD, ROI_XFORM_METHODS),
        "MRCNN.CONV_INIT": (cfg.MRCNN.CONV_INIT, CONV_INITS),
        "KRCNN.CONV_INIT": (cfg.KRCNN.CONV_INIT, CONV_INITS),
        "RPN.CLS_ACTIVATION": (cfg.RPN.CLS_ACTIVATION, ("sigmoid", "softmax")),
        "RESNETS.IMAGENET_PRETRAINED_PIXELS": (
            cfg.RESNETS.IMAGENET_PRETRAINED_PIXELS,
            ("auto", "bgr255", "rgb1"),
        ),
        "TEST.COCO_EVALUATOR": (cfg.TEST.COCO_EVALUATOR, ("fast", "pycocotools")),
        "RESNETS.FREEZE_AT": (cfg.RESNETS.FREEZE_AT, (0, 2, 3, 4, 5)),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            yield f"{key} is {value} but must be one of {', '.join(map(str, allowed))}"


def _data_problems(cfg: AttrDict) -> Iterator[str]:
    train = cfg.TRAIN
    if not train.SCALES:
        yield "TRAIN.SCALES is empty; give at least one length of the shorter image side"
    for key, value in {
        "TRAIN.SCALES": min(train.SCALES, default=1),
        "TRAIN.MAX_SIZE": train.MAX_SIZE,
        "TEST.SCALE": cfg.TEST.SCALE,
        "TEST.MAX_SIZE": cfg.TEST.MAX_SIZE,
        "TRAIN.IMS_PER_BATCH": train.IMS_PER_BATCH,
        "TRAIN.BATCH_SIZE_PER_IM": train.BATCH_SIZE_PER_IM,
        "NUM_GPUS": cfg.NUM_GPUS,
    }.items():
        if value < 1:
            yield f"{key} must be at least 1, not {value}"
    augment = train.AUGMENT
    limits = augment.SCALE_JITTER
    if len(limits) != 2 or not 0 < limits[0] <= limits[1]:
        yield f"TRAIN.AUGMENT.SCALE_JITTER must be a smallest and a largest factor, not {limits}"
    for key in ("CROP_PROB", "CROP_MIN", "BRIGHTNESS", "CONTRAST", "SATURATION", "HUE"):
        if not 0 <= augment[key] <= 1 or (key == "CROP_MIN" and augment[key] == 0):
            yield f"TRAIN.AUGMENT.{key} must lie between 0 and 1, not be {augment[key]}"
    workers = cfg.DATA_LOADER.NUM_THREADS
    if workers < 0:
        yield f"DATA_LOADER.NUM_THREADS (--nw) must be at least 0, not {workers}"
    if train.BG_THRESH_LO > train.BG_THRESH_HI:
        yield (
            f"TRAIN.BG_THRESH_LO ({train.BG_THRESH_LO}) must not exceed "
            f"TRAIN.BG_THRESH_HI ({train.BG_THRESH_HI})"
        )
    if train.RPN_NEGATIVE_OVERLAP > train.RPN_POSITIVE_OVERLAP:
        yield (
            f"TRAIN.RPN_NEGATIVE_OVERLAP ({train.RPN_NEGATIVE_OVERLAP}) must not exceed "
            f"TRAIN.RPN_POSITIVE_OVERLAP ({train.RPN_POSITIVE_OVERLAP})"
        )
    if train.RPN_BATCH_SIZE_PER_IM > MOST_DRAWN_ANCHORS:
        yield (
            f"TRAIN.RPN_BATCH_SIZE_PER_IM is {train.RPN_BATCH_SIZE_PER_IM}, but at most "
            f"{MOST_DRAWN_ANCHORS} anchors of an image can be drawn"
        )
    if train.ASPECT_CROPPING and not 0 < train.ASPECT_LO <= train.ASPECT_HI:
        yield (
            f"TRAIN.ASPECT_LO ({train.ASPECT_LO}) must be positive and must not exceed "
            f"TRAIN.ASPECT_HI ({train.ASPECT_HI})"
        )
    if cfg.PIXEL_MEANS.size != 3:
        yield f"PIXEL_MEANS must hold three numbers, not {cfg.PIXEL_MEANS.size}"


def _schedule_problems(cfg: AttrDict) -> Iterator[str]:
    solver = cfg.SOLVER
    for key, values in {
        "SOLVER.BASE_LR (--lr)": [solver.BASE_LR],
        "SOLVER.GAMMA (--lr_decay_gamma)": [solver.GAMMA],
        "each of SOLVER.LRS": solver.LRS,
    }.items():
        # The value is left out: the batch size may have scaled what the user gave.
        # YAML reads 1e-2 within a list as text.
        if not all(isinstance(v, (int, float)) and 0 <= v < math.inf for v in values):
            yield f"{key} must be a finite number of at least 0, as 0.01 or 1.0e-2"
    if solver.LR_POLICY in ("steps_with_decay", "steps_with_lrs"):
        steps = list(solver.STEPS)
        if not steps or steps[0] != 0 or steps != sorted(steps):
            yield (
                f"SOLVER.LR_POLICY {solver.LR_POLICY} needs SOLVER.STEPS to rise from 0, "
                f"such as [0, 60000, 80000], not {steps}"
            )
        if solver.LR_POLICY == "steps_with_lrs" and len(solver.LRS) != len(steps):
            yield (
                f"SOLVER.LR_POLICY steps_with_lrs needs one rate in SOLVER.LRS "
                f"({len(solver.LRS)}) for each of SOLVER.STEPS ({len(steps)})"
            )
    if solver.LR_POLICY == "step" and solver.STEP_SIZE < 1:
        yield f"SOLVER.STEP_SIZE must be at least 1, not {solver.STEP_SIZE}"


def _pyramid_problems(cfg: AttrDict) -> Iterator[str]:
    fpn, body = cfg.FPN, cfg.MODEL.CONV_BODY
    for key in ("MULTILEVEL_ROIS", "MULTILEVEL_RPN"):
        if fpn[key] and not fpn.FPN_ON:
            yield f"FPN.{key} needs a feature pyramid: set FPN.FPN_ON True and an FPN.* CONV_BODY"
    one_map = body.startswith(("ResNet.", "VGG")) or body.endswith("_P2only_body")
    if fpn.FPN_ON and one_map:
        yield f"FPN.FPN_ON needs a backbone with a pyramid, but MODEL.CONV_BODY is {body}"
    if body.startswith("FPN.") and not one_map and not fpn.FPN_ON:
        yield f"MODEL.CONV_BODY {body} is a pyramid: set FPN.FPN_ON True"
    for low, high in (("ROI_MIN_LEVEL", "ROI_MAX_LEVEL"), ("RPN_MIN_LEVEL", "RPN_MAX_LEVEL")):
        if fpn[low] > fpn[high]:
            yield f"FPN.{low} ({fpn[low]}) must not exceed FPN.{high} ({fpn[high]})"
        if fpn.FPN_ON and not 2 <= fpn[low] <= 5:
            yield f"FPN.{low} is {fpn[low]} but must be a level of the backbone, 2 to 5"
        if fpn.FPN_ON and fpn[high] > 6 and not fpn.EXTRA_CONV_LEVELS:
            yield f"FPN.{high} {fpn[high]} needs FPN.EXTRA_CONV_LEVELS True: else 6 is the highest"
        if fpn.FPN_ON and fpn[high] - fpn[low] >= MOST_LEVELS:
            yield f"FPN.{low} {fpn[low]} to {high} {fpn[high]} are more than {MOST_LEVELS} levels"


def _augmentation_problems(cfg: AttrDict) -> Iterator[str]:
    """What test-time augmentation cannot do. RetinaNet does not consult it."""
    test = cfg.TEST
    if cfg.RETINANET.RETINANET_ON:
        return
    if test.BBOX_AUG.ENABLED:
        heuristics = test.BBOX_AUG.SCORE_HEUR, test.BBOX_AUG.COORD_HEUR
        keys = f"TEST.BBOX_AUG.SCORE_HEUR {heuristics[0]} and COORD_HEUR {heuristics[1]}"
        if set(heuristics) - set(BOX_HEURISTICS):
            yield f"{keys} must each be one of {', '.join(BOX_HEURISTICS)}"
        elif "UNION" in heuristics and heuristics[0] != heuristics[1]:
            yield f"{keys} must both be UNION or neither"
        elif cfg.RPN.RPN_ON and "UNION" not in heuristics:
            yield (
                f"{keys} need the same proposals in every view; a model with an RPN "
                "(MODEL.FASTER_RCNN) makes other ones for each: set both to UNION"
            )
    for name, allowed in (("MASK_AUG", MASK_HEURISTICS), ("KPS_AUG", KEYPOINT_HEURISTICS)):
        if test[name].ENABLED and test[name].HEUR not in allowed:
            yield f"TEST.{name}.HEUR is {test[name].HEUR} but must be one of {', '.join(allowed)}"
    for name in ("BBOX_AUG", "MASK_AUG"):
        if test[name].ENABLED and test[name].SCALE_SIZE_DEP:
            yield f"TEST.{name}.SCALE_SIZE_DEP has no meaning but for keypoints: set it to False"
    for name in ("BBOX_AUG", "MASK_AUG", "KPS_AUG"):
        numbers = (*test[name].SCALES, *test[name].ASPECT_RATIOS)
        if test[name].ENABLED and not all(number > 0 for number in numbers):
            yield f"TEST.{name}.SCALES and ASPECT_RATIOS must be positive numbers"


def _upsampling_problems(cfg: AttrDict) -> Iterator[str]:
    ratio, resolution, scale = cfg.MRCNN.UPSAMPLE_RATIO, cfg.MRCNN.RESOLUTION, cfg.KRCNN.UP_SCALE
    if cfg.MODEL.MASK_ON and ratio != 1 and (ratio < 1 or ratio % 2 or resolution % ratio):
        yield (
            f"MRCNN.UPSAMPLE_RATIO is {ratio} but must be 1, or an even number that divides "
            f"MRCNN.RESOLUTION ({resolution})"
        )
    if cfg.MODEL.KEYPOINTS_ON and scale > 1 and scale % 2:
        yield f"KRCNN.UP_SCALE is {scale} but must be even, or -1 for none"


def _model_problems(cfg: AttrDict, complete: bool) -> Iterator[str]:
    model = cfg.MODEL
    known = model.NUM_CLASSES != -1
    if not model.RPN_ONLY and (model.NUM_CLASSES < 2 if known else complete):
        yield (
            f"MODEL.NUM_CLASSES is {model.NUM_CLASSES} but must count the classes with the "
            "background; it comes from the data set, or set it"
        )
    if model.RPN_ONLY and (model.FASTER_RCNN or model.MASK_ON or model.KEYPOINTS_ON):
        yield "MODEL.RPN_ONLY excludes MODEL.FASTER_RCNN, MODEL.MASK_ON and MODEL.KEYPOINTS_ON"
    if cfg.RETINANET.RETINANET_ON:
        yield from _retinanet_problems(cfg)
    is_rfcn = model.TYPE.endswith("rfcn")
    has_box_head = not (model.RPN_ONLY or cfg.RETINANET.RETINANET_ON or is_rfcn)
    if has_box_head and not cfg.FAST_RCNN.ROI_BOX_HEAD:
        yield "FAST_RCNN.ROI_BOX_HEAD is empty; name a box head or set MODEL.RPN_ONLY True"
    if model.MASK_ON and not cfg.MRCNN.ROI_MASK_HEAD:
        yield "MODEL.MASK_ON needs a mask head: set MRCNN.ROI_MASK_HEAD"
    if model.KEYPOINTS_ON and cfg.KRCNN.NMS_OKS and cfg.KRCNN.NUM_KEYPOINTS != PERSON_KEYPOINTS:
        yield (
            f"KRCNN.NMS_OKS knows how far apart the {PERSON_KEYPOINTS} keypoints of persons may "
            f"be, not {cfg.KRCNN.NUM_KEYPOINTS} others: set it to False"
        )
    if model.KEYPOINTS_ON and not cfg.KRCNN.ROI_KEYPOINTS_HEAD:
        yield "MODEL.KEYPOINTS_ON needs a key point head: set KRCNN.ROI_KEYPOINTS_HEAD"
    box_head = (
        "MODEL.TYPE rfcn" if is_rfcn else f"FAST_RCNN.ROI_BOX_HEAD {cfg.FAST_RCNN.ROI_BOX_HEAD}"
    )
    if model.SHARE_RES5 and not box_head.endswith("roi_conv5_head"):
        yield (
            f"MRCNN.ROI_MASK_HEAD {cfg.MRCNN.ROI_MASK_HEAD} shares its res5 with the box head, "
            f"but {box_head} has none"
        )
    load_weights = model.LOAD_IMAGENET_PRETRAINED_WEIGHTS
    if load_weights and not cfg.RESNETS.IMAGENET_PRETRAINED_WEIGHTS:
        yield (
            "RESNETS.IMAGENET_PRETRAINED_WEIGHTS is empty; name the weights' file, or do without "
            "by MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS False"
        )


def _retinanet_problems(cfg: AttrDict) -> Iterator[str]:
    retinanet = cfg.RETINANET
    for key in ("RPN_ONLY", "FASTER_RCNN", "MASK_ON", "KEYPOINTS_ON"):
        if cfg.MODEL[key]:
            yield f"RETINANET.RETINANET_ON excludes MODEL.{key}: set it to False"
    for key in ("FPN_ON", "MULTILEVEL_RPN"):
        if not cfg.FPN[key]:
            yield f"RETINANET.RETINANET_ON predicts on a pyramid's levels: set FPN.{key} to True"
    if retinanet.NEGATIVE_OVERLAP > retinanet.POSITIVE_OVERLAP:
        yield (
            f"RETINANET.NEGATIVE_OVERLAP ({retinanet.NEGATIVE_OVERLAP}) must not exceed "
            f"RETINANET.POSITIVE_OVERLAP ({retinanet.POSITIVE_OVERLAP})"
        )


def _norm_problems(cfg: AttrDict) -> Iterator[str]:
    resnets = cfg.RESNETS
    if "ResNet" not in cfg.MODEL.CONV_BODY:
        return
    # Detectron goes by the functions, this family's weight loading by USE_GN: they must say the
    # same, or a config of Detectron's without USE_GN would quietly become another network.
    for key in ("TRANS_FUNC", "STEM_FUNC", "SHORTCUT_FUNC"):
        if ("_gn_" in resnets[key]) != resnets.USE_GN:
            yield (
                f"RESNETS.{key} {resnets[key]} contradicts RESNETS.USE_GN {resnets.USE_GN}: "
                "set both for group normalisation, or neither"
            )


def _group_norm_problems(cfg: AttrDict) -> Iterator[str]:
    per_group, groups = cfg.GROUP_NORM.DIM_PER_GP, cfg.GROUP_NORM.NUM_GROUPS
    widths = _normalised_widths(cfg)
    if not widths:
        return
    if (per_group > 0) == (groups > 0):
        yield (
            f"set one of GROUP_NORM.DIM_PER_GP ({per_group}) and GROUP_NORM.NUM_GROUPS "
            f"({groups}) and make the other -1"
        )
        return
    key, divisor = ("DIM_PER_GP", per_group) if per_group > 0 else ("NUM_GROUPS", groups)
    for source, width in widths.items():
        if width % divisor:
            yield f"{source} gives {width} channels, which GROUP_NORM.{key} {divisor} cannot divide"


def _normalised_widths(cfg: AttrDict) -> dict[str, int]:
    """Config key -> smallest number of channels that it sends through group normalisation."""
    resnets = cfg.RESNETS
    widths = {}
    if "ResNet" in cfg.MODEL.CONV_BODY and resnets.USE_GN:
        widths["RESNETS.STEM_OUT_CHANNELS"] = resnets.STEM_OUT_CHANNELS
        widths["RESNETS.WIDTH_PER_GROUP"] = resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP
        widths["RESNETS.RES2_OUT_CHANNELS"] = resnets.RES2_OUT_CHANNELS
    if cfg.FPN.FPN_ON and cfg.FPN.USE_GN:
        widths["FPN.DIM"] = cfg.FPN.DIM
    if cfg.FAST_RCNN.ROI_BOX_HEAD.endswith("_gn_head"):
        widths["FAST_RCNN.CONV_HEAD_DIM"] = cfg.FAST_RCNN.CONV_HEAD_DIM
    if cfg.MODEL.MASK_ON and cfg.MRCNN.ROI_MASK_HEAD.endswith("_gn"):
        widths["MRCNN.DIM_REDUCED"] = cfg.MRCNN.DIM_REDUCED
    return widths
