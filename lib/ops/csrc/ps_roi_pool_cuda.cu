// Position-sensitive RoI pooling over all feature levels in one launch: a block works on one RoI, threads
// take its values in their order in memory.
#include "kernels.h"
#include "roi_scatter.h"

namespace detectron::kernels {
namespace {

using Rule = PositionSensitiveRule;

__host__ __device__ int64_t channels_of(const PsRoiPool& p) {
  return p.channels / (p.pooled_h * p.pooled_w);
}

// The pixels of one cell of one pooled channel.
template <typename A>
struct Cell {
  Span ys, xs;
  int64_t offset;  // of the map channel's first element
  MapLayout step;
  int64_t width;

  __device__ __forceinline__ Cell(
      const PsRoiPool& p, const FoundRoi<A>& found, int64_t channel, int cell) {
    ys = Rule::span(found.y, cell / p.pooled_w, p.heights[found.level]);
    xs = Rule::span(found.x, cell % p.pooled_w, p.widths[found.level]);
    step = map_layout(p, found.level);
    width = p.widths[found.level];
    offset = image_offset(p, found.level, found.image) +
        (channel * p.pooled_h * p.pooled_w + cell) * step.channel;
  }
  __device__ __forceinline__ bool empty() const { return ys.begin >= ys.end || xs.begin >= xs.end; }

  template <typename Visit>
  __device__ __forceinline__ void for_each_element(Visit visit) const {
    for (int y = ys.begin; y < ys.end; ++y) {
      for (int x = xs.begin; x < xs.end; ++x) visit(offset + (y * width + x) * step.pixel);
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) forward(PsRoiPool p) {
  using A = Acc<T>;
  const int64_t roi = blockIdx.x;
  const int cells = p.pooled_h * p.pooled_w;
  const int64_t channels = channels_of(p), items = channels * cells;
  const auto found = find_roi<Rule, A>(p, roi, p.pooled_h, p.pooled_w);
  const T* map = static_cast<const T*>(p.maps[found.level]);
  T* pooled = static_cast<T*>(p.pooled) + roi * items;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < items;
       i += stride) {
    A mean = 0;
    if (found.valid) {
      const int64_t channel = p.channels_last ? i % channels : i / cells;
      const Cell<A> cell(
          p, found, channel, static_cast<int>(p.channels_last ? i / channels : i % cells));
      A sum = 0;
      cell.for_each_element([&](int64_t element) { sum += to_acc(map[element]); });
      if (!cell.empty()) mean = sum / area<A>(cell.ys, cell.xs);
    }
    pooled[i] = from_acc<T>(mean);
  }
}

template <typename T>
struct Spread {
  using Rule = PositionSensitiveRule;
  static __host__ __device__ int64_t pooled_channels(const PsRoiPool& p) { return channels_of(p); }
  static __device__ int steps_h(const PsRoiPool& p) { return p.pooled_h; }
  static __device__ int steps_w(const PsRoiPool& p) { return p.pooled_w; }

  template <typename Add>
  static __device__ __forceinline__ void add(
      const PsRoiPool& p, const FoundRoi<Acc<T>>& found, int64_t roi, int64_t channel,
      int cell_index, Add add) {
    using A = Acc<T>;
    const Cell<A> cell(p, found, channel, cell_index);
    if (cell.empty()) return;
    const int64_t in = pooled_offset(p, roi, channels_of(p), channel, cell_index);
    const A part = to_acc(static_cast<const T*>(p.pooled)[in]) / area<A>(cell.ys, cell.xs);
    A* map = static_cast<A*>(p.maps[found.level]);
    cell.for_each_element([&](int64_t element) { add(map + element, part); });
  }
};

}  // namespace

void ps_roi_pool_forward(const PsRoiPool& p, cudaStream_t stream) {
  with_type(p, [&](auto zero) {
    const int64_t items = channels_of(p) * p.pooled_h * p.pooled_w;
    forward<decltype(zero)><<<grid_of(p, items), kThreads, 0, stream>>>(p);
  });
}

void ps_roi_pool_backward(const PsRoiPool& p, bool deterministic, cudaStream_t stream) {
  with_type(p, [&](auto zero) {
    using T = decltype(zero);
    launch_scatter<T, Spread<T>>(p, deterministic, stream);
  });
}

}  // namespace detectron::kernels
