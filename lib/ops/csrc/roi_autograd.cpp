// The gradients of roi_pool, roi_crop and ps_roi_pool: registered in C++, where they cost the host a fraction
// of what they would in Python. The work is done by operators of either device.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "checks.h"

namespace detectron {
namespace {

using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using MaybeTensor = std::optional<Tensor>;
using Scales = at::ArrayRef<double>;
using SymSizes = c10::SymIntArrayRef;
using TwoTensors = std::tuple<Tensor, Tensor>;
using Maps = std::vector<Tensor>;

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// ---- the operators ------------------------------------------------------------------------------

const auto& roi_pool_op() {
  static const auto op = find<TwoTensors(
      at::TensorList, const Tensor&, const MaybeTensor&, Scales, int64_t, int64_t)>(
      "detectron::roi_pool");
  return op;
}

const auto& roi_pool_backward_op() {
  static const auto op = find<Maps(
      const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, Scales, SymSizes, bool)>(
      "detectron::roi_pool_backward");
  return op;
}

const auto& roi_crop_op() {
  static const auto op = find<TwoTensors(
      at::TensorList, const Tensor&, const MaybeTensor&, Scales, int64_t, int64_t, bool)>(
      "detectron::roi_crop");
  return op;
}

const auto& roi_crop_backward_op() {
  static const auto op = find<Maps(
      const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, Scales, SymSizes, bool,
      bool)>("detectron::roi_crop_backward");
  return op;
}

const auto& ps_roi_pool_op() {
  static const auto op = find<Tensor(
      at::TensorList, const Tensor&, const MaybeTensor&, Scales, int64_t)>(
      "detectron::ps_roi_pool");
  return op;
}

const auto& ps_roi_pool_backward_op() {
  static const auto op = find<Maps(
      const Tensor&, const Tensor&, const MaybeTensor&, Scales, SymSizes, bool)>(
      "detectron::ps_roi_pool_backward");
  return op;
}

// ---- what backward needs ------------------------------------------------------------------------

// Tensors go where autograd watches them, the rest beside them; the maps themselves are not kept.
void save(
    AutogradContext* ctx, at::TensorList features, const Tensor& index, const Tensor& rois,
    const MaybeTensor& levels, Scales scales) {
  ctx->save_for_backward({index, rois, levels.value_or(Tensor())});
  std::vector<SymInt> sizes;
  if (!features.empty()) sizes = {features[0].sym_size(0), features[0].sym_size(1)};
  for (const Tensor& f : features) {
    sizes.push_back(f.sym_size(2));
    sizes.push_back(f.sym_size(3));
  }
  ctx->saved_data["sizes"] = c10::IValue(SymSizes(sizes));
  ctx->saved_data["scales"] = scales.vec();
  ctx->saved_data["channels_last"] = features_are_channels_last(features);
}

struct Saved {
  Tensor index, rois;
  MaybeTensor levels;
  std::vector<double> scales;
  std::vector<SymInt> sizes;
  bool channels_last;

  explicit Saved(AutogradContext* ctx) {
    const variable_list tensors = ctx->get_saved_variables();
    index = tensors[0];
    rois = tensors[1];
    if (tensors[2].defined()) levels = tensors[2];
    scales = ctx->saved_data["scales"].toDoubleVector();
    sizes = ctx->saved_data["sizes"].toSymIntVector();
    channels_last = ctx->saved_data["channels_last"].toBool();
  }
};

// The maps' gradients, and none for the `others` arguments that follow them.
variable_list with_nothing(Maps maps, int others) {
  maps.resize(maps.size() + others);
  return maps;
}

// ---- forward and backward -----------------------------------------------------------------------

class RoiPoolFunction : public torch::autograd::Function<RoiPoolFunction> {
 public:
  static variable_list forward(
      AutogradContext* ctx, at::TensorList features, const Tensor& rois, const MaybeTensor& levels,
      Scales scales, int64_t pooled_h, int64_t pooled_w) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [pooled, argmax] = roi_pool_op().call(features, rois, levels, scales, pooled_h, pooled_w);
    save(ctx, features, argmax, rois, levels, scales);
    ctx->mark_non_differentiable({argmax});
    return {pooled, argmax};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved s(ctx);
    return with_nothing(
        roi_pool_backward_op().call(
            grads[0], s.index, s.rois, s.levels, s.scales, s.sizes, s.channels_last),
        5);
  }
};

class RoiCropFunction : public torch::autograd::Function<RoiCropFunction> {
 public:
  static variable_list forward(
      AutogradContext* ctx, at::TensorList features, const Tensor& rois, const MaybeTensor& levels,
      Scales scales, int64_t pooled_h, int64_t pooled_w, bool max_pool) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [pooled, choice] =
        roi_crop_op().call(features, rois, levels, scales, pooled_h, pooled_w, max_pool);
    save(ctx, features, choice, rois, levels, scales);
    ctx->saved_data["max_pool"] = max_pool;
    ctx->mark_non_differentiable({choice});
    return {pooled, choice};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved s(ctx);
    return with_nothing(
        roi_crop_backward_op().call(
            grads[0], s.index, s.rois, s.levels, s.scales, s.sizes,
            ctx->saved_data["max_pool"].toBool(), s.channels_last),
        6);
  }
};

