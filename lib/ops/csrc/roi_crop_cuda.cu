// RoICrop over all feature levels in one launch.
#include "kernels.h"
#include "roi_pooling.h"

namespace detectron::kernels {
namespace {

// With max_pool a value is the largest of four samples, and its index says of which.
template <typename A>
struct Crop {
  using Rule = CropRule;
  using Index = uint8_t;
  static constexpr Index kNone = 0;
  static constexpr int kHeld = 2;
  static constexpr bool kOnePixel = false, kVectors = true;
  static __host__ __device__ Index* saved(const RoiCrop& p) { return p.choice; }
  static __host__ __device__ int64_t channels(const RoiCrop& p) { return p.channels; }
  static __device__ int steps_h(const RoiCrop& p) { return p.max_pool ? 2 * p.pooled_h : p.pooled_h; }
  static __device__ int steps_w(const RoiCrop& p) { return p.max_pool ? 2 * p.pooled_w : p.pooled_w; }

  Axis<A> y, x;
  int height, width, bin_y, bin_x;
  bool max_pool;

  Crop() = default;
  __device__ __forceinline__ Crop(const RoiCrop& p, const FoundRoi<A>& found, int cell)
      : y(found.y),
        x(found.x),
        height(p.heights[found.level]),
        width(p.widths[found.level]),
        bin_y(cell / p.pooled_w),
        bin_x(cell - bin_y * p.pooled_w),
        max_pool(p.max_pool) {}
  __device__ __forceinline__ int64_t map_channel(int64_t channel) const { return channel; }

  // Calls visit(pixel index, weight) for the four pixels of a sample, if it lies on the map at all.
  template <typename Visit>
  __device__ __forceinline__ void for_each_pixel(int n, Visit visit) const {
    const int fine = max_pool ? 2 : 1;
    const AxisSample<A> down = Rule::sample(y, bin_y * fine + n / 2, height);
    const AxisSample<A> across = Rule::sample(x, bin_x * fine + n % 2, width);
    if (!down.inside || !across.inside) return;
    const int64_t low_row = static_cast<int64_t>(down.low) * width;
    const int64_t high_row = static_cast<int64_t>(down.high) * width;
    visit(low_row + across.low, down.weight_low * across.weight_low);
    visit(low_row + across.high, down.weight_low * across.weight_high);
    visit(high_row + across.low, down.weight_high * across.weight_low);
    visit(high_row + across.high, down.weight_high * across.weight_high);
  }

  template <typename T, int V, int U>
  __device__ __forceinline__ void gather(
      const T* const (&source)[U], int64_t pixel, A (&best)[U][V],
      Vector<Index, V> (&choice)[U]) const {
    for (int n = 0; n < (max_pool ? 4 : 1); ++n) {
      A sample[U][V] = {};
      for_each_pixel(n, [&](int64_t position, A weight) {
        Packed<T, V> read[U];
#pragma unroll
        for (int u = 0; u < U; ++u) read[u].load(source[u] + position * pixel);
#pragma unroll
        for (int u = 0; u < U; ++u) {
          A value[V];
          read[u].expand(value);
#pragma unroll
          for (int k = 0; k < V; ++k) sample[u][k] += weight * value[k];
        }
      });
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const A value = sample[u][k];
          if (n == 0 || value > best[u][k] || value != value) {
            best[u][k] = value;
            choice[u].v[k] = static_cast<Index>(n);
          }
        }
      }
    }
  }

  template <typename Add>
  __device__ __forceinline__ void spread(
      A value, Index choice, A* map, int64_t pixel, Add add) const {
    for_each_pixel(choice & 3, [&](int64_t position, A weight) {
      if (weight != A(0)) add(map + position * pixel, weight * value);
    });
  }
};

}  // namespace

void roi_crop_forward(const RoiCrop& p, cudaStream_t stream) { launch_pool<Crop>(p, stream); }

void roi_crop_backward(const RoiCrop& p, bool deterministic, cudaStream_t stream) {
  launch_scatter<Crop>(p, deterministic, stream);
}

}  // namespace detectron::kernels
