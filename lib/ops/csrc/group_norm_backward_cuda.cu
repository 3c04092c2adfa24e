// The gradient of group normalisation with an addition and a ReLU.
//
// With g the gradient behind the ReLU, xhat the normalised input, and per group of m values
// s1 = sum(g * weight), s2 = sum(g * weight * xhat):
//   dx = rstd * (g * weight - (s1 + xhat * s2) / m), dbias = sum(g), dweight = sum(g * xhat).
#include "group_norm_device.h"

namespace detectron::kernels {
namespace {

// What a thread reads at one place: x, and the gradient behind the ReLU. Where the result's sign does not
// come from p.out it is found as forward found it, from x.
template <typename T, int V>
struct Values {
  using A = Acc<T>;
  A x[V], g[V];

  __device__ __forceinline__ void load(
      const GroupNorm& p, const Affine<A, V>& affine, int64_t at, Packed<T, V>& raw_x) {
    Packed<T, V> raw_grad, raw_out;
    raw_x.load(static_cast<const T*>(p.x) + at);
    raw_grad.load(static_cast<const T*>(p.grad) + at);
    if (p.out != nullptr) raw_out.load(static_cast<const T*>(p.out) + at);
    raw_x.expand(x);
    raw_grad.expand(g);
    if (!p.relu) return;
    A result[V];
    if (p.out != nullptr) raw_out.expand(result);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (p.out == nullptr) result[v] = affine.apply(x[v], v);
      g[v] = result[v] <= A(0) ? A(0) : g[v];
    }
  }
};

template <typename T, int V>
__device__ __forceinline__ void add_to_sums(
    const Values<T, V>& values, const Affine<Acc<T>, V>& affine, Acc<T> (&a)[V], Acc<T> (&b)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    a[v] += values.g[v];
    b[v] = fma(values.g[v], (values.x[v] - affine.mean[v]) * affine.rstd[v], b[v]);
  }
}

// s1[v], s2[v]: the group's sums over m, times rstd, s2 once more.
template <typename T, int V>
__device__ __forceinline__ void write_dx(
    const Values<T, V>& values, const Affine<Acc<T>, V>& affine, const Acc<T> (&s1)[V],
    const Acc<T> (&s2)[V], const GroupNorm& p, int64_t at) {
  Acc<T> dx[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const Acc<T> shared = fma(values.x[v] - affine.mean[v], s2[v], s1[v]);
    dx[v] = fma(values.g[v], affine.scale[v], -shared);
  }
  Packed<T, V> result;
  result.pack(dx);
  result.store(static_cast<T*>(p.dx) + at);
}

template <typename T, int V>
__device__ __forceinline__ Packed<T, V> write_dresidual(
    const Values<T, V>& values, const GroupNorm& p, int64_t at) {
  Packed<T, V> masked;
  masked.pack(values.g);  // exact: they were of type T
  if (p.dresidual != nullptr) masked.store(static_cast<T*>(p.dresidual) + at);
  return masked;
}

template <typename A>
__device__ __forceinline__ A values_of_group(const GroupNorm& p) {
  return static_cast<A>(p.pixels) * static_cast<A>(p.channels / p.groups);
}

// ---- large maps: partial sums (and the residual's gradient), groups' sums, dx -------------------

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) partial_sums(GroupNorm p, Tiles t) {
  using A = Acc<T>;
  __shared__ A shared[Shared<A, V>::kSize];
  const Walk w = walk<V, kChannelsLast>(p, t, blockIdx.x);
  Affine<A, V> affine;
  if (w.count > 0) affine.template load<kChannelsLast>(p, w);
  A a[V] = {}, b[V] = {};
#pragma unroll 2
  for (int i = 0; i < w.count; ++i) {
    const int64_t at = w.first + i * w.stride;
    Values<T, V> values;
    Packed<T, V> raw;
    values.load(p, affine, at, raw);
    write_dresidual(values, p, at);
    add_to_sums(values, affine, a, b);
  }
  write_partial<Sums, V, kChannelsLast>(a, b, w, p, t, shared);
}

// Where the groups' sums lie in the scratch memory, behind the partial ones: (images, groups) pairs.
template <typename A>
__device__ __forceinline__ Pair<A>* group_sums(const GroupNorm& p, const Tiles& t) {
  return static_cast<Pair<A>*>(p.scratch) + p.images * t.chunks * p.channels;
}

