"""Layers that torch lacks, initialisers, and the custom DataParallel (`import nn as mynn`)."""

from nn import init
from nn.affine import AffineChannel2d, conv_norm
from nn.parallel import DataParallel
from nn.upsample import BilinearInterpolation2d

__all__ = ["AffineChannel2d", "BilinearInterpolation2d", "DataParallel", "conv_norm", "init"]
