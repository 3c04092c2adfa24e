// RoIAlign over all feature levels in one launch.
//
// A block works on one RoI (several blocks where there are few RoIs). channels_last: neighbouring threads
// take neighbouring groups of channels, 16 bytes a load. NCHW: neighbouring threads take neighbouring
// cells of a plane. Sums are kept in float (double for double).
#include "kernels.h"
#include "roi_device.h"
#include "roi_geometry.h"

namespace detectron::kernels {
namespace {

// ---- adding to the gradient ---------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ void add_one(T* address, Acc<T> value) {
  atomicAdd(address, from_acc<T>(value));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
// No native bfloat16 atomics: compare and swap on the 4 bytes that hold the value.
__device__ __forceinline__ void add_one(__nv_bfloat16* address, float value) {
  const size_t location = reinterpret_cast<size_t>(address);
  unsigned* word = reinterpret_cast<unsigned*>(location & ~size_t(3));
  const unsigned shift = location & 2 ? 16 : 0;
  unsigned seen = *word, assumed;
  do {
    assumed = seen;
    const auto bits = static_cast<unsigned short>(assumed >> shift);
    const float sum = __bfloat162float(__ushort_as_bfloat16(bits)) + value;
    const unsigned fresh = __bfloat16_as_ushort(__float2bfloat16_rn(sum));
    seen = atomicCAS(word, assumed, (assumed & ~(0xffffu << shift)) | (fresh << shift));
  } while (seen != assumed);
}
#endif

template <typename T, int V>
__device__ __forceinline__ void add(T* address, const Acc<T> (&value)[V]) {
#pragma unroll
  for (int k = 0; k < V; ++k) add_one(address + k, value[k]);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// One reduction of 16 bytes instead of four (float) or eight.
__device__ __forceinline__ void add(float* address, const float (&v)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(v[0]), "f"(v[1]),
               "f"(v[2]), "f"(v[3])
               : "memory");
}

template <typename Pair>
__device__ __forceinline__ unsigned bits_of(Pair pair) {
  return *reinterpret_cast<unsigned*>(&pair);
}

__device__ __forceinline__ void add(__half* address, const float (&v)[8]) {
  asm volatile("red.global.add.noftz.v4.f16x2 [%0], {%1, %2, %3, %4};" ::"l"(address),
               "r"(bits_of(__floats2half2_rn(v[0], v[1]))),
               "r"(bits_of(__floats2half2_rn(v[2], v[3]))),
               "r"(bits_of(__floats2half2_rn(v[4], v[5]))),
               "r"(bits_of(__floats2half2_rn(v[6], v[7])))
               : "memory");
}

__device__ __forceinline__ void add(__nv_bfloat16* address, const float (&v)[8]) {
  asm volatile("red.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};" ::"l"(address),
               "r"(bits_of(__floats2bfloat162_rn(v[0], v[1]))),
               "r"(bits_of(__floats2bfloat162_rn(v[2], v[3]))),
               "r"(bits_of(__floats2bfloat162_rn(v[4], v[5]))),
               "r"(bits_of(__floats2bfloat162_rn(v[6], v[7])))
               : "memory");
}
#else
__device__ __forceinline__ void add(__half* address, const float (&v)[8]) {
#pragma unroll
  for (int k = 0; k < 8; k += 2) {
    atomicAdd(reinterpret_cast<__half2*>(address + k), __floats2half2_rn(v[k], v[k + 1]));
  }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
__device__ __forceinline__ void add(__nv_bfloat16* address, const float (&v)[8]) {
#pragma unroll
  for (int k = 0; k < 8; k += 2) {
    atomicAdd(
        reinterpret_cast<__nv_bfloat162*>(address + k), __floats2bfloat162_rn(v[k], v[k + 1]));
  }
}
#endif
#endif

// ---- one RoI ------------------------------------------------------------------------------------

template <typename T>
struct Target {
  bool valid;
  T* map;  // of the RoI's image
  int height, width;
  RoiGeometry<Acc<T>> g;
};

template <typename T>
__device__ __forceinline__ Target<T> find_target(const RoiAlign& p, int64_t roi) {
  Target<T> t{};
  const int64_t level = p.roi_levels ? p.roi_levels[roi] : 0;
  if (level < 0 || level >= p.levels) return t;
  t.g = roi_geometry<Acc<T>>(
      static_cast<const Acc<T>*>(p.boxes) + 5 * roi, static_cast<Acc<T>>(p.scales[level]), p.images,
      p.pooled_h, p.pooled_w, p.sampling_ratio, p.aligned);
  t.valid = t.g.valid;
  if (!t.valid) return t;
  t.height = p.heights[level];
  t.width = p.widths[level];
  t.map = static_cast<T*>(p.maps[level]) + t.g.image * p.channels * t.height * t.width;
  return t;
}

// Calls visit(offset, weight) for the (at most four) pixels of each sample of a cell that lie on the
// map; offset counts pixels, weight includes the mean's 1 / count.
template <typename T, typename Visit>
__device__ __forceinline__ void for_each_pixel(
    const Target<T>& t, int bin_y, int bin_x, Visit visit) {
  using A = Acc<T>;
  const A top = t.g.start_h + static_cast<A>(bin_y) * t.g.bin_h;
  const A left = t.g.start_w + static_cast<A>(bin_x) * t.g.bin_w;
  int y_first, y_last, x_first, x_last;
  sample_range<A>(
      top, t.g.step_h, t.g.grid_h, A(-1), static_cast<A>(t.height), &y_first, &y_last);
  sample_range<A>(
      left, t.g.step_w, t.g.grid_w, A(-1), static_cast<A>(t.width), &x_first, &x_last);
  for (int iy = y_first; iy < y_last; ++iy) {
    const auto y = axis_sample<A>(top + (static_cast<A>(iy) + A(0.5)) * t.g.step_h, t.height);
    if (!y.inside) continue;
    const int64_t low_row = static_cast<int64_t>(y.low) * t.width;
    const int64_t high_row = static_cast<int64_t>(y.high) * t.width;
    const A low_weight = y.weight_low * t.g.weight, high_weight = y.weight_high * t.g.weight;
    for (int ix = x_first; ix < x_last; ++ix) {
      const auto x = axis_sample<A>(left + (static_cast<A>(ix) + A(0.5)) * t.g.step_w, t.width);
      if (!x.inside) continue;
      visit(low_row + x.low, low_weight * x.weight_low);
      visit(low_row + x.high, low_weight * x.weight_high);
      visit(high_row + x.low, high_weight * x.weight_low);
      visit(high_row + x.high, high_weight * x.weight_high);
    }
  }
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) forward(RoiAlign p) {
  using A = Acc<T>;
  const int64_t roi = blockIdx.x;
  const int64_t items = p.channels / V * p.pooled_h * p.pooled_w;
  // In both layouts the items of an RoI lie in the output in the order in which they are counted.
  auto* out = reinterpret_cast<Vector<T, V>*>(p.pooled) + roi * items;
  const Target<T> t = find_target<T>(p, roi);
  const int64_t area = static_cast<int64_t>(t.height) * t.width;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < items;
       i += stride) {
    A sum[V] = {};
    if (t.valid) {
      const Item item = item_at<V, kChannelsLast>(p, i);
      const T* source = t.map + (kChannelsLast ? item.channel : item.channel * area);
      const int64_t step = kChannelsLast ? p.channels : 1;
      for_each_pixel(t, item.bin_y, item.bin_x, [&](int64_t offset, A weight) {
        const auto value = *reinterpret_cast<const Vector<T, V>*>(source + offset * step);
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] = fma(weight, to_acc(value.v[k]), sum[k]);
      });
    }
    Vector<T, V> result;
#pragma unroll
    for (int k = 0; k < V; ++k) result.v[k] = from_acc<T>(sum[k]);
    out[i] = result;
  }
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) backward(RoiAlign p) {
  using A = Acc<T>;
  const int64_t roi = blockIdx.x;
  const int64_t items = p.channels / V * p.pooled_h * p.pooled_w;
  const auto* grad = reinterpret_cast<const Vector<T, V>*>(p.pooled) + roi * items;
  const Target<T> t = find_target<T>(p, roi);
  if (!t.valid) return;
  const int64_t area = static_cast<int64_t>(t.height) * t.width;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < items;
       i += stride) {
    const Vector<T, V> value = grad[i];
    const Item item = item_at<V, kChannelsLast>(p, i);
    T* map = t.map + (kChannelsLast ? item.channel : item.channel * area);
    const int64_t step = kChannelsLast ? p.channels : 1;
    for_each_pixel(t, item.bin_y, item.bin_x, [&](int64_t offset, A weight) {
      if (weight == A(0)) return;
      A part[V];
#pragma unroll
      for (int k = 0; k < V; ++k) part[k] = weight * to_acc(value.v[k]);
      add(map + offset * step, part);
    });
  }
}

