// Argument checks and layouts of the operators around convolutions, on both devices.
#pragma once

#include <limits>
#include <optional>

#include "checks.h"

namespace detectron {

// The layout that a map is in: channels last only where that is unambiguous.
inline at::MemoryFormat layout_of(const Tensor& map) {
  const bool last = map.is_contiguous(at::MemoryFormat::ChannelsLast) && !map.is_contiguous();
  return last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

inline bool is_half_of(const Tensor& small, const Tensor& map) {
  return small.dim() == 4 && small.size(0) == map.size(0) && small.size(1) == map.size(1) &&
      2 * small.size(2) == map.size(2) && 2 * small.size(3) == map.size(3);
}

inline void check_map(const char* op, const char* name, const Tensor& map) {
  TORCH_CHECK_VALUE(map.dim() == 4, op, ": ", name, " must be (N, C, H, W), not ", map.sizes());
  check_floating(map, op);
}

inline void check_bias_act(
    const Tensor& y, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual) {
  check_map("bias_act_", "y", y);
  TORCH_CHECK_VALUE(
      y.is_contiguous() || y.is_contiguous(at::MemoryFormat::ChannelsLast),
      "bias_act_: y must be contiguous or channels_last");
  if (bias.has_value()) {
    TORCH_CHECK_VALUE(
        bias->dim() == 1 && bias->size(0) == y.size(1), "bias_act_: bias must be (C,) with C = ",
        y.size(1), ", not ", bias->sizes());
    check_device(*bias, "bias_act_: bias", y, "y");
    check_floating(*bias, "bias_act_: bias");
  }
  if (residual.has_value()) {
    TORCH_CHECK_VALUE(
        residual->sizes() == y.sizes() || is_half_of(*residual, y), "bias_act_: residual must be ",
        y.sizes(), " or of half that height and width, not ", residual->sizes());
    check_device(*residual, "bias_act_: residual", y, "y");
    check_dtype(*residual, "bias_act_: residual", y.scalar_type());
  }
}

inline void check_relu_backward(const Tensor& grad, const Tensor& y) {
  check_map("relu_backward", "y", y);
  TORCH_CHECK_VALUE(
      grad.sizes() == y.sizes(), "relu_backward: grad must be like y ", y.sizes(), ", not ",
      grad.sizes());
  check_device(grad, "relu_backward: grad", y, "y");
  check_dtype(grad, "relu_backward: grad", y.scalar_type());
}

inline void check_upsample_add(const Tensor& lateral, const Tensor& top) {
  check_map("upsample_add", "lateral", lateral);
  TORCH_CHECK_VALUE(
      is_half_of(top, lateral), "upsample_add: top must be half as high and wide as lateral ",
      lateral.sizes(), ", not ", top.sizes());
  check_device(top, "upsample_add: top", lateral, "lateral");
  check_dtype(top, "upsample_add: top", lateral.scalar_type());
}

inline void check_sum_2x2(const Tensor& map) {
  check_map("sum_2x2", "the map", map);
  TORCH_CHECK_VALUE(
      map.size(2) % 2 == 0 && map.size(3) % 2 == 0, "sum_2x2: height and width must be even, not ",
      map.sizes());
}

}  // namespace detectron
