// The host side of the max_pool kernel. Nothing waits for the device.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>

#include "cuda_current.h"
#include "max_pool.h"
#include "max_pool_ops.h"
#include "roi_host.h"

namespace detectron::cuda {

Tensor max_pool(const Tensor& x) {
  TORCH_CHECK_VALUE(
      x.dim() == 4 && x.size(2) > 0 && x.size(3) > 0,
      "max_pool: x must be (N, C, H, W) with H and W > 0, not ", x.sizes());
  kernels::MaxPool p{};
  p.dtype = roi_dtype("max_pool", x.scalar_type());
  TORCH_CHECK_VALUE(
      x.size(2) * x.size(3) <= std::numeric_limits<int32_t>::max(),
      "max_pool: maps of at most 2147483647 pixels, not ", x.sizes());
  const c10::cuda::CUDAGuard guard(x.device());
  p.channels_last = features_are_channels_last({x});
  const Tensor in = x.contiguous(memory_format(p.channels_last));
  p.images = in.size(0);
  p.channels = in.size(1);
  p.height = static_cast<int>(in.size(2));
  p.width = static_cast<int>(in.size(3));
  p.out_height = (p.height + 1) / 2;
  p.out_width = (p.width + 1) / 2;
  Tensor out = at::empty(
      {p.images, p.channels, p.out_height, p.out_width}, in.options(),
      memory_format(p.channels_last));
  if (out.numel() == 0) return out;
  p.in = in.const_data_ptr();
  p.out = out.mutable_data_ptr();
  kernels::max_pool(p, current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace detectron::cuda
