// Bias, residual and ReLU after a convolution, and the gradients, in float (double for double).
#include <ATen/ops/empty.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/upsample_nearest2d.h>
#include <ATen/ops/upsample_nearest2d_backward.h>

#include "conv_epilogue_checks.h"
#include "ops.h"
#include "roi_host.h"

namespace detectron::cpu {
namespace {

at::ScalarType wide(const Tensor& t) { return accumulate_dtype(t.scalar_type()); }

}  // namespace

void bias_act_(
    const Tensor& y, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
    bool relu) {
  check_bias_act(y, bias, residual);
  if (y.numel() == 0) return;
  Tensor sum = y.to(wide(y));  // y itself where that is its type
  if (bias.has_value()) sum.add_(bias->to(wide(y)).view({1, -1, 1, 1}));
  if (residual.has_value()) {
    Tensor added = residual->to(wide(y));
    if (added.sizes() != y.sizes()) {
      added = at::upsample_nearest2d(added, y.sizes().slice(2), std::nullopt, std::nullopt);
    }
    sum.add_(added);
  }
  if (relu) sum.relu_();
  y.copy_(sum);
}

std::tuple<Tensor, Tensor> relu_backward(const Tensor& grad, const Tensor& y, bool with_sum) {
  check_relu_backward(grad, y);
  const auto layout = layout_of(y);
  const Tensor masked =
      at::threshold_backward(grad.contiguous(layout), y.contiguous(layout), 0).contiguous(layout);
  return {masked, with_sum ? channel_sum(masked) : at::empty({0}, y.options().dtype(wide(y)))};
}

Tensor channel_sum(const Tensor& map) {
  check_map("channel_sum", "the map", map);
  return map.sum({0, 2, 3}, /*keepdim=*/false, wide(map));
}

Tensor add_upsampled(const Tensor& lateral, const Tensor& top) {
  check_upsample_add(lateral, top);
  const Tensor out = lateral.clone(layout_of(lateral));
  bias_act_(out, std::nullopt, top, false);
  return out;
}

Tensor sum_2x2(const Tensor& map) {
  check_sum_2x2(map);
  const auto layout = layout_of(map);
  const int64_t height = map.size(2) / 2, width = map.size(3) / 2;
  if (map.numel() == 0) {
    return at::empty({map.size(0), map.size(1), height, width}, map.options(), layout);
  }
  const Tensor sums = at::upsample_nearest2d_backward(
      map.to(wide(map)), map.sizes().slice(2), {map.size(0), map.size(1), height, width},
      std::nullopt, std::nullopt);
  return sums.to(map.scalar_type()).contiguous(layout);
}

}  // namespace detectron::cpu
