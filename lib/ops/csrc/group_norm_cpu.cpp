// Group normalisation with an addition and a ReLU, in torch's own operations: on CPUs it is there to be right.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/var_mean.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "group_norm_checks.h"
#include "ops.h"

namespace detectron::cpu {
namespace {

// (N, C, H, W) as (N, groups, values of a group), in the type that sums are taken in.
Tensor as_groups(const Tensor& map, int64_t groups) {
  const Tensor wide = map.to(accumulate_dtype(map.scalar_type()));
  return wide.contiguous().view({map.size(0), groups, -1});
}

Tensor per_channel(const Tensor& values) { return values.view({1, -1, 1, 1}); }

Tensor normalise(const Tensor& x, const Tensor& mean, const Tensor& rstd, int64_t groups) {
  const Tensor centred = as_groups(x, groups) - mean.unsqueeze(2);
  return (centred * rstd.unsqueeze(2)).view(x.sizes());
}

Tensor like(const Tensor& values, const Tensor& x) {
  return values.to(x.scalar_type()).contiguous(group_norm_layout(x));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> group_norm(
    const Tensor& x, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& residual, int64_t groups, double eps, bool relu) {
  check_group_norm("group_norm", x, weight, bias, groups);
  check_group_norm_map("group_norm: residual", residual, x);
  if (x.numel() == 0) {
    const Tensor none = at::zeros({x.size(0), groups}, weight.options());
    return {at::empty(x.sizes(), x.options(), group_norm_layout(x)), none, none.clone()};
  }
  const auto [variance, mean] = at::var_mean(as_groups(x, groups), {2}, /*correction=*/0);
  const Tensor rstd = (variance + eps).rsqrt();
  Tensor y = normalise(x, mean, rstd, groups) * per_channel(weight) + per_channel(bias);
  if (residual.has_value()) y = y + *residual;
  if (relu) y = y.relu();
  return {like(y, x), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
    const Tensor& mean, const Tensor& rstd, const std::optional<Tensor>& out, int64_t groups,
    bool relu) {
  check_group_norm("group_norm_backward", x, weight, bias, groups);
  check_group_norm_map("group_norm_backward: grad", grad, x);
  check_group_norm_map("group_norm_backward: out", out, x);
  const auto layout = group_norm_layout(x);
  if (x.numel() == 0) {
    const Tensor none = at::zeros({x.size(1)}, weight.options());
    const Tensor dx = at::empty(x.sizes(), x.options(), layout);
    return {dx, none, none.clone(), out.has_value() ? dx.clone() : at::empty({0}, x.options())};
  }
  const Tensor xhat = normalise(x, mean, rstd, groups);
  Tensor g = grad.to(weight.scalar_type());
  if (relu) {
    const Tensor y = out.has_value() ? *out : xhat * per_channel(weight) + per_channel(bias);
    g = at::where(y <= 0, at::zeros({}, g.options()), g);
  }
  const Tensor weighted = as_groups(g * per_channel(weight), groups), hats = as_groups(xhat, groups);
  const Tensor s1 = weighted.mean(2, /*keepdim=*/true), s2 = (weighted * hats).mean(2, true);
  const Tensor dx = (rstd.unsqueeze(2) * (weighted - s1 - hats * s2)).view(x.sizes());
  return {
      like(dx, x), (g * xhat).sum({0, 2, 3}), g.sum({0, 2, 3}),
      out.has_value() ? like(g, x) : at::empty({0}, x.options())};
}

}  // namespace detectron::cpu
