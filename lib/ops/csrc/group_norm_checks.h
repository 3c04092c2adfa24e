// Argument checks of group_norm on both devices.
#pragma once

#include <optional>

#include "roi_host.h"

namespace detectron {

inline void check_group_norm(
    const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups) {
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": x must be (N, C, H, W), not ", x.sizes());
  const int64_t channels = x.size(1);
  TORCH_CHECK_VALUE(
      groups > 0 && channels > 0 && channels % groups == 0, op, ": ", channels,
      " channels do not divide into ", groups, " groups");
  roi_dtype(op, x.scalar_type());
  for (const Tensor& parameter : {weight, bias}) {
    TORCH_CHECK_VALUE(
        parameter.dim() == 1 && parameter.size(0) == channels, op,
        ": weight and bias must be (C,) with C = ", channels, ", not ", parameter.sizes());
    check_device(parameter, "group_norm: weight or bias", x, "x");
    check_dtype(parameter, "group_norm: weight or bias", accumulate_dtype(x.scalar_type()));
  }
}

inline void check_group_norm_map(
    const char* name, const std::optional<Tensor>& map, const Tensor& x) {
  if (!map.has_value()) return;
  TORCH_CHECK_VALUE(
      map->sizes() == x.sizes(), name, " must be like x ", x.sizes(), ", not ", map->sizes());
  check_device(*map, name, x, "x");
  check_dtype(*map, name, x.scalar_type());
}

// channels_last or contiguous, as x is; what is neither is copied.
inline at::MemoryFormat group_norm_layout(const Tensor& x) {
  return memory_format(features_are_channels_last({x}));
}

}  // namespace detectron
