// RoICrop over all feature levels in one launch; the work is shared out as by RoIAlign.
#include "kernels.h"
#include "roi_scatter.h"

namespace detectron::kernels {
namespace {

// Calls visit(pixel index, weight) for the four pixels of a sample, if it lies on the map at all.
template <typename A, typename Visit>
__device__ __forceinline__ void for_each_pixel(
    const RoiCrop& p, const FoundRoi<A>& found, int point_y, int point_x, Visit visit) {
  const int width = p.widths[found.level];
  const AxisSample<A> y = CropRule::sample(found.y, point_y, p.heights[found.level]);
  const AxisSample<A> x = CropRule::sample(found.x, point_x, width);
  if (!y.inside || !x.inside) return;
  const int64_t low_row = static_cast<int64_t>(y.low) * width;
  const int64_t high_row = static_cast<int64_t>(y.high) * width;
  visit(low_row + x.low, y.weight_low * x.weight_low);
  visit(low_row + x.high, y.weight_low * x.weight_high);
  visit(high_row + x.low, y.weight_high * x.weight_low);
  visit(high_row + x.high, y.weight_high * x.weight_high);
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) forward(RoiCrop p) {
  using A = Acc<T>;
  const int64_t roi = blockIdx.x;
  const int fine = p.max_pool ? 2 : 1;
  const int64_t items = p.channels / V * p.pooled_h * p.pooled_w;
  // In both layouts the items of an RoI lie in the output in the order in which they are counted.
  auto* pooled = reinterpret_cast<Vector<T, V>*>(p.pooled) + roi * items;
  auto* choice = reinterpret_cast<Vector<uint8_t, V>*>(p.choice) + roi * items;
  const auto found = find_roi<CropRule, A>(p, roi, fine * p.pooled_h, fine * p.pooled_w);
  const T* map = static_cast<const T*>(p.maps[found.level]) +
      image_offset(p, found.level, found.image);
  const MapLayout step = map_layout(p, found.level);
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < items;
       i += stride) {
    A best[V] = {};
    Vector<uint8_t, V> chosen{};
    if (found.valid) {
      const Item item = item_at<V, kChannelsLast>(p, i);
      const T* source = map + item.channel * step.channel;
      for (int n = 0; n < fine * fine; ++n) {
        A value[V] = {};
        for_each_pixel(
            p, found, item.bin_y * fine + n / 2, item.bin_x * fine + n % 2,
            [&](int64_t pixel, A weight) {
              const auto read = *reinterpret_cast<const Vector<T, V>*>(source + pixel * step.pixel);
#pragma unroll
              for (int k = 0; k < V; ++k) value[k] += weight * to_acc(read.v[k]);
            });
#pragma unroll
        for (int k = 0; k < V; ++k) {
          if (n == 0 || value[k] > best[k] || value[k] != value[k]) {
            best[k] = value[k];
            chosen.v[k] = static_cast<uint8_t>(n);
          }
        }
      }
    }
    Vector<T, V> result;
#pragma unroll
    for (int k = 0; k < V; ++k) result.v[k] = from_acc<T>(best[k]);
    pooled[i] = result;
    if (p.max_pool) choice[i] = chosen;
  }
}

template <typename T>
struct Spread {
  using Rule = CropRule;
  static __host__ __device__ int64_t pooled_channels(const RoiCrop& p) { return p.channels; }
  static __device__ int steps_h(const RoiCrop& p) { return p.max_pool ? 2 * p.pooled_h : p.pooled_h; }
  static __device__ int steps_w(const RoiCrop& p) { return p.max_pool ? 2 * p.pooled_w : p.pooled_w; }

  template <typename Add>
  static __device__ __forceinline__ void add(
      const RoiCrop& p, const FoundRoi<Acc<T>>& found, int64_t roi, int64_t channel, int cell,
      Add add) {
    using A = Acc<T>;
    const int fine = p.max_pool ? 2 : 1;
    const int64_t in = pooled_offset(p, roi, p.channels, channel, cell);
    const int n = p.max_pool ? p.choice[in] & 3 : 0;
    const A value = to_acc(static_cast<const T*>(p.pooled)[in]);
    const MapLayout step = map_layout(p, found.level);
    A* map = static_cast<A*>(p.maps[found.level]) + image_offset(p, found.level, found.image) +
        channel * step.channel;
    for_each_pixel(
        p, found, cell / p.pooled_w * fine + n / 2, cell % p.pooled_w * fine + n % 2,
        [&](int64_t pixel, A weight) {
          if (weight != A(0)) add(map + pixel * step.pixel, weight * value);
        });
  }
};

}  // namespace

void roi_crop_forward(const RoiCrop& p, cudaStream_t stream) {
  with_type(p, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kVector = 16 / sizeof(T);
    const int64_t items = p.channels * p.pooled_h * p.pooled_w;
    if (vectors_fit(p, kVector) && aligned_to(p.choice, kVector)) {
      forward<T, kVector, true><<<grid_of(p, items / kVector), kThreads, 0, stream>>>(p);
    } else if (p.channels_last) {
      forward<T, 1, true><<<grid_of(p, items), kThreads, 0, stream>>>(p);
    } else {
      forward<T, 1, false><<<grid_of(p, items), kThreads, 0, stream>>>(p);
    }
  });
}

void roi_crop_backward(const RoiCrop& p, bool deterministic, cudaStream_t stream) {
  with_type(p, [&](auto zero) {
    using T = decltype(zero);
    launch_scatter<T, Spread<T>>(p, deterministic, stream);
  });
}

}  // namespace detectron::kernels
