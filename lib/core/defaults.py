"""Every config key with its default value.

The type of a default is the type its key keeps: `core.config` refuses a value of another type
(an int is welcome where a float is expected). Sizes are pixels of the network input unless a
comment says otherwise; "overlap" is intersection over union with +1 widths.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from core.attr_dict import AttrDict

_ROOT_DIR = Path(__file__).resolve().parents[2]

AUGMENT = AttrDict(
    SCALE_JITTER=(1.0, 1.0),  # multiply the scale by a draw between; usual (0.1, 2.0)
    CROP_PROB=0.0,  # this share of the images is cut to a random window around an object
    CROP_MIN=0.5,  # whose sides are at least this share of the image's
    BRIGHTNESS=0.0,  # factors are drawn from 1 - v to 1 + v
    CONTRAST=0.0,
    SATURATION=0.0,
    HUE=0.0,  # turn drawn from -v to v, 1 being the full circle
)

TRAIN = AttrDict(
    # -- what is trained on
    DATASETS=(),  # catalog names; the training script fills them in from --dataset
    SCALES=(600,),  # length of an image's shorter side; one is drawn for each image
    MAX_SIZE=1000,  # the longer side is never scaled beyond this
    IMS_PER_BATCH=2,  # images per GPU and forward pass
    USE_FLIPPED=True,  # add a mirrored copy of every image
    ASPECT_GROUPING=True,  # batch images of similar width/height together (less padding)
    ASPECT_CROPPING=False,  # crop very long or very wide images to the two ratios below
    ASPECT_HI=2,  # largest width/height left uncropped
    ASPECT_LO=0.5,  # smallest width/height left uncropped
    GT_MIN_AREA=-1,  # drop objects whose annotated area (px^2) is below this; -1 keeps all
    KEEP_IMAGES_WITHOUT_OBJECTS=False,  # train on images without objects too
    AUGMENT=AUGMENT,  # changes drawn anew each time an image is used, besides flips and SCALES
    # -- RoIs sampled for the heads
    BATCH_SIZE_PER_IM=64,  # RoIs per image
    FG_FRACTION=0.25,  # at most this share of them is foreground
    FG_THRESH=0.5,  # foreground: overlap with an object at least this
    BG_THRESH_HI=0.5,  # background: overlap in [BG_THRESH_LO, BG_THRESH_HI)
    BG_THRESH_LO=0.0,
    CROWD_FILTER_THRESH=0.7,  # ignore file proposals covered by a crowd region beyond this share
    # -- proposals read from files (no RPN)
    PROPOSAL_FILES=(),  # one per data set, in the same order
    BBOX_THRESH=0.5,  # overlap from which a file proposal has a regression target
    # -- box regression targets
    BBOX_NORMALIZE_TARGETS=True,  # kept for old configs; MODEL.BBOX_REG_WEIGHTS does the scaling
    BBOX_INSIDE_WEIGHTS=(1.0, 1.0, 1.0, 1.0),  # kept for old configs; ones are used
    BBOX_NORMALIZE_TARGETS_PRECOMPUTED=False,  # kept for old configs
    BBOX_NORMALIZE_MEANS=(0.0, 0.0, 0.0, 0.0),  # kept for old configs
    BBOX_NORMALIZE_STDS=(0.1, 0.1, 0.2, 0.2),  # kept for old configs
    # -- anchors sampled for the RPN
    RPN_POSITIVE_OVERLAP=0.7,  # foreground anchor: overlap at least this, or an object's best
    RPN_NEGATIVE_OVERLAP=0.3,  # background anchor: overlap below this with every object
    RPN_BATCH_SIZE_PER_IM=256,  # anchors per image in the loss
    RPN_FG_FRACTION=0.5,  # at most this share of them is foreground
    RPN_STRADDLE_THRESH=0,  # ignore anchors that leave the image by more; negative: ignore none
    # -- proposals the RPN hands on
    RPN_PRE_NMS_TOP_N=12000,  # best anchors kept before NMS (per level with FPN)
    RPN_NMS_THRESH=0.7,  # overlap from which a weaker proposal is suppressed
    RPN_POST_NMS_TOP_N=2000,  # proposals kept after NMS (per level, and over all levels)
    RPN_MIN_SIZE=0,  # drop proposals with a side below this (pixels of the original image)
    # -- the rest
    SNAPSHOT_ITERS=20000,  # steps between checkpoints, divided by NUM_GPUS
    KEEP_CHECKPOINTS=0,  # so many of the last ones; 0 keeps all
    MAX_BAD_STEPS=0,  # steps that are left out for a loss that is not finite; one more ends it
    FREEZE_CONV_BODY=False,  # train the heads only
)

DATA_LOADER = AttrDict(
    NUM_THREADS=4,  # processes (when testing, threads) that read images; 0: the main one does
    ON_BAD_IMAGE="raise",  # an image that cannot be read: raise stops, skip takes another
)

BBOX_AUG = AttrDict(
    ENABLED=False,  # detect boxes on several versions of the image
    SCORE_HEUR="UNION",  # how scores are combined: ID, AVG or UNION
    COORD_HEUR="UNION",  # how boxes are combined: ID, AVG or UNION
    H_FLIP=False,  # add the mirrored image
    SCALES=(),  # add these shorter sides
    MAX_SIZE=4000,  # longest side of those
    SCALE_H_FLIP=False,  # mirror each of those too
    SCALE_SIZE_DEP=False,  # use a scale only for objects of suitable size
    AREA_TH_LO=2500,  # at that: objects below this area (px^2) are small
    AREA_TH_HI=32400,  # at that: objects above this area (px^2) are large
    ASPECT_RATIOS=(),  # add images whose width is stretched by these factors
    ASPECT_RATIO_H_FLIP=False,  # mirror each of those too
)

MASK_AUG = AttrDict(
    ENABLED=False,  # predict masks on several versions of the image
    HEUR="SOFT_AVG",  # how they are combined: SOFT_AVG, SOFT_MAX or LOGIT_AVG
    H_FLIP=False,  # add the mirrored image
    SCALES=(),  # add these shorter sides
    MAX_SIZE=4000,  # longest side of those
    SCALE_H_FLIP=False,  # mirror each of those too
    SCALE_SIZE_DEP=False,  # use a scale only for objects of suitable size
    AREA_TH=32400,  # at that: area (px^2) between small and large objects
    ASPECT_RATIOS=(),  # add images whose width is stretched by these factors
    ASPECT_RATIO_H_FLIP=False,  # mirror each of those too
)

KPS_AUG = AttrDict(
    ENABLED=False,  # predict key points on several versions of the image
    HEUR="HM_AVG",  # how heat maps are combined: HM_AVG or HM_MAX
    H_FLIP=False,  # add the mirrored image
    SCALES=(),  # add these shorter sides
    MAX_SIZE=4000,  # longest side of those
    SCALE_H_FLIP=False,  # mirror each of those too
    SCALE_SIZE_DEP=False,  # use a scale only for objects of suitable size
    AREA_TH=32400,  # at that: area (px^2) between small and large objects
    ASPECT_RATIOS=(),  # add images whose width is stretched by these factors
    ASPECT_RATIO_H_FLIP=False,  # mirror each of those too
)

SOFT_NMS = AttrDict(
    ENABLED=False,  # lower the scores of overlapping boxes in place of dropping them
    METHOD="linear",  # linear or gaussian
    SIGMA=0.5,  # width of the gaussian
)

BBOX_VOTE = AttrDict(
    ENABLED=False,  # refine each kept box with the boxes that NMS dropped
    VOTE_TH=0.8,  # overlap from which a box has a vote
    SCORING_METHOD="ID",  # ID, TEMP_AVG, AVG, IOU_AVG, GENERALIZED_AVG or QUASI_SUM
    SCORING_METHOD_BETA=1.0,  # parameter of some of those methods
)

TEST = AttrDict(
    # -- what is tested on
    DATASETS=(),  # catalog names; the test script fills them in from --dataset
    SCALE=600,  # length of an image's shorter side
    MAX_SIZE=1000,  # the longer side is never scaled beyond this
    # -- detections
    NMS=0.3,  # overlap from which a weaker detection of the same class is suppressed
    SCORE_THRESH=0.05,  # detections must score more than this
    DETECTIONS_PER_IM=100,  # best detections kept per image, over all classes
    BBOX_REG=True,  # apply the predicted box deltas
    # -- proposals
    PRECOMPUTED_PROPOSALS=True,  # inferred: proposals come from files, there is no RPN
    PROPOSAL_FILES=(),  # one per data set, in the same order
    PROPOSAL_LIMIT=2000,  # file proposals used per image
    CLASS_SPECIFIC_AR=False,  # recall of proposals: first of each class, then over the classes
    RPN_PRE_NMS_TOP_N=12000,  # as the keys of the same names in TRAIN
    RPN_NMS_THRESH=0.7,
    RPN_POST_NMS_TOP_N=2000,
    RPN_MIN_SIZE=0,
    # -- evaluation
    COMPETITION_MODE=True,  # keep COCO result files; False: random names, removed after scoring
    COCO_EVALUATOR="fast",  # or pycocotools: the same numbers from COCO's own code
    FORCE_JSON_DATASET_EVAL=False,  # score Pascal VOC and Cityscapes by COCO's rules too
    # -- slower, better detections
    BBOX_AUG=BBOX_AUG,
    MASK_AUG=MASK_AUG,
    KPS_AUG=KPS_AUG,
    SOFT_NMS=SOFT_NMS,
    BBOX_VOTE=BBOX_VOTE,
)

MODEL = AttrDict(
    TYPE="",  # generalized_rcnn (all R-CNNs), retinanet, rfcn, ResNet50_rfcn or ResNet101_rfcn
    CONV_BODY="",  # backbone, as file.name in lib/modeling
    NUM_CLASSES=-1,  # classes with background; comes from the data set
    CLS_AGNOSTIC_BBOX_REG=False,  # one box regressor for all classes
    BBOX_REG_WEIGHTS=(10.0, 10.0, 5.0, 5.0),  # scale of dx, dy, dw, dh in the box head
    FASTER_RCNN=False,  # train an RPN together with the heads
    MASK_ON=False,  # predict masks
    KEYPOINTS_ON=False,  # predict key points
    RPN_ONLY=False,  # an RPN and nothing else
    SHARE_RES5=False,  # inferred: mask and box head share their res5 stage
    LOAD_IMAGENET_PRETRAINED_WEIGHTS=True,  # start the backbone from ImageNet weights
    UNSUPERVISED_POSE=False,  # kept for old configs
    COMPILE=False,  # training: compile backbone and heads with torch.compile
    CUDA_GRAPHS=True,  # on one GPU: record the work for each shape of batch once, then replay it
)

RETINANET = AttrDict(
    RETINANET_ON=False,  # the model is a RetinaNet
    ASPECT_RATIOS=(0.5, 1.0, 2.0),  # anchors: height/width
    SCALES_PER_OCTAVE=3,  # anchors: sizes per level
    ANCHOR_SCALE=4,  # anchors: smallest size is this times the stride
    NUM_CONVS=4,  # convolutions in each tower
    BBOX_REG_WEIGHT=1.0,  # weight of the box loss
    BBOX_REG_BETA=0.11,  # smooth L1: where it turns linear
    PRE_NMS_TOP_N=1000,  # candidates kept per level before NMS
    POSITIVE_OVERLAP=0.5,  # foreground anchor: overlap at least this
    NEGATIVE_OVERLAP=0.4,  # background anchor: overlap below this
    LOSS_ALPHA=0.25,  # focal loss: weight of the foreground
    LOSS_GAMMA=2.0,  # focal loss: exponent
    PRIOR_PROB=0.01,  # probability of foreground an untrained model gives
    SHARE_CLS_BBOX_TOWER=False,  # boxes are predicted from the class tower
    CLASS_SPECIFIC_BBOX=False,  # one box regressor per class
    SOFTMAX=False,  # softmax over the classes, not a sigmoid each
    INFERENCE_TH=0.05,  # candidates must score more than this
)

SOLVER = AttrDict(
    TYPE="SGD",  # SGD, Adam or AdamW
    BASE_LR=0.001,  # learning rate after warm-up, for the config's own batch size
    LR_POLICY="step",  # step, steps_with_decay, steps_with_lrs, cosine_decay or exp_decay
    GAMMA=0.1,  # factor of each decay (exp_decay: last rate over first)
    STEP_SIZE=30000,  # step: steps between decays
    STEPS=[],  # steps_with_*: where the rate changes; the first is 0
    LRS=[],  # steps_with_lrs: the rate from each of STEPS on
    MAX_ITER=40000,  # number of steps, for the config's own batch size
    MOMENTUM=0.9,  # of SGD; beta1 of the others is torch's
    WEIGHT_DECAY=0.0005,  # of weights
    WEIGHT_DECAY_GN=0.0,  # of group normalisation's scales
    BIAS_DOUBLE_LR=True,  # biases learn twice as fast
    BIAS_WEIGHT_DECAY=False,  # biases decay too
    WARM_UP_ITERS=500,  # the rate is lowered during this many first steps
    WARM_UP_FACTOR=1.0 / 3.0,  # by this factor at step 0
    WARM_UP_METHOD="linear",  # linear rises from there; constant stays there
    SCALE_MOMENTUM=True,  # let SGD's velocity follow a jump of the rate
    SCALE_MOMENTUM_THRESHOLD=1.1,  # a jump is a change by more than this factor
    SCALE_MOMENTUM_TWICE=False,  # at a jump scale it once more, as Detectron.pytorch did
    LOG_LR_CHANGE_THRESHOLD=1.1,  # log changes of the rate by more than this factor
)

FAST_RCNN = AttrDict(
    ROI_BOX_HEAD="",  # box head, as file.name in lib/modeling
    MLP_HEAD_DIM=1024,  # width of its fully connected layers
    CONV_HEAD_DIM=256,  # width of its convolutions
    NUM_STACKED_CONVS=4,  # number of its convolutions
    ROI_XFORM_METHOD="RoIPoolF",  # RoIPoolF, RoICrop or RoIAlign
    ROI_XFORM_SAMPLING_RATIO=0,  # RoIAlign: samples per bin and side; 0 follows the RoI's size
    ROI_XFORM_RESOLUTION=14,  # side of the pooled features
)

RPN = AttrDict(
    RPN_ON=False,  # inferred from MODEL.FASTER_RCNN and MODEL.RPN_ONLY
    OUT_DIM_AS_IN_DIM=True,  # hidden layer as wide as the features
    OUT_DIM=512,  # its width otherwise
    CLS_ACTIVATION="sigmoid",  # sigmoid or softmax
    SIZES=(64, 128, 256, 512),  # anchor sizes (single-level RPN)
    STRIDE=16,  # of the features (single-level RPN)
    ASPECT_RATIOS=(0.5, 1, 2),  # anchors: height/width (single-level RPN)
)

FPN = AttrDict(
    FPN_ON=False,  # the backbone returns a feature pyramid
    DIM=256,  # channels of its levels
    ZERO_INIT_LATERAL=False,  # start with silent lateral connections
    COARSEST_STRIDE=32,  # image batches are padded to a multiple of this
    MULTILEVEL_ROIS=False,  # pool each RoI from the level that suits its size, not the finest
    ROI_CANONICAL_SCALE=224,  # an RoI of this size ...
    ROI_CANONICAL_LEVEL=4,  # ... belongs to this level
    ROI_MAX_LEVEL=5,  # coarsest level that RoIs are pooled from
    ROI_MIN_LEVEL=2,  # finest level that RoIs are pooled from
    MULTILEVEL_RPN=False,  # run the RPN on every level, not the finest alone
    RPN_MAX_LEVEL=6,  # coarsest level of the RPN
    RPN_MIN_LEVEL=2,  # finest level of the RPN
    RPN_ASPECT_RATIOS=(0.5, 1, 2),  # anchors: height/width
    RPN_ANCHOR_START_SIZE=32,  # anchor size on the finest level; doubles with each level
    RPN_COLLECT_SCALE=1,  # inferred: factor of RPN_POST_NMS_TOP_N when levels are collected
    EXTRA_CONV_LEVELS=False,  # make levels above 5 with strided convolutions
    USE_GN=False,  # group normalisation in the pyramid
)

MRCNN = AttrDict(
    ROI_MASK_HEAD="",  # mask head, as file.name in lib/modeling
    RESOLUTION=14,  # side of the predicted mask
    ROI_XFORM_METHOD="RoIAlign",  # RoIPoolF, RoICrop or RoIAlign
    ROI_XFORM_RESOLUTION=7,  # side of the pooled features
    ROI_XFORM_SAMPLING_RATIO=0,  # RoIAlign: samples per bin and side; 0 follows the RoI's size
    DIM_REDUCED=256,  # channels of the head
    DILATION=2,  # of the head's convolutions
    UPSAMPLE_RATIO=1,  # bilinear enlargement of the predicted mask
    USE_FC_OUTPUT=False,  # predict the mask with a fully connected layer
    CONV_INIT="GaussianFill",  # GaussianFill or MSRAFill
    CLS_SPECIFIC_MASK=True,  # one mask per class, not one for all
    WEIGHT_LOSS_MASK=1.0,  # weight of the mask loss
    THRESH_BINARIZE=0.5,  # a pixel belongs to the object if its probability exceeds this
    MEMORY_EFFICIENT_LOSS=True,  # kept for old configs; the loss never makes the large tensor
)

KRCNN = AttrDict(
    ROI_KEYPOINTS_HEAD="",  # key point head, as file.name in lib/modeling
    HEATMAP_SIZE=-1,  # side of the predicted heat maps
    UP_SCALE=-1,  # bilinear enlargement of the heat maps; -1 for none
    USE_DECONV=False,  # enlarge the features before the last layer
    DECONV_DIM=256,  # channels of that layer
    USE_DECONV_OUTPUT=False,  # the last layer enlarges too
    DILATION=1,  # of the conv5 head
    DECONV_KERNEL=4,  # kernel of the enlarging layers
    NUM_KEYPOINTS=-1,  # key points per object; comes from the data set
    NUM_STACKED_CONVS=8,  # convolutions in the head
    CONV_HEAD_DIM=256,  # their channels
    CONV_HEAD_KERNEL=3,  # their kernel
    CONV_INIT="GaussianFill",  # GaussianFill or MSRAFill
    NMS_OKS=False,  # suppress detections by key point similarity
    KEYPOINT_CONFIDENCE="bbox",  # score of a detection: bbox, logit or prob
    ROI_XFORM_METHOD="RoIAlign",  # RoIPoolF, RoICrop or RoIAlign
    ROI_XFORM_RESOLUTION=7,  # side of the pooled features
    ROI_XFORM_SAMPLING_RATIO=0,  # RoIAlign: samples per bin and side; 0 follows the RoI's size
    MIN_KEYPOINT_COUNT_FOR_VALID_MINIBATCH=20,  # file proposals: redraw batches with fewer
    INFERENCE_MIN_SIZE=0,  # heat maps are enlarged to at least this side
    LOSS_WEIGHT=1.0,  # weight of the key point loss
    NORMALIZE_BY_VISIBLE_KEYPOINTS=True,  # divide the loss by the visible points, or a constant
)

RFCN = AttrDict(
    PS_GRID_SIZE=3,  # side of the grid of position-sensitive scores
)

RESNETS = AttrDict(
    NUM_GROUPS=1,  # groups of the 3x3 convolutions; more than 1 makes a ResNeXt
    WIDTH_PER_GROUP=64,  # inner channels per group in res2; doubles with each stage
    STEM_OUT_CHANNELS=64,  # channels of the first convolution
    RES2_OUT_CHANNELS=256,  # channels res2 returns; doubles with each stage
    STRIDE_1X1=True,  # stride in a block's first 1x1 convolution, not its 3x3
    TRANS_FUNC="bottleneck_transformation",  # or bottleneck_gn_transformation
    STEM_FUNC="basic_bn_stem",  # or basic_gn_stem
    SHORTCUT_FUNC="basic_bn_shortcut",  # or basic_gn_shortcut
    RES5_DILATION=1,  # of the 3x3 convolutions in res5; 2 keeps stride 16
    FREEZE_AT=2,  # stages up to this one are not trained: 0 (none), 2, 3, 4 or 5
    IMAGENET_PRETRAINED_WEIGHTS="",  # any backbone's; .pth or .pkl, relative to the repository
    IMAGENET_PRETRAINED_PIXELS="auto",  # that file's: bgr255, rgb1 (torchvision's) or by its name
    USE_GN=False,  # group normalisation, not frozen affine layers
)

GROUP_NORM = AttrDict(
    DIM_PER_GP=-1,  # channels per group; -1 where NUM_GROUPS rules
    NUM_GROUPS=32,  # groups; -1 where DIM_PER_GP rules
    EPSILON=1e-5,  # added to the variance
)

DEFAULTS = AttrDict(
    TRAIN=TRAIN,
    DATA_LOADER=DATA_LOADER,
    TEST=TEST,
    MODEL=MODEL,
    RETINANET=RETINANET,
    SOLVER=SOLVER,
    FAST_RCNN=FAST_RCNN,
    RPN=RPN,
    FPN=FPN,
    MRCNN=MRCNN,
    KRCNN=KRCNN,
    RFCN=RFCN,
    RESNETS=RESNETS,
    GROUP_NORM=GROUP_NORM,
    NUM_GPUS=1,  # GPUs the schedule was made for; scripts use what is there and rescale
    DEDUP_BOXES=1.0 / 16.0,  # file proposals equal after this scaling are computed once; 0: off
    BBOX_XFORM_CLIP=np.float64(math.log(1000.0 / 16.0)),  # largest dw, dh when decoding boxes
    PIXEL_MEANS=np.array([[[102.9801, 115.9465, 122.7717]]]),  # of blue, green, red
    RNG_SEED=3,  # seed of every random draw
    DETERMINISTIC=False,  # repeat a GPU's results bit for bit, more slowly
    EPS=1e-14,  # a small number
    ROOT_DIR=str(_ROOT_DIR),  # the repository
    OUTPUT_DIR="Outputs",  # checkpoints, logs and results, relative to the working directory
    DATA_DIR=str(_ROOT_DIR / "data"),  # where the catalog looks for data sets
    MATLAB="matlab",  # kept for old configs
    VIS=False,  # draw detections while testing
    VIS_TH=0.9,  # of those: lowest score drawn
    # Testing fails if results differ: [data set, box | mask | keypoint | box_proposal, metric, v]
    # with v the value, or [mean, standard deviation].
    EXPECTED_RESULTS=[],
    EXPECTED_RESULTS_RTOL=0.1,  # a value may differ by ATOL + RTOL * value
    EXPECTED_RESULTS_ATOL=0.005,
    EXPECTED_RESULTS_SIGMA_TOL=4,  # a result must lie nearer to the mean than so many deviations
    EXPECTED_RESULTS_EMAIL="",  # kept for old configs: no mail is sent
    POOLING_MODE="crop",  # kept for old configs
    POOLING_SIZE=7,  # kept for old configs
    CROP_RESIZE_WITH_MAX_POOL=True,  # RoICrop: crop twice as fine, then max pool
    CUDA=False,  # inferred: the model runs on a GPU
    DEBUG=False,  # load the first 100 images only, without a cache
    PYTORCH_VERSION_LESS_THAN_040=False,  # kept for old configs
)
