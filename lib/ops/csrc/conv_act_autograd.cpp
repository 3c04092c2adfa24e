// conv_act and upsample_add: autocast and gradients in C++, where they cost the host a fraction of what they
// would in Python. The work is done by operators of either device.
#include <ATen/autocast_mode.h>
#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/cudnn_convolution_add_relu.h>
#include <ATen/ops/cudnn_convolution_relu.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>

#include "checks.h"
#include "conv_act.h"

namespace detectron {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using MaybeTensor = std::optional<Tensor>;

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

void bias_act_(const Tensor& y, const MaybeTensor& bias, const MaybeTensor& residual, bool relu) {
  static const auto op = find<void(const Tensor&, const MaybeTensor&, const MaybeTensor&, bool)>(
      "detectron::bias_act_");
  op.call(y, bias, residual, relu);
}

std::tuple<Tensor, Tensor> relu_backward(const Tensor& grad, const Tensor& y, bool with_sum) {
  static const auto op = find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, bool)>(
      "detectron::relu_backward");
  return op.call(grad, y, with_sum);
}

Tensor channel_sum(const Tensor& map) {
  static const auto op = find<Tensor(const Tensor&)>("detectron::channel_sum");
  return op.call(map);
}

Tensor add_upsampled(const Tensor& lateral, const Tensor& top) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&)>("detectron::add_upsampled");
  return op.call(lateral, top);
}

Tensor sum_2x2(const Tensor& map) {
  static const auto op = find<Tensor(const Tensor&)>("detectron::sum_2x2");
  return op.call(map);
}

void check_first_derivative(const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !at::GradMode::is_enabled(), op, " has no second derivative (create_graph=True)");
}

struct Geometry {
  std::vector<int64_t> stride, padding, dilation;
  bool transposed;
  int64_t groups;
};

// The weight that the convolution runs with: `weight * scale` in `dtype`, rounded once, in one kernel.
Tensor scaled(const Tensor& weight, const Tensor& scale, at::ScalarType dtype) {
  Tensor out = at::empty_like(weight, weight.options().dtype(dtype));
  at::mul_out(out, weight, scale.view({-1, 1, 1, 1}));
  return out;
}

// Whether cuDNN has the convolution with bias, residual and ReLU as one kernel, which takes no longer than
// the convolution alone.
bool cudnn_fuses(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
    bool relu, const Geometry& g) {
  const bool half = x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
  if (!relu || !half || !x.is_cuda() || g.transposed || g.groups != 1 || !bias.has_value()) {
    return false;
  }
  // ATen asks for these kernels without regard to determinism.
  const auto& context = at::globalContext();
  if (!context.userEnabledCuDNN() || context.deterministicAlgorithms()) return false;
  // They check no shapes: what does not fit is left to operators that say so.
  if (x.numel() == 0 || weight.dim() != 4 || weight.scalar_type() != x.scalar_type()) return false;
  if (weight.size(1) != x.size(1) || bias->dim() != 1 || bias->size(0) != weight.size(0)) {
    return false;
  }
  if (x.size(1) % 8 != 0 || weight.size(0) % 8 != 0) return false;
  const auto last = at::MemoryFormat::ChannelsLast;
  if (!x.is_contiguous(last)) return false;
  if (!residual.has_value()) return true;
  std::array<int64_t, 4> sizes{x.size(0), weight.size(0), 0, 0};
  for (int i = 0; i < 2; ++i) {
    const int64_t taps = g.dilation[i] * (weight.size(i + 2) - 1) + 1;
    sizes[i + 2] = (x.size(i + 2) + 2 * g.padding[i] - taps) / g.stride[i] + 1;
  }
  return residual->sizes().equals(sizes) && residual->is_contiguous(last);
}

Tensor forward_only(
    const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
    bool relu, const Geometry& g) {
  const std::vector<int64_t> none(2, 0);
  if (cudnn_fuses(x, weight, bias, residual, relu, g)) {
    const auto weights = weight.contiguous(at::MemoryFormat::ChannelsLast);
    const auto shift = bias->to(x.scalar_type());
    if (residual.has_value()) {
      return at::cudnn_convolution_add_relu(
          x, weights, *residual, 1, shift, g.stride, g.padding, g.dilation, g.groups);
    }
    return at::cudnn_convolution_relu(
        x, weights, shift, g.stride, g.padding, g.dilation, g.groups);
  }
  Tensor y = at::convolution(
      x, weight, std::nullopt, g.stride, g.padding, g.dilation, g.transposed, none, g.groups);
  if (bias.has_value() || residual.has_value() || relu) bias_act_(y, bias, residual, relu);
  return y;
}

