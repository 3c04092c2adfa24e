// Entry points of the operators that are made of others, on every device; see library.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace detectron {

using at::Tensor;

Tensor conv_act(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, bool relu,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
    int64_t groups);
Tensor upsample_add(const Tensor& lateral, const Tensor& top);

}  // namespace detectron
