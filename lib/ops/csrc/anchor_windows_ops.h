// The operators anchor_windows and anchor_windows_backward of either device, for library.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace detectron {

#define ANCHOR_WINDOWS(device)                                                                      \
  namespace device {                                                                               \
  at::Tensor anchor_windows(                                                                       \
      at::TensorList features, const at::Tensor& index, int64_t num_anchors);                      \
  std::vector<at::Tensor> anchor_windows_backward(                                                 \
      const at::Tensor& grad, const at::Tensor& index, int64_t num_anchors, at::IntArrayRef sizes, \
      bool channels_last);                                                                         \
  }

ANCHOR_WINDOWS(cpu)
ANCHOR_WINDOWS(cuda)
#undef ANCHOR_WINDOWS

}  // namespace detectron