// ---- the gradient in a fixed order --------------------------------------------------------------
//
// A block owns a tile of pixels of one image and gathers: window after window of RoIs, those that touch
// the tile are listed in order, and every thread adds up the list for its own (pixel, channel) pairs.

constexpr int kTileSide = 8;
constexpr int kWindow = 1024;

// Sum of the weights with which the samples of bin `b` read index `i` of an axis of `size` pixels.
template <typename A>
__device__ __forceinline__ A axis_weight(A start, A bin, A step, int grid, int b, int i, int size) {
  const A origin = start + static_cast<A>(b) * bin;
  int first, last;
  sample_range<A>(
      origin, step, grid, static_cast<A>(i - 1), static_cast<A>(i + 1), &first, &last);
  A weight = 0;
  for (int k = first; k < last; ++k) {
    const auto s = axis_sample<A>(origin + (static_cast<A>(k) + A(0.5)) * step, size);
    if (!s.inside) continue;
    if (s.low == i) weight += s.weight_low;
    if (s.high == i && s.high != s.low) weight += s.weight_high;
  }
  return weight;
}

// Bins [first, last) whose samples may read index i; generous by one.
template <typename A>
__device__ __forceinline__ void bin_range(
    A start, A bin, int bins, int i, int* first, int* last) {
  sample_range<A>(start, bin, bins, static_cast<A>(i - 1), static_cast<A>(i + 1), first, last);
}