// A block a group.
template <typename A>
__global__ void __launch_bounds__(kThreads) join_sums(GroupNorm p, Tiles t) {
  const int per_group = p.channels / p.groups;
  const int64_t image = blockIdx.x / static_cast<unsigned>(p.groups);
  const int group = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.groups));
  const auto* partial = static_cast<const Pair<A>*>(p.scratch) + image * t.chunks * p.channels;
  A s1 = 0, s2 = 0;
  for (int e = threadIdx.x; e < t.chunks * per_group; e += blockDim.x) {
    const int chunk = e / per_group, channel = group * per_group + e - chunk * per_group;
    const Pair<A> part = partial[int64_t{chunk} * p.channels + channel];
    const A weight = static_cast<const A*>(p.weight)[channel];
    s1 = fma(weight, part.a, s1);
    s2 = fma(weight, part.b, s2);
  }
  s1 = block_sum(s1);
  s2 = block_sum(s2);
  if (threadIdx.x == 0) group_sums<A>(p, t)[blockIdx.x] = {s1, s2};
}

// p.grad here is the gradient behind the ReLU wherever partial_sums has written it. The blocks go backwards:
// what was read last is still in the cache.
template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) input_gradient(GroupNorm p, Tiles t) {
  using A = Acc<T>;
  const Walk w = walk<V, kChannelsLast>(p, t, gridDim.x - 1 - blockIdx.x);
  if (w.count == 0) return;
  Affine<A, V> affine;
  affine.template load<kChannelsLast>(p, w);
  const A m = values_of_group<A>(p);
  A s1[V], s2[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int group = (w.channel + (kChannelsLast ? v : 0)) / (p.channels / p.groups);
    const Pair<A> sums = group_sums<A>(p, t)[w.image * p.groups + group];
    s1[v] = sums.a / m * affine.rstd[v];
    s2[v] = sums.b / m * affine.rstd[v] * affine.rstd[v];
  }
#pragma unroll 2
  for (int i = 0; i < w.count; ++i) {
    const int64_t at = w.first + i * w.stride;
    Values<T, V> values;
    Packed<T, V> raw;
    values.load(p, affine, at, raw);
    write_dx(values, affine, s1, s2, p, at);
  }
}

// ---- small maps: partial sums, the residual's gradient and dx in one kernel ---------------------

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) input_gradient_fused(GroupNorm p, Tiles t) {
  using A = Acc<T>;
  extern __shared__ uint4 kept_words[];
  auto* kept_x = reinterpret_cast<Packed<T, V>*>(kept_words);
  auto* kept_g = kept_x + t.kept * kThreads;
  __shared__ A shared[Shared<A, V>::kSize];
  const int thread = threadIdx.x;
  const Walk w = walk<V, true>(p, t, blockIdx.x);
  Affine<A, V> affine;
  if (w.count > 0) affine.template load<true>(p, w);
  A a[V] = {}, b[V] = {};
#pragma unroll 2
  for (int i = 0; i < w.count; ++i) {
    const int64_t at = w.first + i * w.stride;
    Values<T, V> values;
    Packed<T, V> raw;
    values.load(p, affine, at, raw);
    const Packed<T, V> masked = write_dresidual(values, p, at);
    if (i < t.kept) {
      kept_x[i * kThreads + thread] = raw;
      kept_g[i * kThreads + thread] = masked;
    }
    add_to_sums(values, affine, a, b);
  }
  write_partial<Sums, V, true>(a, b, w, p, t, shared);

  // Channels' weighted sums of the tile, which each warp replaces by those of its groups.
  A *first = shared, *second = shared + kThreads * V;
  if (w.row == 0 && w.channel < p.channels) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A weight = static_cast<const A*>(p.weight)[w.channel + v];
      first[w.lane * V + v] = weight * a[v];
      second[w.lane * V + v] = weight * b[v];
    }
  }
  __syncthreads();
  const int per_group = p.channels / p.groups;
  const int groups = min(t.lanes * V, p.channels - (w.channel - w.lane * V)) / per_group;
  for (int group = thread / 32; group < groups; group += kWarps) {
    const int from = group * per_group;
    A s1 = 0, s2 = 0;
    for (int c = thread % 32; c < per_group; c += 32) {
      s1 += first[from + c];
      s2 += second[from + c];
    }
    s1 = warp_sum(s1);
    s2 = warp_sum(s2);
    for (int c = thread % 32; c < per_group; c += 32) {
      first[from + c] = s1;
      second[from + c] = s2;
    }
  }
  __syncthreads();
  if (w.count == 0) return;
  const A m = values_of_group<A>(p);
  A s1[V], s2[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    s1[v] = first[w.lane * V + v] / m * affine.rstd[v];
    s2[v] = second[w.lane * V + v] / m * affine.rstd[v] * affine.rstd[v];
  }
