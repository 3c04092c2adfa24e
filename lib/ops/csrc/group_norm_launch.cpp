// The host side of the group_norm kernels. Nothing waits for the device.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>

#include "cuda_current.h"
#include "group_norm.h"
#include "group_norm_checks.h"
#include "ops.h"

namespace detectron::cuda {
namespace {

// Sizes, types and layout; x must have a value.
kernels::GroupNorm problem_of(const Tensor& x, int64_t groups) {
  const int64_t pixels = x.size(2) * x.size(3), most = int64_t{1} << 30;
  TORCH_CHECK_VALUE(
      pixels <= most && x.size(0) * x.size(1) <= most, "group_norm: at most ", most,
      " pixels an image and as many images times channels, not ", x.sizes());
  kernels::GroupNorm p{};
  p.dtype = roi_dtype("group_norm", x.scalar_type());
  // A single pixel's channels lie side by side in either layout.
  p.channels_last = pixels == 1 || group_norm_layout(x) == at::MemoryFormat::ChannelsLast;
  p.images = x.size(0);
  p.channels = static_cast<int>(x.size(1));
  p.groups = static_cast<int>(groups);
  p.pixels = static_cast<int>(pixels);
  p.multiprocessors = multiprocessors();
  return p;
}

Tensor scratch_of(kernels::GroupNorm& p, const Tensor& like) {
  Tensor scratch = at::empty({kernels::group_norm_scratch(p)}, like.options());
  p.scratch = scratch.mutable_data_ptr();
  return scratch;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> group_norm(
    const Tensor& x, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& residual, int64_t groups, double eps, bool relu) {
  check_group_norm("group_norm", x, weight, bias, groups);
  check_group_norm_map("group_norm: residual", residual, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto layout = group_norm_layout(x);
  const Tensor in = x.contiguous(layout), w = weight.contiguous(), b = bias.contiguous();
  const Tensor added = residual.has_value() ? residual->contiguous(layout) : Tensor();
  Tensor y = at::empty(x.sizes(), x.options(), layout);
  if (y.numel() == 0) {
    const Tensor none = at::zeros({x.size(0), groups}, w.options());
    return {y, none, none.clone()};
  }
  Tensor mean = at::empty({x.size(0), groups}, w.options()), rstd = at::empty_like(mean);
  kernels::GroupNorm p = problem_of(in, groups);
  p.eps = eps;
  p.relu = relu;
  p.x = in.const_data_ptr();
  p.weight = w.const_data_ptr();
  p.bias = b.const_data_ptr();
  p.residual = added.defined() ? added.const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.mean = mean.mutable_data_ptr();
  p.rstd = rstd.mutable_data_ptr();
  const Tensor scratch = scratch_of(p, mean);
  kernels::group_norm_forward(p, current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
    const Tensor& mean, const Tensor& rstd, const std::optional<Tensor>& out, int64_t groups,
    bool relu) {
  check_group_norm("group_norm_backward", x, weight, bias, groups);
  check_group_norm_map("group_norm_backward: grad", grad, x);
  check_group_norm_map("group_norm_backward: out", out, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto layout = group_norm_layout(x);
  const Tensor in = x.contiguous(layout), g = grad.contiguous(layout), w = weight.contiguous(),
               b = bias.contiguous(), m = mean.contiguous(), r = rstd.contiguous();
  const Tensor result = out.has_value() ? out->contiguous(layout) : Tensor();
  Tensor dx = at::empty(x.sizes(), x.options(), layout);
  Tensor dresidual = out.has_value() ? at::empty_like(dx) : at::empty({0}, x.options());
  if (dx.numel() == 0) {
    const Tensor none = at::zeros({x.size(1)}, w.options());
    return {dx, none, none.clone(), dresidual};
  }
  Tensor dweight = at::empty({x.size(1)}, w.options()), dbias = at::empty_like(dweight);
  kernels::GroupNorm p = problem_of(in, groups);
  p.relu = relu;
  p.x = in.const_data_ptr();
  p.weight = w.const_data_ptr();
  p.bias = b.const_data_ptr();
  p.mean = const_cast<void*>(m.const_data_ptr());
  p.rstd = const_cast<void*>(r.const_data_ptr());
  p.grad = g.const_data_ptr();
  p.dx = dx.mutable_data_ptr();
  if (out.has_value()) {
    p.out = result.const_data_ptr();
    p.dresidual = dresidual.mutable_data_ptr();
  }
  p.dweight = dweight.mutable_data_ptr();
  p.dbias = dbias.mutable_data_ptr();
  const Tensor scratch = scratch_of(p, dweight);
  kernels::group_norm_backward(p, current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, dweight, dbias, dresidual};
}

}  // namespace detectron::cuda
