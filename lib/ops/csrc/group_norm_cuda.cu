// Group normalisation forwards, with an addition and a ReLU in the same pass.
#include "group_norm_device.h"

namespace detectron::kernels {
namespace {

// Mean and sum of squared distances of each of a thread's V series of values. A series is summed as distances
// from its own first value, which lies about as far from the mean as the others: nothing cancels.
template <typename T, int V>
struct Series {
  using A = Acc<T>;
  A first[V] = {}, a[V] = {}, b[V] = {};

  __device__ __forceinline__ void add(const Packed<T, V>& raw, bool is_first) {
    A x[V];
    raw.expand(x);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (is_first) first[v] = x[v];
      const A distance = x[v] - first[v];
      a[v] += distance;
      b[v] = fma(distance, distance, b[v]);
    }
  }
  // From sums to moments.
  __device__ __forceinline__ void finish(int count) {
    if (count == 0) return;
    const A n = static_cast<A>(count);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A mean = a[v] / n;
      b[v] = max(fma(-mean, a[v], b[v]), A(0));
      a[v] = first[v] + mean;
    }
  }
};

template <typename T, int V>
__device__ __forceinline__ void write_normalised(
    const Packed<T, V>& raw, const Affine<Acc<T>, V>& affine, const GroupNorm& p, int64_t at) {
  Acc<T> x[V];
  raw.expand(x);
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] = affine.apply(x[v], v);
  if (p.residual != nullptr) {
    Packed<T, V> more;
    more.load(static_cast<const T*>(p.residual) + at);
    Acc<T> residual[V];
    more.expand(residual);
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] += residual[v];
  }
  if (p.relu) {
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = x[v] < Acc<T>(0) ? Acc<T>(0) : x[v];  // keeps NaN
  }
  Packed<T, V> result;
  result.pack(x);
  result.store(static_cast<T*>(p.y) + at);
}

template <typename A>
__device__ __forceinline__ A rstd_of(A m2, A count, double eps) {
  return A(1) / sqrt(m2 / count + static_cast<A>(eps));
}

// ---- large maps: partial moments, groups' moments, the result -----------------------------------

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) partial_moments(GroupNorm p, Tiles t) {
  using A = Acc<T>;
  __shared__ A shared[Shared<A, V>::kSize];
  const Walk w = walk<V, kChannelsLast>(p, t, blockIdx.x);
  const T* x = static_cast<const T*>(p.x) + w.first;
  Series<T, V> series;
#pragma unroll 4
  for (int i = 0; i < w.count; ++i) {
    Packed<T, V> raw;
    raw.load(x + i * w.stride);
    series.add(raw, i == 0);
  }
  series.finish(w.count);
  write_partial<Moments, V, kChannelsLast>(series.a, series.b, w, p, t, shared);
}

// A block a group: the mean of the partial means, then the distances from it.
template <typename A>
__global__ void __launch_bounds__(kThreads) join_moments(GroupNorm p, Tiles t, int values_per_step) {
  const int per_group = p.channels / p.groups;
  const int64_t image = blockIdx.x / static_cast<unsigned>(p.groups);
  const int group = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.groups));
  const auto* partial = static_cast<const Pair<A>*>(p.scratch) +
                        image * t.chunks * p.channels + group * per_group;
  const A count = static_cast<A>(p.pixels) * static_cast<A>(per_group);
  const A base = partial->a;
  const auto for_each = [&](auto visit) {
    for (int e = threadIdx.x; e < t.chunks * per_group; e += blockDim.x) {
      const int chunk = e / per_group;
      const int steps = min(t.chunk, t.steps - chunk * t.chunk);
      const Pair<A> part = partial[int64_t{chunk} * p.channels + (e - chunk * per_group)];
      visit(part, static_cast<A>(steps) * static_cast<A>(values_per_step));
    }
  };
  A mean = 0, m2 = 0;
  for_each([&](Pair<A> part, A n) { mean = fma(n, part.a - base, mean); });
  mean = base + block_sum(mean) / count;
  for_each([&](Pair<A> part, A n) {
    const A distance = part.a - mean;
    m2 += fma(n * distance, distance, part.b);
  });
  m2 = block_sum(m2);
  if (threadIdx.x != 0) return;
  static_cast<A*>(p.mean)[blockIdx.x] = mean;
  static_cast<A*>(p.rstd)[blockIdx.x] = rstd_of(m2, count, p.eps);
}

// The blocks go backwards: what was read last is still in the cache.
template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) normalise(GroupNorm p, Tiles t) {
  const Walk w = walk<V, kChannelsLast>(p, t, gridDim.x - 1 - blockIdx.x);
  if (w.count == 0) return;
  Affine<Acc<T>, V> affine;
  affine.template load<kChannelsLast>(p, w);
  const T* x = static_cast<const T*>(p.x);
#pragma unroll 4
  for (int i = 0; i < w.count; ++i) {
    const int64_t at = w.first + i * w.stride;
    Packed<T, V> raw;
    raw.load(x + at);
    write_normalised(raw, affine, p, at);
  }
}

