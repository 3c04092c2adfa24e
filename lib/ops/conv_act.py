"""A convolution and what follows it (scale, bias, residual, ReLU): one differentiable operator."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library  # noqa: F401


def conv_act(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    transposed: bool = False,
    groups: int = 1,
) -> Tensor:
    """act(conv(x, weight * scale) + bias + residual), rounded once after the convolution.

    On CUDA a convolution of torch adds its bias in a kernel of its own, ReLU takes another, and the
    gradients two more; here all that is one pass over memory each way.

    In half precision on CUDA cuDNN may do all of it, whose ReLU may take NaN for 0.

    Args:
        x: (N, C, H, W), cast as autocast casts a convolution's input; so is the weight.
        weight: as for `torch.nn.functional.conv2d`, or `conv_transpose2d` if transposed.
        scale: (C_out,) factors of the weight's rows, without gradient; not if transposed.
        bias: (C_out,), in any floating dtype.
        residual: like the result, or of half its height and width: then it is upsampled by 2,
            nearest neighbour.
        relu: whether act is ReLU or nothing.

    Returns:
        (N, C_out, H', W') in the memory format that the convolution gives.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit.
        NotImplementedError: the gradient is differentiated again.
    """
    return torch.ops.detectron.conv_act(
        x, weight, scale, bias, residual, relu, stride, padding, dilation, transposed, groups
    )


@torch.library.register_fake("detectron::bias_act_")
def _bias_act_fake(y: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> None:
    return None


@torch.library.register_fake("detectron::relu_backward")
def _relu_backward_fake(grad: Tensor, y: Tensor, with_sum: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), _sums(y, y.shape[1] if with_sum else 0)


@torch.library.register_fake("detectron::channel_sum")
def _channel_sum_fake(map: Tensor) -> Tensor:
    return _sums(map, map.shape[1])


def _sums(like: Tensor, count: int) -> Tensor:
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty(count, dtype=wide)
