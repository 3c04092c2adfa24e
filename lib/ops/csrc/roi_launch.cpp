// The host side of the CUDA RoI operators: what roi_host.h prepares is launched on the inputs' device and
// the current stream.
#include <ATen/Context.h>
#include <c10/cuda/CUDAGuard.h>

#include "cuda_current.h"
#include "kernels.h"
#include "ops.h"
#include "roi_host.h"

namespace detectron::cuda {
namespace {

// The `run` of roi_host.h that launches `kernel`.
template <typename P>
auto forward_on(at::Device device, void (*kernel)(const P&, cudaStream_t)) {
  return [=](P p) {
    const c10::cuda::CUDAGuard guard(device);
    p.multiprocessors = multiprocessors();
    kernel(p, current_stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
}

template <typename P>
auto backward_on(at::Device device, void (*kernel)(const P&, bool, cudaStream_t)) {
  return [=](P p) {
    const c10::cuda::CUDAGuard guard(device);
    p.multiprocessors = multiprocessors();
    kernel(p, at::globalContext().deterministicAlgorithms(), current_stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
}

}  // namespace

Tensor roi_align(
    at::TensorList features, const Tensor& rois, const std::optional<Tensor>& levels, Scales scales,
    int64_t pooled_h, int64_t pooled_w, int64_t sampling_ratio, bool aligned) {
  RoiAlign p{};
  const RoiTensors held =
      point_to_features(p, "roi_align", features, rois, levels, scales, pooled_h, pooled_w);
  p.sampling_ratio = static_cast<int>(sampling_ratio);
  p.aligned = aligned;
  Tensor pooled = new_pooled(p, features[0], p.channels, features[0].scalar_type());
  p.pooled = pooled.mutable_data_ptr();
  if (pooled.numel() > 0) forward_on(pooled.device(), kernels::roi_align_forward)(p);
  return pooled;
}

std::vector<Tensor> roi_align_backward(
    const Tensor& grad, const Tensor& rois, const std::optional<Tensor>& levels, Scales scales,
    Sizes sizes, int64_t sampling_ratio, bool aligned, bool channels_last) {
  RoiAlign p{};
  RoiTensors held = point_to_gradient(
      p, "roi_align", grad, rois, levels, scales, sizes, channels_last, grad.scalar_type(), 1,
      Gradient::kGathered);
  p.sampling_ratio = static_cast<int>(sampling_ratio);
  p.aligned = aligned;
  TORCH_CHECK_VALUE(
      kernels::roi_align_fits(p), "roi_align: the gradient of ", p.pooled_h, " x ", p.pooled_w,
      " cells is too large for the GPU; use fewer cells");
  const c10::cuda::CUDAGuard guard(grad.device());
  Tensor scratch = at::empty({kernels::roi_align_scratch(p)}, grad.options().dtype(at::kLong));
  kernels::roi_align_backward(p, scratch.mutable_data_ptr<int64_t>(), current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return std::move(held.maps);
}

Tensor ps_roi_pool(
    at::TensorList features, const Tensor& rois, const std::optional<Tensor>& levels, Scales scales,
    int64_t grid_size) {
  const auto run = forward_on(rois.device(), kernels::ps_roi_pool_forward);
  return ps_roi_pool_with(run, features, rois, levels, scales, grid_size);
}

std::vector<Tensor> ps_roi_pool_backward(
    const Tensor& grad, const Tensor& rois, const std::optional<Tensor>& levels, Scales scales,
    Sizes sizes, bool channels_last) {
  const auto run = backward_on(grad.device(), kernels::ps_roi_pool_backward);
  return ps_roi_pool_backward_with(run, grad, rois, levels, scales, sizes, channels_last);
}

std::tuple<Tensor, Tensor> roi_pool(
    at::TensorList features, const Tensor& rois, const std::optional<Tensor>& levels, Scales scales,
    int64_t pooled_h, int64_t pooled_w) {
  const auto run = forward_on(rois.device(), kernels::roi_pool_forward);
  return roi_pool_with(run, features, rois, levels, scales, pooled_h, pooled_w);
}

std::vector<Tensor> roi_pool_backward(
    const Tensor& grad, const Tensor& argmax, const Tensor& rois,
    const std::optional<Tensor>& levels, Scales scales, Sizes sizes, bool channels_last) {
  const auto run = backward_on(grad.device(), kernels::roi_pool_backward);
  return roi_pool_backward_with(run, grad, argmax, rois, levels, scales, sizes, channels_last);
}

std::tuple<Tensor, Tensor> roi_crop(
    at::TensorList features, const Tensor& rois, const std::optional<Tensor>& levels, Scales scales,
    int64_t pooled_h, int64_t pooled_w, bool max_pool) {
  const auto run = forward_on(rois.device(), kernels::roi_crop_forward);
  return roi_crop_with(run, features, rois, levels, scales, pooled_h, pooled_w, max_pool);
}

std::vector<Tensor> roi_crop_backward(
    const Tensor& grad, const Tensor& choice, const Tensor& rois,
    const std::optional<Tensor>& levels, Scales scales, Sizes sizes, bool max_pool,
    bool channels_last) {
  const auto run = backward_on(grad.device(), kernels::roi_crop_backward);
  return roi_crop_backward_with(
      run, grad, choice, rois, levels, scales, sizes, max_pool, channels_last);
}

}  // namespace detectron::cuda
