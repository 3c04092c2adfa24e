// anchor_windows' gradient, in C++, where it costs the host a fraction of what it would in Python.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "checks.h"

namespace detectron {
namespace {

using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor windows_of(at::TensorList features, const Tensor& index, int64_t num_anchors) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("detectron::anchor_windows", "")
                             .typed<decltype(windows_of)>();
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(features, index, num_anchors);
}

std::vector<Tensor> differentiate(
    const Tensor& grad, const Tensor& index, int64_t num_anchors, c10::SymIntArrayRef sizes,
    bool channels_last) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("detectron::anchor_windows_backward", "")
                             .typed<decltype(differentiate)>();
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(grad, index, num_anchors, sizes, channels_last);
}

class AnchorWindowsFunction : public torch::autograd::Function<AnchorWindowsFunction> {
 public:
  static Tensor forward(
      AutogradContext* ctx, at::TensorList features, const Tensor& index, int64_t num_anchors) {
    const Tensor windows = windows_of(features, index, num_anchors);
    ctx->save_for_backward({index});
    std::vector<SymInt> sizes{features[0].sym_size(0), features[0].sym_size(1)};
    for (const Tensor& f : features) {
      sizes.push_back(f.sym_size(2));
      sizes.push_back(f.sym_size(3));
    }
    ctx->saved_data["sizes"] = c10::IValue(c10::SymIntArrayRef(sizes));
    ctx->saved_data["num_anchors"] = num_anchors;
    ctx->saved_data["channels_last"] = features_are_channels_last(features);
    return windows;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !at::GradMode::is_enabled(), "anchor_windows has no second derivative (create_graph=True)");
    std::vector<Tensor> maps = differentiate(
        grads[0], ctx->get_saved_variables()[0], ctx->saved_data["num_anchors"].toInt(),
        ctx->saved_data["sizes"].toSymIntVector(), ctx->saved_data["channels_last"].toBool());
    maps.resize(maps.size() + 2);  // none for the index and the number of anchors
    return maps;
  }
};

Tensor anchor_windows(at::TensorList features, const Tensor& index, int64_t num_anchors) {
  if (!at::GradMode::is_enabled()) return windows_of(features, index, num_anchors);
  return AnchorWindowsFunction::apply(features, index, num_anchors);
}

}  // namespace

TORCH_LIBRARY_IMPL(detectron, Autograd, m) { m.impl("anchor_windows", &anchor_windows); }

}  // namespace detectron
