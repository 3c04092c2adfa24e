// The host side of anchor_windows_cuda.cu. Nothing waits for the device.
#include <c10/cuda/CUDAGuard.h>

#include "anchor_windows_host.h"
#include "anchor_windows_kernels.h"
#include "anchor_windows_ops.h"
#include "cuda_current.h"

namespace detectron::cuda {
namespace {

auto on(at::Device device, void (*kernel)(const AnchorWindows&, cudaStream_t)) {
  return [=](const AnchorWindows& p) {
    const c10::cuda::CUDAGuard guard(device);
    kernel(p, current_stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
}

}  // namespace

Tensor anchor_windows(at::TensorList features, const Tensor& index, int64_t num_anchors) {
  const auto run = on(index.device(), kernels::anchor_windows_forward);
  return anchor_windows_with(run, features, index, num_anchors);
}

std::vector<Tensor> anchor_windows_backward(
    const Tensor& grad, const Tensor& index, int64_t num_anchors, Sizes sizes, bool channels_last) {
  const auto run = on(index.device(), kernels::anchor_windows_backward);
  return anchor_windows_backward_with(run, grad, index, num_anchors, sizes, channels_last);
}

}  // namespace detectron::cuda