// ---- small maps: all in one kernel --------------------------------------------------------------

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) normalise_fused(GroupNorm p, Tiles t) {
  using A = Acc<T>;
  extern __shared__ uint4 kept_words[];
  auto* kept = reinterpret_cast<Packed<T, V>*>(kept_words);
  __shared__ A shared[Shared<A, V>::kSize];
  const int thread = threadIdx.x;
  const Walk w = walk<V, true>(p, t, blockIdx.x);
  const T* x = static_cast<const T*>(p.x);
  Series<T, V> series;
#pragma unroll 4
  for (int i = 0; i < w.count; ++i) {
    Packed<T, V> raw;
    raw.load(x + w.first + i * w.stride);
    if (i < t.kept) kept[i * kThreads + thread] = raw;
    series.add(raw, i == 0);
  }
  series.finish(w.count);
  join_rows<Moments>(series.a, series.b, static_cast<A>(w.count), w, t, shared);

  // Channels' moments of the tile, which each warp replaces by those of its groups.
  A *first = shared, *second = shared + kThreads * V;
  if (w.row == 0) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      first[w.lane * V + v] = series.a[v];
      second[w.lane * V + v] = series.b[v];
    }
  }
  __syncthreads();
  const int per_group = p.channels / p.groups;
  const int tile_channel = w.channel - w.lane * V;
  const int groups = min(t.lanes * V, p.channels - tile_channel) / per_group;
  const A pixels = static_cast<A>(p.pixels), count = pixels * static_cast<A>(per_group);
  for (int group = thread / 32; group < groups; group += kWarps) {
    const int from = group * per_group;
    const A base = first[from];
    A mean = 0, m2 = 0;
    for (int c = thread % 32; c < per_group; c += 32) mean += first[from + c] - base;
    mean = base + warp_sum(mean) / static_cast<A>(per_group);
    for (int c = thread % 32; c < per_group; c += 32) {
      const A distance = first[from + c] - mean;
      m2 += fma(pixels * distance, distance, second[from + c]);
    }
    const A rstd = rstd_of(warp_sum(m2), count, p.eps);
    for (int c = thread % 32; c < per_group; c += 32) {
      first[from + c] = mean;
      second[from + c] = rstd;
    }
    if (thread % 32 == 0) {
      const int64_t at = w.image * p.groups + tile_channel / per_group + group;
      static_cast<A*>(p.mean)[at] = mean;
      static_cast<A*>(p.rstd)[at] = rstd;
    }
  }
  __syncthreads();
  if (w.count == 0) return;
  Affine<A, V> affine;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    affine.mean[v] = first[w.lane * V + v];
    affine.rstd[v] = second[w.lane * V + v];
  }
  affine.template load_affine<true>(p, w);
#pragma unroll 4
  for (int i = 0; i < w.count; ++i) {
    const int64_t at = w.first + i * w.stride;
    Packed<T, V> raw;
    if (i < t.kept) {
      raw = kept[i * kThreads + thread];
    } else {
      raw.load(x + at);
    }
    write_normalised(raw, affine, p, at);
  }
}

// ---- launching ----------------------------------------------------------------------------------

template <typename T, int V, bool kChannelsLast>
void launch_split(const GroupNorm& p, const Tiles& t, cudaStream_t stream) {
  const unsigned blocks = blocks_of(p, t), groups = static_cast<unsigned>(p.images * p.groups);
  const unsigned threads = threads_for(int64_t{t.chunks} * (p.channels / p.groups));
  partial_moments<T, V, kChannelsLast><<<blocks, kThreads, 0, stream>>>(p, t);
  join_moments<Acc<T>><<<groups, threads, 0, stream>>>(p, t, kChannelsLast ? 1 : V);
  normalise<T, V, kChannelsLast><<<blocks, kThreads, 0, stream>>>(p, t);
}

}  // namespace

int64_t group_norm_scratch(const GroupNorm& p) {
  int64_t size = 0;
  with_values(p, [&](auto value, auto per_vector) {
    const Tiles t = tiles_of(p, per_vector, sizeof(value));
    size = 2 * p.images * (int64_t{t.chunks} * p.channels + p.groups);
  });
  return size;
}

void group_norm_forward(const GroupNorm& p, cudaStream_t stream) {
  with_values(p, [&](auto value, auto per_vector) {
    using T = decltype(value);
    constexpr int V = per_vector;
    Tiles t = tiles_of(p, V, sizeof(T));
    if (is_fused(p, V, sizeof(T))) {
      const size_t bytes = keep_vectors(t, normalise_fused<T, V>, sizeof(Packed<T, V>));
      normalise_fused<T, V><<<blocks_of(p, t), kThreads, bytes, stream>>>(p, t);
    } else if (p.channels_last) {
      launch_split<T, V, true>(p, t, stream);
    } else {
      launch_split<T, V, false>(p, t, stream);
    }
  });
}

}  // namespace detectron::kernels
