// RoIAlign over all feature levels in one launch.
//
// A block works on one RoI (several blocks where there are few RoIs). channels_last: neighbouring threads
// take neighbouring groups of channels, 16 bytes a load. NCHW: neighbouring threads take neighbouring
// cells of a plane. Sums are kept in float (double for double).
//
// A cell's mean is separable: with one or two samples an axis the pixels that they share are merged, once
// a block, into at most four pixels with weights for each row and each column of cells.
#include "kernels.h"
#include "roi_align_device.h"

namespace detectron::kernels {
namespace {

constexpr size_t kSharedBytes = 40 << 10;
constexpr int64_t kMostItems = int64_t{1} << 30;  // counted in 32 bits

// ---- one or two samples an axis -----------------------------------------------------------------

template <typename A>
struct Taps {
  int count;
  int64_t offset[4];  // elements from the map's first
  A weight[4];
};

template <typename A>
__device__ __forceinline__ void add_tap(Taps<A>* taps, int64_t offset, A weight) {
  for (int i = 0; i < taps->count; ++i) {
    if (taps->offset[i] == offset) {
      taps->weight[i] += weight;
      return;
    }
  }
  taps->offset[taps->count] = offset;
  taps->weight[taps->count++] = weight;
}

// The pixels that the samples of a cell read on one axis; `pitch` is the elements between two pixels.
template <typename A>
__device__ Taps<A> taps_of(A origin, A step, int grid, int size, int64_t pitch, A factor) {
  Taps<A> taps;
  taps.count = 0;
  for (int i = 0; i < grid; ++i) {
    const auto s = axis_sample<A>(origin + (static_cast<A>(i) + A(0.5)) * step, size);
    if (!s.inside) continue;
    add_tap(&taps, s.low * pitch, s.weight_low * factor);
    add_tap(&taps, s.high * pitch, s.weight_high * factor);
  }
  return taps;
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) forward_taps(RoiAlign p) {
  using A = Acc<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  auto* rows = reinterpret_cast<Taps<A>*>(shared);
  Taps<A>* columns = rows + p.pooled_h;
  const int64_t roi = blockIdx.x;
  const int64_t items = p.channels / V * p.pooled_h * p.pooled_w;
  // In both layouts the items of an RoI lie in the output in the order in which they are counted.
  auto* out = reinterpret_cast<Vector<T, V>*>(p.pooled) + roi * items;
  const Target<T> t = find_target<T>(p, roi);
  const int64_t area = static_cast<int64_t>(t.height) * t.width;
  const int64_t pitch = kChannelsLast ? p.channels : 1;
  for (int i = threadIdx.x; i < p.pooled_h + p.pooled_w; i += kThreads) {
    const int j = i - p.pooled_h;
    if (!t.valid) {
      rows[i].count = 0;
    } else if (j < 0) {
      rows[i] = taps_of<A>(
          t.g.start_h + static_cast<A>(i) * t.g.bin_h, t.g.step_h, t.g.grid_h, t.height,
          t.width * pitch, t.g.weight);
    } else {
      columns[j] = taps_of<A>(
          t.g.start_w + static_cast<A>(j) * t.g.bin_w, t.g.step_w, t.g.grid_w, t.width, pitch,
          A(1));
    }
  }
  __syncthreads();
  const unsigned bins = p.pooled_h * p.pooled_w, groups = static_cast<unsigned>(p.channels / V);
  const unsigned stride = gridDim.y * kThreads;
  for (unsigned i = blockIdx.y * kThreads + threadIdx.x; i < items; i += stride) {
    const unsigned major = i / (kChannelsLast ? groups : bins);
    const unsigned minor = i - major * (kChannelsLast ? groups : bins);
    const unsigned bin = kChannelsLast ? major : minor;
    const T* source = t.map + (kChannelsLast ? int64_t{minor} * V : major * area);
    const unsigned bin_y = bin / static_cast<unsigned>(p.pooled_w);
    const Taps<A>& ys = rows[bin_y];
    const Taps<A>& xs = columns[bin - bin_y * static_cast<unsigned>(p.pooled_w)];
    const int width = xs.count;
    const T* column[4];
    A column_weight[4];
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      if (x >= width) continue;
      column[x] = source + xs.offset[x];
      column_weight[x] = xs.weight[x];
    }
    A sum[V] = {};
#pragma unroll 2
    for (int y = 0; y < ys.count; ++y) {
      const int64_t row = ys.offset[y];
      const A row_weight = ys.weight[y];
      Packed<T, V> value[4];
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        if (x < width) value[x].load(column[x] + row);
      }
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        if (x >= width) continue;
        const A weight = row_weight * column_weight[x];
        A part[V];
        value[x].expand(part);
#pragma unroll
        for (int k = 0; k < V; ++k) sum[k] = fma(weight, part[k], sum[k]);
      }
    }
    Vector<T, V> result;
#pragma unroll
    for (int k = 0; k < V; ++k) result.v[k] = from_acc<T>(sum[k]);
    out[i] = result;
  }
}

// ---- any number of samples ----------------------------------------------------------------------

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

// ---- launching ----------------------------------------------------------------------------------

template <typename T, int V, bool kChannelsLast>
void launch(const RoiAlign& p, cudaStream_t stream) {
  const dim3 grid = grid_of(p, p.channels / V * p.pooled_h * p.pooled_w);
  const size_t taps = sizeof(Taps<Acc<T>>) * (static_cast<size_t>(p.pooled_h) + p.pooled_w);
  const bool fits = taps <= kSharedBytes && p.channels / V * p.pooled_h * p.pooled_w < kMostItems;
  if (p.sampling_ratio >= 1 && p.sampling_ratio <= 2 && fits) {
    forward_taps<T, V, kChannelsLast><<<grid, kThreads, taps, stream>>>(p);
  } else {
    forward<T, V, kChannelsLast><<<grid, kThreads, 0, stream>>>(p);
  }
}

template <typename T>
void launch_forward(const RoiAlign& p, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  if (vectors_fit(p, kVector)) {
    launch<T, kVector, true>(p, stream);
  } else if (p.channels_last) {
    launch<T, 1, true>(p, stream);
  } else {
    launch<T, 1, false>(p, stream);
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

}  // namespace detectron::kernels
