// RoIPoolF over all feature levels in one launch.
#include <math_constants.h>

#include "kernels.h"
#include "roi_pooling.h"

namespace detectron::kernels {
namespace {

template <typename A>
struct Largest {
  using Rule = PoolRule;
  using Index = int32_t;
  static constexpr Index kNone = -1;
  static constexpr int kHeld = 4;
  static constexpr bool kOnePixel = true, kVectors = true;
  static __host__ __device__ Index* saved(const RoiPool& p) { return p.argmax; }
  static __host__ __device__ int64_t channels(const RoiPool& p) { return p.channels; }
  static __device__ int steps_h(const RoiPool& p) { return p.pooled_h; }
  static __device__ int steps_w(const RoiPool& p) { return p.pooled_w; }

  Span ys, xs;
  int width, pixels;

  Largest() = default;
  __device__ __forceinline__ Largest(const RoiPool& p, const FoundRoi<A>& found, int cell) {
    const int bin_y = cell / p.pooled_w, height = p.heights[found.level];
    width = p.widths[found.level];
    pixels = height * width;  // at most 2**31 - 1, as the host checks
    ys = Rule::span(found.y, bin_y, height);
    xs = Rule::span(found.x, cell - bin_y * p.pooled_w, width);
  }
  __device__ __forceinline__ int64_t map_channel(int64_t channel) const { return channel; }

  template <typename T, int V, int U>
  __device__ __forceinline__ void gather(
      const T* const (&source)[U], int64_t pixel, A (&best)[U][V],
      Vector<Index, V> (&at)[U]) const {
    if (ys.begin >= ys.end || xs.begin >= xs.end) return;
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int k = 0; k < V; ++k) {  // the first pixel, unless a value is larger than the least
        best[u][k] = -static_cast<A>(CUDART_INF_F);
        at[u].v[k] = ys.begin * width + xs.begin;
      }
    }
    for (int y = ys.begin; y < ys.end; ++y) {
      const Index end = y * width + xs.end;
      for (Index index = y * width + xs.begin; index < end; ++index) {
        Packed<T, V> read[U];
#pragma unroll
        for (int u = 0; u < U; ++u) read[u].load(source[u] + index * pixel);
#pragma unroll
        for (int u = 0; u < U; ++u) {
          A value[V];
          read[u].expand(value);
#pragma unroll
          for (int k = 0; k < V; ++k) {
            if (value[k] > best[u][k] || value[k] != value[k]) {
              best[u][k] = value[k];
              at[u].v[k] = index;
            }
          }
        }
      }
    }
  }

  template <typename Add>
  __device__ __forceinline__ void spread(
      A value, Index index, A* map, int64_t pixel, Add add) const {
    if (index >= 0 && index < pixels) add(map + index * pixel, value);
  }
};

}  // namespace

void roi_pool_forward(const RoiPool& p, cudaStream_t stream) { launch_pool<Largest>(p, stream); }

void roi_pool_backward(const RoiPool& p, bool deterministic, cudaStream_t stream) {
  launch_scatter<Largest>(p, deterministic, stream);
}

}  // namespace detectron::kernels