class PsRoiPoolFunction : public torch::autograd::Function<PsRoiPoolFunction> {
 public:
  static Tensor forward(
      AutogradContext* ctx, at::TensorList features, const Tensor& rois, const MaybeTensor& levels,
      Scales scales, int64_t grid_size) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor pooled = ps_roi_pool_op().call(features, rois, levels, scales, grid_size);
    save(ctx, features, Tensor(), rois, levels, scales);
    return pooled;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved s(ctx);
    return with_nothing(
        ps_roi_pool_backward_op().call(
            grads[0], s.rois, s.levels, s.scales, s.sizes, s.channels_last),
        4);
  }
};

// ---- no second derivative -----------------------------------------------------------------------

// Passes the gradient's maps on; differentiating them is an error rather than a silent zero.
class Refuse : public torch::autograd::Function<Refuse> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& /*grad*/, const Maps& maps, const char* name) {
    ctx->saved_data["name"] = std::string(name);
    return maps;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& /*grads*/) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, ctx->saved_data["name"].toStringRef(), " has no second derivative");
  }
};

template <typename Op, typename... Rest>
Maps once(const char* name, const Op& op, const Tensor& grad, Rest&&... rest) {
  const Maps maps = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(grad, std::forward<Rest>(rest)...);
  }();
  return at::GradMode::is_enabled() && grad.requires_grad() ? Refuse::apply(grad, maps, name) : maps;
}

// ---- registration -------------------------------------------------------------------------------

TwoTensors roi_pool(
    at::TensorList features, const Tensor& rois, const MaybeTensor& levels, Scales scales,
    int64_t pooled_h, int64_t pooled_w) {
  const auto out = RoiPoolFunction::apply(features, rois, levels, scales, pooled_h, pooled_w);
  return {out[0], out[1]};
}

Maps roi_pool_backward(
    const Tensor& grad, const Tensor& argmax, const Tensor& rois, const MaybeTensor& levels,
    Scales scales, SymSizes sizes, bool channels_last) {
  return once(
      "roi_pool", roi_pool_backward_op(), grad, argmax, rois, levels, scales, sizes, channels_last);
}

TwoTensors roi_crop(
    at::TensorList features, const Tensor& rois, const MaybeTensor& levels, Scales scales,
    int64_t pooled_h, int64_t pooled_w, bool max_pool) {
  const auto out =
      RoiCropFunction::apply(features, rois, levels, scales, pooled_h, pooled_w, max_pool);
  return {out[0], out[1]};
}

Maps roi_crop_backward(
    const Tensor& grad, const Tensor& choice, const Tensor& rois, const MaybeTensor& levels,
    Scales scales, SymSizes sizes, bool max_pool, bool channels_last) {
  return once(
      "roi_crop", roi_crop_backward_op(), grad, choice, rois, levels, scales, sizes, max_pool,
      channels_last);
}

Tensor ps_roi_pool(
    at::TensorList features, const Tensor& rois, const MaybeTensor& levels, Scales scales,
    int64_t grid_size) {
  return PsRoiPoolFunction::apply(features, rois, levels, scales, grid_size);
}

Maps ps_roi_pool_backward(
    const Tensor& grad, const Tensor& rois, const MaybeTensor& levels, Scales scales,
    SymSizes sizes, bool channels_last) {
  return once(
      "ps_roi_pool", ps_roi_pool_backward_op(), grad, rois, levels, scales, sizes, channels_last);
}

}  // namespace

TORCH_LIBRARY_IMPL(detectron, Autograd, m) {
  m.impl("roi_pool", &roi_pool);
  m.impl("roi_pool_backward", &roi_pool_backward);
  m.impl("roi_crop", &roi_crop);
  m.impl("roi_crop_backward", &roi_crop_backward);
  m.impl("ps_roi_pool", &ps_roi_pool);
  m.impl("ps_roi_pool_backward", &ps_roi_pool_backward);
}

}  // namespace detectron
