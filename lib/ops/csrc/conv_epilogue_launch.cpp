// The host side of conv_epilogue_cuda.cu. Nothing waits for the device.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>

#include "conv_epilogue.h"
#include "conv_epilogue_checks.h"
#include "cuda_current.h"
#include "ops.h"
#include "roi_host.h"

namespace detectron::cuda {
namespace {

// Sizes and layout of a dense map.
template <typename P>
P problem_of(const char* op, const Tensor& map) {
  P p{};
  p.dtype = roi_dtype(op, map.scalar_type());
  p.channels_last = layout_of(map) == at::MemoryFormat::ChannelsLast;
  p.images = map.size(0);
  p.channels = map.size(1);
  p.height = map.size(2);
  p.width = map.size(3);
  p.multiprocessors = multiprocessors();
  TORCH_CHECK_VALUE(
      p.images * p.height * p.width <= std::numeric_limits<int32_t>::max(), op,
      ": at most 2147483647 pixels, not ", map.sizes());
  return p;
}

// out = act(in + bias + residual); in and out are dense and of one layout.
void epilogue(
    const char* op, const Tensor& in, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& residual, bool relu, const Tensor& out) {
  if (in.numel() == 0) return;
  const auto dtype = in.scalar_type();
  auto p = problem_of<kernels::BiasAct>(op, in);
  Tensor values, added;
  if (bias.has_value()) {
    p.bias_wide = bias->scalar_type() != dtype || accumulate_dtype(dtype) == dtype;
    values = bias->to(p.bias_wide ? accumulate_dtype(dtype) : dtype).contiguous();
    p.bias = values.const_data_ptr();
  }
  if (residual.has_value()) {
    added = residual->contiguous(layout_of(in));
    p.residual = added.const_data_ptr();
    p.upsample = residual->size(2) != in.size(2) || residual->size(3) != in.size(3);
  }
  p.in = in.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.relu = relu;
  kernels::bias_act(p, current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The masked gradient (undefined without y) and the sums over all but channels (undefined if unwanted).
std::tuple<Tensor, Tensor> gradient(const char* op, const Tensor& grad, const Tensor& y, bool sum) {
  const Tensor& like = y.defined() ? y : grad;
  const c10::cuda::CUDAGuard guard(like.device());
  const auto layout = layout_of(like);
  const Tensor g = grad.contiguous(layout), o = y.defined() ? y.contiguous(layout) : y;
  const auto wide = like.options().dtype(accumulate_dtype(like.scalar_type()));
  Tensor masked, sums, partials;
  if (y.defined()) masked = at::empty_like(o);
  if (like.numel() == 0) return {masked, sum ? at::zeros({like.size(1)}, wide) : sums};
  auto p = problem_of<kernels::ReluBackward>(op, g);
  p.channels_last = layout == at::MemoryFormat::ChannelsLast;
  p.grad = g.const_data_ptr();
  if (y.defined()) {
    p.y = o.const_data_ptr();
    p.masked = masked.mutable_data_ptr();
  }
  if (sum) {
    sums = at::empty({p.channels}, wide);
    partials = at::empty({kernels::channel_sum_parts(p), p.channels}, wide);
    p.sum = sums.mutable_data_ptr();
    p.partials = partials.mutable_data_ptr();
  }
  kernels::relu_backward(p, current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {masked, sums};
}

}  // namespace

void bias_act_(
    const Tensor& y, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    bool relu) {
  check_bias_act(y, bias, residual);
  const c10::cuda::CUDAGuard guard(y.device());
  epilogue("bias_act_", y, bias, residual, relu, y);
}

std::tuple<Tensor, Tensor> relu_backward(const Tensor& grad, const Tensor& y, bool with_sum) {
  check_relu_backward(grad, y);
  auto [masked, sums] = gradient("relu_backward", grad, y, with_sum);
  if (!with_sum) sums = at::empty({0}, y.options().dtype(accumulate_dtype(y.scalar_type())));
  return {masked, sums};
}

Tensor channel_sum(const Tensor& map) {
  check_map("channel_sum", "the map", map);
  return std::get<1>(gradient("channel_sum", map, Tensor(), true));
}

Tensor add_upsampled(const Tensor& lateral, const Tensor& top) {
  check_upsample_add(lateral, top);
  const c10::cuda::CUDAGuard guard(lateral.device());
  const Tensor in = lateral.contiguous(layout_of(lateral));
  Tensor out = at::empty_like(in);
  epilogue("upsample_add", in, std::nullopt, top, false, out);
  return out;
}

Tensor sum_2x2(const Tensor& map) {
  check_sum_2x2(map);
  const c10::cuda::CUDAGuard guard(map.device());
  const auto layout = layout_of(map);
  const Tensor in = map.contiguous(layout);
  Tensor out = at::empty(
      {map.size(0), map.size(1), map.size(2) / 2, map.size(3) / 2}, map.options(), layout);
  if (out.numel() == 0) return out;
  auto p = problem_of<kernels::Sum2x2>("sum_2x2", in);
  p.in = in.const_data_ptr();
  p.out = out.mutable_data_ptr();
  kernels::sum_2x2(p, current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace detectron::cuda
