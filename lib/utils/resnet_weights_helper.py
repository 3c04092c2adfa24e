"""The family's name for `utils.imagenet_weights`, which is not for ResNets alone."""

from utils.imagenet_weights import load_pretrained_imagenet_weights

__all__ = ["load_pretrained_imagenet_weights"]
