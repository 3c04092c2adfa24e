// The operator max_pool, for library.cpp. On the CPU it is torch's own: lib/ops/max_pool.py.
#pragma once

#include <ATen/core/Tensor.h>

namespace detectron::cuda {

at::Tensor max_pool(const at::Tensor& x);

}  // namespace detectron::cuda