// Whether samples in [start, start + extent] may read pixels [first, first + kTileSide).
template <typename A>
__device__ __forceinline__ bool touches(A start, A extent, int first) {
  const A end = start + extent;
  const A low = start < end ? start : end, high = start < end ? end : start;
  return high >= static_cast<A>(first - 2) && low <= static_cast<A>(first + kTileSide + 1);
}

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) gather(RoiAlign p, int level) {
  using A = Acc<T>;
  __shared__ int64_t list[kWindow];
  __shared__ int warp_counts[kThreads / 32];
  const int height = p.heights[level], width = p.widths[level];
  const int tiles_x = (width + kTileSide - 1) / kTileSide;
  const int tile_y = static_cast<int>(blockIdx.x) / tiles_x * kTileSide;
  const int tile_x = static_cast<int>(blockIdx.x) % tiles_x * kTileSide;
  const int64_t image = blockIdx.y, area = static_cast<int64_t>(height) * width;
  const int bins = p.pooled_h * p.pooled_w;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T* map = static_cast<T*>(p.maps[level]) + image * p.channels * area;

  for (int64_t window = 0; window < p.rois; window += kWindow) {
    int listed = 0;
    for (int k = 0; k < kWindow; k += kThreads) {
      const int64_t roi = window + k + threadIdx.x;
      bool hit = false;
      if (roi < p.rois && (p.roi_levels ? p.roi_levels[roi] : 0) == level) {
        const Target<T> t = find_target<T>(p, roi);
        hit = t.valid && t.g.image == image &&
            touches(t.g.start_h, t.g.bin_h * static_cast<A>(p.pooled_h), tile_y) &&
            touches(t.g.start_w, t.g.bin_w * static_cast<A>(p.pooled_w), tile_x);
      }
      const unsigned hits = __ballot_sync(0xffffffffu, hit);
      if (lane == 0) warp_counts[warp] = __popc(hits);
      __syncthreads();
      int before = listed;
      for (int w = 0; w < kThreads / 32; ++w) {
        if (w < warp) before += warp_counts[w];
        listed += warp_counts[w];
      }
      if (hit) list[before + __popc(hits & ((1u << lane) - 1))] = roi;
      __syncthreads();  // the list, and warp_counts before it is overwritten
    }
    if (listed == 0) continue;  // uniform over the block

    const int64_t items = p.channels * kTileSide * kTileSide;
    for (int64_t i = threadIdx.x; i < items; i += kThreads) {
      const int pixel = static_cast<int>(
          kChannelsLast ? i / p.channels : i % (kTileSide * kTileSide));
      const int64_t channel = kChannelsLast ? i % p.channels : i / (kTileSide * kTileSide);
      const int y = tile_y + pixel / kTileSide, x = tile_x + pixel % kTileSide;
      if (y >= height || x >= width) continue;
      A sum = 0;
      for (int n = 0; n < listed; ++n) {
        const Target<T> t = find_target<T>(p, list[n]);
        const RoiGeometry<A>& g = t.g;
        const T* grad = static_cast<const T*>(p.pooled) + list[n] * p.channels * bins +
            (kChannelsLast ? channel : channel * bins);
        const int64_t step = kChannelsLast ? p.channels : 1;
        int y_first, y_last, x_first, x_last;
        bin_range(g.start_h, g.bin_h, p.pooled_h, y, &y_first, &y_last);
        bin_range(g.start_w, g.bin_w, p.pooled_w, x, &x_first, &x_last);
        for (int by = y_first; by < y_last; ++by) {
          const A wy = axis_weight(g.start_h, g.bin_h, g.step_h, g.grid_h, by, y, height);
          if (wy == A(0)) continue;
          for (int bx = x_first; bx < x_last; ++bx) {
            const A wx = axis_weight(g.start_w, g.bin_w, g.step_w, g.grid_w, bx, x, width);
            if (wx == A(0)) continue;
            sum += wy * wx * g.weight * to_acc(grad[(by * p.pooled_w + bx) * step]);
          }
        }
      }
      T* out = map + (kChannelsLast ? (static_cast<int64_t>(y) * width + x) * p.channels + channel
                                    : channel * area + static_cast<int64_t>(y) * width + x);
      *out = from_acc<T>(to_acc(*out) + sum);
    }
    __syncthreads();  // the list is used up
  }
}

