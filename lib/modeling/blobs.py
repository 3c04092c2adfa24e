"""Pieces of the mapping from parameter names to the blob names of Detectron's `.pkl` files."""

from __future__ import annotations


def layer_blobs(module: str, blob: str) -> dict[str, str]:
    """A layer with weight and bias: `module.weight` is `blob_w`, `module.bias` is `blob_b`."""
    return {f"{module}.weight": f"{blob}_w", f"{module}.bias": f"{blob}_b"}


def conv_norm_blobs(conv: str, norm: str, conv_blob: str, norm_blob: str) -> dict[str, str]:
    """A convolution without bias and the norm after it (`_s` scale, `_b` shift)."""
    return {
        f"{conv}.weight": f"{conv_blob}_w",
        f"{norm}.weight": f"{norm_blob}_s",
        f"{norm}.bias": f"{norm_blob}_b",
    }