#pragma unroll 2
  for (int i = 0; i < w.count; ++i) {
    const int64_t at = w.first + i * w.stride;
    Values<T, V> values;
    if (i < t.kept) {
      kept_x[i * kThreads + thread].expand(values.x);
      kept_g[i * kThreads + thread].expand(values.g);
    } else {
      Packed<T, V> raw;
      values.load(p, affine, at, raw);
    }
    write_dx(values, affine, s1, s2, p, at);
  }
}

// ---- the parameters' gradients ------------------------------------------------------------------

constexpr int kColumns = 8, kRows = 64;

// A block kColumns channels: the sums over all images and chunks.
template <typename A>
__global__ void __launch_bounds__(kColumns* kRows) parameter_gradients(GroupNorm p, int64_t parts) {
  __shared__ Pair<A> shared[kRows][kColumns];
  const int column = threadIdx.x % kColumns, row = threadIdx.x / kColumns;
  const int channel = static_cast<int>(blockIdx.x) * kColumns + column;
  const bool exists = channel < p.channels;
  const auto* partial = static_cast<const Pair<A>*>(p.scratch) + channel;
  Pair<A> sum{};
  if (exists) {
#pragma unroll 4
    for (int64_t k = row; k < parts; k += kRows) {
      const Pair<A> part = partial[k * p.channels];
      sum.a += part.a;
      sum.b += part.b;
    }
  }
  shared[row][column] = sum;
  for (int half = kRows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row < half) {
      shared[row][column].a += shared[row + half][column].a;
      shared[row][column].b += shared[row + half][column].b;
    }
  }
  if (row != 0 || !exists) return;
  static_cast<A*>(p.dbias)[channel] = shared[0][column].a;
  static_cast<A*>(p.dweight)[channel] = shared[0][column].b;
}

// ---- launching ----------------------------------------------------------------------------------

template <typename T, int V, bool kChannelsLast>
void launch_split(const GroupNorm& p, const Tiles& t, cudaStream_t stream) {
  const unsigned blocks = blocks_of(p, t), groups = static_cast<unsigned>(p.images * p.groups);
  const unsigned threads = threads_for(int64_t{t.chunks} * (p.channels / p.groups));
  partial_sums<T, V, kChannelsLast><<<blocks, kThreads, 0, stream>>>(p, t);
  join_sums<Acc<T>><<<groups, threads, 0, stream>>>(p, t);
  GroupNorm masked = p;
  if (p.dresidual != nullptr) {
    masked.grad = p.dresidual;
    masked.out = nullptr;
    masked.relu = false;
  }
  input_gradient<T, V, kChannelsLast><<<blocks, kThreads, 0, stream>>>(masked, t);
}

}  // namespace

void group_norm_backward(const GroupNorm& p, cudaStream_t stream) {
  with_values(p, [&](auto value, auto per_vector) {
    using T = decltype(value);
    constexpr int V = per_vector;
    Tiles t = tiles_of(p, V, sizeof(T));
    if (is_fused(p, V, sizeof(T))) {
      const auto kernel = input_gradient_fused<T, V>;
      const size_t bytes = keep_vectors(t, kernel, 2 * sizeof(Packed<T, V>));
      kernel<<<blocks_of(p, t), kThreads, bytes, stream>>>(p, t);
    } else if (p.channels_last) {
      launch_split<T, V, true>(p, t, stream);
    } else {
      launch_split<T, V, false>(p, t, stream);
    }
    const unsigned columns = static_cast<unsigned>(divide_up(p.channels, kColumns));
    const int64_t parts = p.images * t.chunks;
    parameter_gradients<Acc<T>><<<columns, kColumns * kRows, 0, stream>>>(p, parts);
  });
}

}  // namespace detectron::kernels