// ---- launching ----------------------------------------------------------------------------------

template <typename T>
void launch_forward(const RoiAlign& p, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t items = p.channels * p.pooled_h * p.pooled_w;
  if (vectors_fit(p, kVector)) {
    forward<T, kVector, true><<<grid_of(p, items / kVector), kThreads, 0, stream>>>(p);
  } else if (p.channels_last) {
    forward<T, 1, true><<<grid_of(p, items), kThreads, 0, stream>>>(p);
  } else {
    forward<T, 1, false><<<grid_of(p, items), kThreads, 0, stream>>>(p);
  }
}

template <typename T>
void launch_backward(const RoiAlign& p, bool deterministic, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t items = p.channels * p.pooled_h * p.pooled_w;
  if (deterministic) {
    for (int l = 0; l < p.levels; ++l) {
      const int64_t tiles_y = (p.heights[l] + kTileSide - 1) / kTileSide;
      const int64_t tiles_x = (p.widths[l] + kTileSide - 1) / kTileSide;
      if (tiles_y * tiles_x == 0) continue;
      const dim3 grid(
          static_cast<unsigned>(tiles_y * tiles_x), static_cast<unsigned>(p.images));
      if (p.channels_last) {
        gather<T, true><<<grid, kThreads, 0, stream>>>(p, l);
      } else {
        gather<T, false><<<grid, kThreads, 0, stream>>>(p, l);
      }
    }
  } else if (vectors_fit(p, kVector)) {
    backward<T, kVector, true><<<grid_of(p, items / kVector), kThreads, 0, stream>>>(p);
  } else if (p.channels_last) {
    backward<T, 1, true><<<grid_of(p, items), kThreads, 0, stream>>>(p);
  } else {
    backward<T, 1, false><<<grid_of(p, items), kThreads, 0, stream>>>(p);
  }
}

}  // namespace

void roi_align_forward(const RoiAlign& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::f32: return launch_forward<float>(p, stream);
    case DType::f64: return launch_forward<double>(p, stream);
    case DType::f16: return launch_forward<__half>(p, stream);
    case DType::bf16: return launch_forward<__nv_bfloat16>(p, stream);
  }
}

void roi_align_backward(const RoiAlign& p, bool deterministic, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::f32: return launch_backward<float>(p, deterministic, stream);
    case DType::f64: return launch_backward<double>(p, deterministic, stream);
    case DType::f16: return launch_backward<__half>(p, deterministic, stream);
    case DType::bf16: return launch_backward<__nv_bfloat16>(p, deterministic, stream);
  }
}

}  // namespace detectron::kernels
