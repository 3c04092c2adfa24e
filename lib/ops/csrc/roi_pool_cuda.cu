// RoIPoolF over all feature levels in one launch; the work is shared out as by RoIAlign.
#include "kernels.h"
#include "roi_scatter.h"

namespace detectron::kernels {
namespace {

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) forward(RoiPool p) {
  using A = Acc<T>;
  const int64_t roi = blockIdx.x;
  const int64_t items = p.channels / V * p.pooled_h * p.pooled_w;
  // In both layouts the items of an RoI lie in the output in the order in which they are counted.
  auto* pooled = reinterpret_cast<Vector<T, V>*>(p.pooled) + roi * items;
  auto* argmax = reinterpret_cast<Vector<int32_t, V>*>(p.argmax) + roi * items;
  const auto found = find_roi<PoolRule, A>(p, roi, p.pooled_h, p.pooled_w);
  const int height = p.heights[found.level], width = p.widths[found.level];
  const T* map = static_cast<const T*>(p.maps[found.level]) +
      image_offset(p, found.level, found.image);
  const MapLayout step = map_layout(p, found.level);
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < items;
       i += stride) {
    Vector<T, V> best;
    Vector<int32_t, V> at;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      best.v[k] = from_acc<T>(A(0));
      at.v[k] = -1;
    }
    if (found.valid) {
      const Item item = item_at<V, kChannelsLast>(p, i);
      const T* source = map + item.channel * step.channel;
      const Span ys = PoolRule::span(found.y, item.bin_y, height);
      const Span xs = PoolRule::span(found.x, item.bin_x, width);
      for (int y = ys.begin; y < ys.end; ++y) {
        for (int x = xs.begin; x < xs.end; ++x) {
          const int32_t index = y * width + x;
          const auto value = *reinterpret_cast<const Vector<T, V>*>(source + index * step.pixel);
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const A v = to_acc(value.v[k]);
            if (at.v[k] < 0 || v > to_acc(best.v[k]) || v != v) {
              best.v[k] = value.v[k];
              at.v[k] = index;
            }
          }
        }
      }
    }
    pooled[i] = best;
    argmax[i] = at;
  }
}

template <typename T>
struct Spread {
  using Rule = PoolRule;
  static __host__ __device__ int64_t pooled_channels(const RoiPool& p) { return p.channels; }
  static __device__ int steps_h(const RoiPool& p) { return p.pooled_h; }
  static __device__ int steps_w(const RoiPool& p) { return p.pooled_w; }

  template <typename Add>
  static __device__ __forceinline__ void add(
      const RoiPool& p, const FoundRoi<Acc<T>>& found, int64_t roi, int64_t channel, int cell,
      Add add) {
    const int64_t in = pooled_offset(p, roi, p.channels, channel, cell);
    const int64_t index = p.argmax[in];
    if (index < 0 || index >= static_cast<int64_t>(p.heights[found.level]) * p.widths[found.level]) {
      return;
    }
    const MapLayout step = map_layout(p, found.level);
    Acc<T>* map = static_cast<Acc<T>*>(p.maps[found.level]) +
        image_offset(p, found.level, found.image);
    add(map + index * step.pixel + channel * step.channel,
        to_acc(static_cast<const T*>(p.pooled)[in]));
  }
};

}  // namespace

void roi_pool_forward(const RoiPool& p, cudaStream_t stream) {
  with_type(p, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kVector = 16 / sizeof(T);
    const int64_t items = p.channels * p.pooled_h * p.pooled_w;
    if (vectors_fit(p, kVector) && aligned_to(p.argmax, sizeof(int32_t) * kVector)) {
      forward<T, kVector, true><<<grid_of(p, items / kVector), kThreads, 0, stream>>>(p);
    } else if (p.channels_last) {
      forward<T, 1, true><<<grid_of(p, items), kThreads, 0, stream>>>(p);
    } else {
      forward<T, 1, false><<<grid_of(p, items), kThreads, 0, stream>>>(p);
    }
  });
}

void roi_pool_backward(const RoiPool& p, bool deterministic, cudaStream_t stream) {
  with_type(p, [&](auto zero) {
    using T = decltype(zero);
    launch_scatter<T, Spread<T>>(p, deterministic, stream);
  });
}

}  // namespace detectron::kernels
