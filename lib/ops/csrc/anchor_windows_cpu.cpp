// The 3x3 windows around the cells of anchors, and their gradient.
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "anchor_windows_host.h"
#include "anchor_windows_ops.h"
#include "roi_cpu.h"

namespace detectron::cpu {
namespace {

template <typename T>
void forward(const AnchorWindows& p) {
  at::parallel_for(0, p.images * p.slots, 16, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      const AnchorCell cell = cell_of(p, p.index[slot]);
      for (int tap = 0; tap < kTaps; ++tap) {
        T* out = static_cast<T*>(p.windows) + (slot * kTaps + tap) * p.channels;
        const AnchorCell at = tap_of(cell, tap);
        if (!on_map(p, at)) {
          std::fill_n(out, p.channels, T(0));
          continue;
        }
        const PixelLayout pixel = pixel_of(p, slot / p.slots, at);
        const T* map = static_cast<const T*>(p.maps[at.level]) + pixel.offset;
        for (int64_t c = 0; c < p.channels; ++c) out[c] = map[c * pixel.channel];
      }
    }
  });
}

// A pixel belongs to the first of the slots whose windows hold it, which sums over all of them.
template <typename T>
void backward(const AnchorWindows& p) {
  using A = Acc<T>;
  const T* const grad = static_cast<const T*>(p.windows);
  std::vector<AnchorCell> cells(p.images * p.slots);
  for (size_t i = 0; i < cells.size(); ++i) cells[i] = cell_of(p, p.index[i]);
  at::parallel_for(0, p.images * p.slots, 16, [&](int64_t begin, int64_t end) {
    std::vector<A> sum(p.channels);
    for (int64_t slot = begin; slot < end; ++slot) {
      const int64_t image = slot / p.slots, first = image * p.slots;
      for (int tap = 0; tap < kTaps; ++tap) {
        const AnchorCell at = tap_of(cells[slot], tap);
        if (!on_map(p, at)) continue;
        int64_t other = first;
        while (tap_at(cells[other], at) < 0) ++other;
        if (other != slot) continue;
        std::fill(sum.begin(), sum.end(), A(0));
        for (; other < first + p.slots; ++other) {
          const int own = tap_at(cells[other], at);
          if (own < 0) continue;
          const T* from = grad + (other * kTaps + own) * p.channels;
          for (int64_t c = 0; c < p.channels; ++c) sum[c] += static_cast<A>(from[c]);
        }
        const PixelLayout pixel = pixel_of(p, image, at);
        T* map = static_cast<T*>(p.maps[at.level]) + pixel.offset;
        for (int64_t c = 0; c < p.channels; ++c) map[c * pixel.channel] = static_cast<T>(sum[c]);
      }
    }
  });
}

}  // namespace

Tensor anchor_windows(at::TensorList features, const Tensor& index, int64_t num_anchors) {
  const auto run = [](const AnchorWindows& p) {
    with_type(p.dtype, [&](auto zero) { forward<decltype(zero)>(p); });
  };
  return anchor_windows_with(run, features, index, num_anchors);
}

std::vector<Tensor> anchor_windows_backward(
    const Tensor& grad, const Tensor& index, int64_t num_anchors, Sizes sizes, bool channels_last) {
  const auto run = [](const AnchorWindows& p) {
    with_type(p.dtype, [&](auto zero) { backward<decltype(zero)>(p); });
  };
  return anchor_windows_backward_with(run, grad, index, num_anchors, sizes, channels_last);
}

}  // namespace detectron::cpu
