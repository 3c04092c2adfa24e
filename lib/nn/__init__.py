"""Layers that torch lacks, initialisers, and the custom DataParallel (`import nn as mynn`)."""

from nn import init
from nn.affine import AffineChannel2d
from nn.convolution import conv_norm, conv_norm_lateral, conv_stack
from nn.focal_loss import softmax_focal_loss
from nn.parallel import DataParallel
from nn.stem import conv_norm_stem
from nn.upsample import BilinearInterpolation2d

__all__ = [
    "AffineChannel2d",
    "BilinearInterpolation2d",
    "DataParallel",
    "conv_norm",
    "conv_norm_lateral",
    "conv_norm_stem",
    "conv_stack",
    "init",
    "softmax_focal_loss",
]
