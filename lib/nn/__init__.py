"""Layers that torch lacks, initialisers, and the custom DataParallel (`import nn as mynn`)."""

from nn import init
from nn.affine import AffineChannel2d, conv_norm
from nn.focal_loss import sigmoid_focal_loss, softmax_focal_loss
from nn.parallel import DataParallel
from nn.upsample import BilinearInterpolation2d

__all__ = [
    "AffineChannel2d",
    "BilinearInterpolation2d",
    "DataParallel",
    "conv_norm",
    "init",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
]
