// What the CPU versions of roi_pool, roi_crop and ps_roi_pool share.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <type_traits>

#include "roi_cells.h"
#include "roi_host.h"

namespace detectron::cpu {

template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f(T()) with the C++ type of the features.
template <typename F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(float());
    case DType::f64: return f(double());
    case DType::f16: return f(at::Half());
    case DType::bf16: return f(at::BFloat16());
  }
}

// Calls f(channel, cell) for channels [first, last) and all cells, in the order in which they lie in memory.
template <typename F>
void for_each_item(const RoiMaps& p, int64_t first, int64_t last, F f) {
  const int cells = p.pooled_h * p.pooled_w;
  if (p.channels_last) {
    for (int cell = 0; cell < cells; ++cell) {
      for (int64_t c = first; c < last; ++c) f(c, cell);
    }
  } else {
    for (int64_t c = first; c < last; ++c) {
      for (int cell = 0; cell < cells; ++cell) f(c, cell);
    }
  }
}

// Threads own ranges of RoIs: pool(found, roi, channel, cell) writes one value.
template <typename Rule, typename A, typename Pool>
void for_each_roi(
    const RoiMaps& p, int64_t pooled_channels, int steps_h, int steps_w, Pool pool) {
  at::parallel_for(0, p.rois, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const FoundRoi<A> found = find_roi<Rule, A>(p, r, steps_h, steps_w);
      for_each_item(p, 0, pooled_channels, [&](int64_t c, int cell) { pool(found, r, c, cell); });
    }
  });
}

// Threads own ranges of channels, so no two of them add to one element: parallel and deterministic.
template <typename Rule, typename A, typename Spread>
void for_each_channel(
    const RoiMaps& p, int64_t pooled_channels, int steps_h, int steps_w, Spread spread) {
  at::parallel_for(0, pooled_channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < p.rois; ++r) {
      const FoundRoi<A> found = find_roi<Rule, A>(p, r, steps_h, steps_w);
      if (!found.valid) continue;
      for_each_item(p, begin, end, [&](int64_t c, int cell) { spread(found, r, c, cell); });
    }
  });
}

}  // namespace detectron::cpu