class ConvAct : public torch::autograd::Function<ConvAct> {
 public:
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
      const MaybeTensor& residual, const MaybeTensor& scale, bool relu, const Geometry& g) {
    const Tensor used = scale.has_value() ? scaled(weight, *scale, x.scalar_type()) : weight;
    const Tensor y = forward_only(x, used, bias, residual, relu, g);
    ctx->save_for_backward(
        {x, used, relu ? y : Tensor(), scale.has_value() ? *scale : Tensor()});
    ctx->saved_data["stride"] = g.stride;
    ctx->saved_data["padding"] = g.padding;
    ctx->saved_data["dilation"] = g.dilation;
    ctx->saved_data["transposed"] = g.transposed;
    ctx->saved_data["groups"] = g.groups;
    ctx->saved_data["bias"] = bias.has_value();
    ctx->saved_data["residual"] = residual.has_value();
    ctx->saved_data["upsampled"] =
        residual.has_value() && residual->sym_size(2) != y.sym_size(2);
    ctx->saved_data["weight_dtype"] = weight.scalar_type();
    if (bias.has_value()) ctx->saved_data["bias_dtype"] = bias->scalar_type();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    check_first_derivative("conv_act");
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &y = saved[2], &scale = saved[3];
    auto& data = ctx->saved_data;
    // Edges are those of the tensors that were given, in the order of forward's arguments.
    const bool has_bias = data["bias"].toBool(), has_residual = data["residual"].toBool();
    const bool for_x = ctx->needs_input_grad(0), for_weight = ctx->needs_input_grad(1);
    const bool for_bias = has_bias && ctx->needs_input_grad(2);
    const bool for_residual = has_residual && ctx->needs_input_grad(has_bias ? 3 : 2);

    Tensor grad = grads[0], grad_bias, grad_residual, grad_weight;
    if (y.defined()) {
      std::tie(grad, grad_bias) = relu_backward(grad, y, for_bias);
    } else if (for_bias) {
      grad_bias = channel_sum(grad);
    }
    grad_bias = for_bias ? grad_bias.to(data["bias_dtype"].toScalarType()) : Tensor();
    if (for_residual) grad_residual = data["upsampled"].toBool() ? sum_2x2(grad) : grad;
    Tensor grad_x;
    if (for_x || for_weight) {
      const std::vector<int64_t> none(2, 0);
      std::tie(grad_x, grad_weight, std::ignore) = at::convolution_backward(
          grad, x, weight, at::OptionalIntArrayRef(), data["stride"].toIntVector(),
          data["padding"].toIntVector(), data["dilation"].toIntVector(),
          data["transposed"].toBool(), none, data["groups"].toInt(),
          std::array<bool, 3>{for_x, for_weight, false});
    }
    if (for_weight && scale.defined()) {
      grad_weight = at::mul(grad_weight, scale.view({-1, 1, 1, 1}));
      grad_weight = grad_weight.to(data["weight_dtype"].toScalarType());
    }
    return {grad_x, grad_weight, grad_bias, grad_residual, Tensor(), Tensor(), Tensor()};
  }
};

class UpsampleAdd : public torch::autograd::Function<UpsampleAdd> {
 public:
  static Tensor forward(AutogradContext* /*ctx*/, const Tensor& lateral, const Tensor& top) {
    return add_upsampled(lateral, top);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    check_first_derivative("upsample_add");
    return {grads[0], ctx->needs_input_grad(1) ? sum_2x2(grads[0]) : Tensor()};
  }
};

// As autocast treats the arguments of a convolution.
Tensor autocast_to(at::ScalarType dtype, const Tensor& t) {
  return at::autocast::cached_cast(dtype, t, t.device().type());
}

}  // namespace

Tensor conv_act(
    const Tensor& x_in, const Tensor& weight_in, const MaybeTensor& scale, const MaybeTensor& bias,
    const MaybeTensor& residual_in, bool relu, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool transposed, int64_t groups) {
  TORCH_CHECK_VALUE(x_in.dim() == 4, "conv_act: x must be (N, C, H, W), not ", x_in.sizes());
  TORCH_CHECK_VALUE(
      !scale.has_value() || !(transposed || scale->requires_grad()),
      "conv_act: scale is for convolutions that are not transposed, and has no gradient");
  const auto device = x_in.device().type();
  const bool autocast = at::autocast::is_autocast_enabled(device);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  Tensor x = x_in, weight = weight_in;
  if (autocast) {
    const auto dtype = at::autocast::get_autocast_dtype(device);
    x = autocast_to(dtype, x);
    if (!scale.has_value()) weight = autocast_to(dtype, weight);  // else cast with the scaling
  } else if (scale.has_value()) {
    check_dtype(weight, "conv_act: weight", x.scalar_type());
  }
  MaybeTensor residual = residual_in;
  if (residual.has_value()) residual = residual->to(x.scalar_type());
  const Geometry geometry{stride.vec(), padding.vec(), dilation.vec(), transposed, groups};
  if (at::GradMode::is_enabled()) {
    return ConvAct::apply(x, weight, bias, residual, scale, relu, geometry);
  }
  if (scale.has_value()) weight = scaled(weight, *scale, x.scalar_type());
  return forward_only(x, weight, bias, residual, relu, geometry);
}

Tensor upsample_add(const Tensor& lateral, const Tensor& top) {
  if (!at::GradMode::is_enabled()) return add_upsampled(lateral, top);
  return UpsampleAdd::apply(lateral, top);
}

}  // namespace detectron
