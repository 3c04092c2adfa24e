// Host side of anchor_windows: checks, outputs, pointers. The entry points of the two devices differ only in
// the `run` that they hand in.
#pragma once

#include <ATen/ops/empty.h>

#include <limits>
#include <vector>

#include "anchor_windows.h"
#include "anchors_checks.h"
#include "roi_host.h"

namespace detectron {

static_assert(kMaxDraws <= AnchorWindows::kMaxSlots, "all anchors that are drawn have windows");

inline void point_to_index(
    AnchorWindows& p, const Tensor& index, int64_t num_anchors, size_t levels, const Tensor& like) {
  TORCH_CHECK_VALUE(
      levels >= 1 && levels <= AnchorWindows::kMaxLevels, "anchor_windows: between 1 and ",
      AnchorWindows::kMaxLevels, " feature levels, not ", levels);
  TORCH_CHECK_VALUE(
      index.dim() == 2 && index.size(0) <= kMaxAnchorImages &&
          index.size(1) <= AnchorWindows::kMaxSlots,
      "anchor_windows: index must be (N, S) with N <= ", kMaxAnchorImages, " and S <= ",
      AnchorWindows::kMaxSlots, ", not ", index.sizes());
  TORCH_CHECK_VALUE(
      num_anchors >= 1 && num_anchors <= std::numeric_limits<int32_t>::max(),
      "anchor_windows: num_anchors must be positive, not ", num_anchors);
  check_device(index, "anchor_windows: index", like, "features");
  check_dtype(index, "anchor_windows: index", at::kLong);
  p.dtype = roi_dtype("anchor_windows", like.scalar_type());
  p.num_anchors = static_cast<int>(num_anchors);
  p.levels = static_cast<int>(levels);
  p.images = index.size(0);
  p.slots = static_cast<int>(index.size(1));
  p.index = index.const_data_ptr<int64_t>();
}

template <typename Run>
Tensor anchor_windows_with(
    Run run, at::TensorList features, const Tensor& index_in, int64_t num_anchors) {
  TORCH_CHECK_VALUE(!features.empty(), "anchor_windows: no feature level given");
  const Tensor &first = features[0], index = index_in.contiguous();
  AnchorWindows p{};
  point_to_index(p, index, num_anchors, features.size(), first);
  p.channels_last = features_are_channels_last(features);
  std::vector<Tensor> held;
  for (const Tensor& f : features) {
    TORCH_CHECK_VALUE(
        f.dim() == 4 && f.size(0) == p.images && f.size(1) == first.size(1),
        "anchor_windows: every level must be (N, C, H, W) with N = ", p.images,
        " and C as in the first, not ", f.sizes());
    check_device(f, "anchor_windows: a feature level", first, "the first level");
    check_dtype(f, "anchor_windows: every feature level", first.scalar_type());
    const size_t l = held.size();
    held.push_back(f.contiguous(memory_format(p.channels_last)));
    p.heights[l] = static_cast<int>(f.size(2));
    p.widths[l] = static_cast<int>(f.size(3));
    p.maps[l] = const_cast<void*>(held[l].const_data_ptr());
  }
  p.channels = first.size(1);
  Tensor windows = at::empty({p.images, p.slots, kTaps, p.channels}, first.options());
  p.windows = windows.mutable_data_ptr();
  if (windows.numel() > 0) run(p);
  return windows;
}

template <typename Run>
std::vector<Tensor> anchor_windows_backward_with(
    Run run, const Tensor& grad_in, const Tensor& index_in, int64_t num_anchors, Sizes sizes,
    bool channels_last) {
  const Tensor grad = grad_in.contiguous(), index = index_in.contiguous();
  AnchorWindows p{};
  point_to_index(p, index, num_anchors, sizes.size() < 2 ? 0 : sizes.size() / 2 - 1, grad);
  TORCH_CHECK_VALUE(
      sizes[0] == p.images && grad.dim() == 4 && grad.size(0) == p.images &&
          grad.size(1) == p.slots && grad.size(2) == kTaps && grad.size(3) == sizes[1],
      "anchor_windows: the gradient ", grad.sizes(), " fits neither index ", index.sizes(),
      " nor maps of sizes ", sizes);
  p.channels_last = channels_last;
  p.channels = sizes[1];
  p.windows = const_cast<void*>(grad.const_data_ptr());
  std::vector<Tensor> maps;
  for (int l = 0; l < p.levels; ++l) {
    p.heights[l] = static_cast<int>(sizes[2 + 2 * l]);
    p.widths[l] = static_cast<int>(sizes[3 + 2 * l]);
    maps.push_back(at::empty(
        {p.images, p.channels, p.heights[l], p.widths[l]}, grad.options(),
        memory_format(channels_last)));
    maps[l].zero_();
    p.maps[l] = maps[l].mutable_data_ptr();
  }
  if (grad.numel() > 0) run(p);
  return maps;
}

}  // namespace detectron
