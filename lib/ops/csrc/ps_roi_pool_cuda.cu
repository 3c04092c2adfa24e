// Position-sensitive RoI pooling over all feature levels in one launch.
#include "kernels.h"
#include "roi_pooling.h"

namespace detectron::kernels {
namespace {

template <typename A>
struct Mean {
  using Rule = PositionSensitiveRule;
  using Index = uint8_t;  // nothing is saved
  static constexpr Index kNone = 0;
  static constexpr int kHeld = 1;  // few channels: a block has a thread for each value of an RoI
  static constexpr bool kOnePixel = false, kVectors = false;
  static __host__ __device__ Index* saved(const PsRoiPool&) { return nullptr; }
  static __host__ __device__ int64_t channels(const PsRoiPool& p) {
    return p.channels / (p.pooled_h * p.pooled_w);
  }
  static __device__ int steps_h(const PsRoiPool& p) { return p.pooled_h; }
  static __device__ int steps_w(const PsRoiPool& p) { return p.pooled_w; }

  Span ys, xs;
  int64_t width;
  int cell, cells;

  Mean() = default;
  __device__ __forceinline__ Mean(const PsRoiPool& p, const FoundRoi<A>& found, int of_cell) {
    const int bin_y = of_cell / p.pooled_w;
    width = p.widths[found.level];
    ys = Rule::span(found.y, bin_y, p.heights[found.level]);
    xs = Rule::span(found.x, of_cell - bin_y * p.pooled_w, p.widths[found.level]);
    cell = of_cell;
    cells = p.pooled_h * p.pooled_w;
  }
  __device__ __forceinline__ int64_t map_channel(int64_t channel) const {
    return channel * cells + cell;
  }

  template <typename T, int V>
  __device__ __forceinline__ void gather(
      const T* const (&source)[1], int64_t pixel, A (&mean)[1][V],
      Vector<Index, V> (&)[1]) const {
    static_assert(V == 1);
    if (ys.begin >= ys.end || xs.begin >= xs.end) return;
    A sum = 0;
    for (int y = ys.begin; y < ys.end; ++y) {
      const T* const row = source[0] + y * width * pixel;
      for (int x = xs.begin; x < xs.end; ++x) sum += to_acc(row[x * pixel]);
    }
    mean[0][0] = sum / area<A>(ys, xs);
  }

  template <typename Add>
  __device__ __forceinline__ void spread(A value, Index, A* map, int64_t pixel, Add add) const {
    const A part = value / area<A>(ys, xs);  // not used where there are no pixels
    for (int y = ys.begin; y < ys.end; ++y) {
      A* const row = map + y * width * pixel;
      for (int x = xs.begin; x < xs.end; ++x) add(row + x * pixel, part);
    }
  }
};

}  // namespace

void ps_roi_pool_forward(const PsRoiPool& p, cudaStream_t stream) { launch_pool<Mean>(p, stream); }

void ps_roi_pool_backward(const PsRoiPool& p, bool deterministic, cudaStream_t stream) {
  launch_scatter<Mean>(p, deterministic, stream);
}

}  // namespace detectron::kernels
