// How the group_norm kernels share out the maps, and the sums that they take. Included by .cu files only.
//
// A map is cut into tiles of channels and chunks of pixels; a block works on one tile of one chunk of one
// image, each of its threads on vectors of V values: V channels of a pixel where the layout is channels last,
// else V pixels of a channel. Sums go from threads to blocks to groups, always in the same order.
#pragma once

#include "group_norm.h"
#include "values_device.h"

namespace detectron::kernels {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct Tiles {
  int lanes;   // channels last: threads side by side along a tile's channels
  int rows;    // threads side by side along a chunk's pixels
  int tiles;   // of an image
  int steps;   // pixels of an image, counted in vectors where they run along the pixels
  int chunk;   // steps of a chunk; the last one may be shorter
  int chunks;  // of an image
  int kept;    // vectors that a thread of a fused kernel keeps in shared memory
};

template <typename A>
struct alignas(2 * sizeof(A)) Pair {
  A a, b;
};

// Whether all maps can be read and written 16 bytes at a time.
inline bool vectors_fit(const GroupNorm& p, int per_vector) {
  bool fit = (p.channels_last ? p.channels : p.pixels) % per_vector == 0;
  for (const void* map : {p.x, p.residual, static_cast<const void*>(p.y), p.grad, p.out,
                          static_cast<const void*>(p.dx), static_cast<const void*>(p.dresidual)}) {
    fit = fit && aligned_to(map, 16);
  }
  return fit;
}

inline int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

inline int common_multiple(int a, int b) {
  int x = a, y = b;
  while (y != 0) {
    const int rest = x % y;
    x = y;
    y = rest;
  }
  return a / x * b;
}

// Fused: a block holds whole groups of a whole image, so that one kernel does a pass's work and what it reads
// a second time is still near. For small maps; tiles.lanes is 0 where it does not suit.
inline Tiles fused_tiles(const GroupNorm& p, int per_vector, int value_bytes) {
  constexpr int kTileBytes = 128;            // of a pixel: a whole line of memory
  constexpr int64_t kBlockBytes = 128 << 10;  // of a map
  Tiles t{};
  if (!p.channels_last) return t;
  const int least = common_multiple(p.channels / p.groups, per_vector);
  int64_t tile = static_cast<int64_t>(least) * divide_up(kTileBytes / value_bytes, least);
  if (tile > p.channels) tile = p.channels;
  if (tile > kThreads * per_vector || tile * p.pixels * value_bytes > kBlockBytes) return t;
  t.lanes = static_cast<int>(tile) / per_vector;
  t.rows = kThreads / t.lanes;
  t.tiles = divide_up(p.channels, tile);
  t.steps = t.chunk = p.pixels;
  t.chunks = 1;
  return t;
}

// Otherwise: enough chunks to fill the GPU, none so small that its last sums cost more than the rest.
inline Tiles split_tiles(const GroupNorm& p, int per_vector) {
  constexpr int kBlocksPerMultiprocessor = 16, kLeastPerThread = 16;
  Tiles t{};
  if (p.channels_last) {
    const int vectors = p.channels / per_vector;
    t.lanes = vectors < 32 ? vectors : 32;
    t.rows = kThreads / t.lanes;
    t.tiles = divide_up(vectors, t.lanes);
    t.steps = p.pixels;
  } else {
    t.lanes = kWarps;
    t.rows = 32;
    t.tiles = divide_up(p.channels, kWarps);
    t.steps = p.pixels / per_vector;
  }
  const int64_t blocks = static_cast<int64_t>(kBlocksPerMultiprocessor) * p.multiprocessors;
  const int64_t even = (p.images * t.tiles * t.steps + blocks - 1) / blocks;
  const int64_t least = static_cast<int64_t>(kLeastPerThread) * t.rows;
  const int64_t chunk = even > least ? even : least;
  t.chunk = chunk < t.steps ? static_cast<int>(chunk) : t.steps;
  t.chunks = divide_up(t.steps, t.chunk);
  return t;
}

inline Tiles tiles_of(const GroupNorm& p, int per_vector, int value_bytes) {
  const Tiles fused = fused_tiles(p, per_vector, value_bytes);
  return fused.lanes > 0 ? fused : split_tiles(p, per_vector);
}

// Only a fused kernel's tiles hold all that a group's sums are made of.
inline bool is_fused(const GroupNorm& p, int per_vector, int value_bytes) {
  return fused_tiles(p, per_vector, value_bytes).lanes > 0;
}

inline unsigned blocks_of(const GroupNorm& p, const Tiles& t) {
  return static_cast<unsigned>(p.images * t.chunks * t.tiles);
}

// Lets a fused kernel's threads keep as many of their vectors (`bytes` each) as leave room for three blocks on
// a multiprocessor, or none where the GPU has not that much shared memory. Returns what a block takes of it.
template <typename Kernel>
size_t keep_vectors(Tiles& t, Kernel kernel, size_t bytes) {
  constexpr int kKeptBytes = 56 << 10;
  const int fit = kKeptBytes / static_cast<int>(bytes * kThreads), needed = divide_up(t.steps, t.rows);
  t.kept = fit < needed ? fit : needed;
  const size_t taken = t.kept * bytes * kThreads;
  // Always the same bound: what a recorded graph holds must not exceed one that was set later.
  const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (cudaFuncSetAttribute(kernel, most, kKeptBytes) == cudaSuccess) return taken;
  cudaGetLastError();  // so that the launch does not report it
  t.kept = 0;
  return 0;
}

// Calls f(T(), integral_constant<V>) with the type of the maps and how many values are read at once.
template <typename F>
void with_values(const GroupNorm& p, F f) {
  const auto vectors = [&](auto value) {
    constexpr int kVector = 16 / sizeof(value);
    if (vectors_fit(p, kVector)) return f(value, std::integral_constant<int, kVector>());
    return f(value, std::integral_constant<int, 1>());
  };
  switch (p.dtype) {
    case DType::f32: return vectors(float());
    case DType::f64: return vectors(double());
    case DType::f16: return vectors(__half());
    case DType::bf16: return vectors(__nv_bfloat16());
  }
}

// ---- a thread's part ----------------------------------------------------------------------------

struct Walk {
  int64_t first, stride;  // of the thread's vectors in the map
  int count;              // of its vectors
  int channel;            // of its first value
  int lane, row;          // its place in the block
  int64_t image;
  int chunk;
};

template <int V, bool kChannelsLast>
__device__ __forceinline__ Walk walk(const GroupNorm& p, const Tiles& t, unsigned block) {
  Walk w;
  const unsigned tile = block % t.tiles;
  block /= t.tiles;
  w.chunk = static_cast<int>(block % t.chunks);
  w.image = block / t.chunks;
  const int begin = w.chunk * t.chunk;
  const int length = min(t.chunk, t.steps - begin);
  const int thread = threadIdx.x;
  w.lane = kChannelsLast ? thread % t.lanes : thread / 32;
  w.row = kChannelsLast ? thread / t.lanes : thread % 32;
  w.channel = static_cast<int>(tile * t.lanes + w.lane) * (kChannelsLast ? V : 1);
  const bool works = w.row < t.rows && w.channel < p.channels && w.row < length;
  w.count = works ? (length - w.row + t.rows - 1) / t.rows : 0;
  if (kChannelsLast) {
    w.first = (w.image * p.pixels + begin + w.row) * p.channels + w.channel;
    w.stride = static_cast<int64_t>(t.rows) * p.channels;
  } else {
    w.first = (w.image * p.channels + w.channel) * p.pixels + int64_t{begin + w.row} * V;
    w.stride = static_cast<int64_t>(t.rows) * V;
  }
  return w;
}

// The numbers by which a thread's values are normalised: fma(x - mean, scale, bias), scale = weight * rstd.
template <typename A, int V>
struct Affine {
  A mean[V], rstd[V], scale[V], bias[V];

  template <bool kChannelsLast>
  __device__ __forceinline__ void load_affine(const GroupNorm& p, const Walk& w) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int c = w.channel + (kChannelsLast ? v : 0);
      scale[v] = static_cast<const A*>(p.weight)[c] * rstd[v];
      bias[v] = static_cast<const A*>(p.bias)[c];
    }
  }
  // For a thread with work (its channels exist), from the moments in p.
  template <bool kChannelsLast>
  __device__ __forceinline__ void load(const GroupNorm& p, const Walk& w) {
    const int per_group = p.channels / p.groups;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int group = (w.channel + (kChannelsLast ? v : 0)) / per_group;
      mean[v] = static_cast<const A*>(p.mean)[w.image * p.groups + group];
      rstd[v] = static_cast<const A*>(p.rstd)[w.image * p.groups + group];
    }
    load_affine<kChannelsLast>(p, w);
  }
  __device__ __forceinline__ A apply(A x, int v) const { return fma(x - mean[v], scale[v], bias[v]); }
};

// ---- sums ---------------------------------------------------------------------------------------

// Two numbers of n values, and how those of n2 more join them.
struct Moments {  // a: mean, b: sum of squared distances from it
  template <typename A>
  static __device__ __forceinline__ void join(A& a, A& b, A n, A a2, A b2, A n2) {
    if (n2 == A(0)) return;
    const A part = n2 / (n + n2), distance = a2 - a;
    a = fma(distance, part, a);
    b += fma(distance * distance * n, part, b2);
  }
};
struct Sums {
  template <typename A>
  static __device__ __forceinline__ void join(A& a, A& b, A, A a2, A b2, A) {
    a += a2;
    b += b2;
  }
};

template <typename A, int V>
struct Shared {
  static constexpr int kSize = (2 * V + 1) * kThreads;
};

// The sums of a block's rows, in the threads of row 0; n: how many values are in each of a thread's sums.
template <typename Rule, typename A, int V>
__device__ __forceinline__ void join_rows(
    A (&a)[V], A (&b)[V], A n, const Walk& w, const Tiles& t, A* shared) {
  const int thread = threadIdx.x;
  int half = t.rows > 1 ? 1 << (31 - __clz(t.rows - 1)) : 0;
  for (; half > 0; half >>= 1) {
    if (w.row >= half && w.row < 2 * half) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        shared[(2 * v) * kThreads + thread] = a[v];
        shared[(2 * v + 1) * kThreads + thread] = b[v];
      }
      shared[2 * V * kThreads + thread] = n;
    }
    __syncthreads();
    if (w.row < half && w.row + half < t.rows) {
      const int other = thread + half * t.lanes;
      const A n2 = shared[2 * V * kThreads + other];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A a2 = shared[(2 * v) * kThreads + other], b2 = shared[(2 * v + 1) * kThreads + other];
        Rule::join(a[v], b[v], n, a2, b2, n2);
      }
      n += n2;
    }
    __syncthreads();
  }
}

// The sums of a warp's vectors, in a[0] and b[0] of its lane 0.
template <typename Rule, typename A, int V>
__device__ __forceinline__ void join_warp(A (&a)[V], A (&b)[V], A n) {
#pragma unroll
  for (int v = 1; v < V; ++v) Rule::join(a[0], b[0], n * A(v), a[v], b[v], n);
  n *= A(V);
  for (int offset = 16; offset > 0; offset >>= 1) {
    const A a2 = __shfl_down_sync(~0u, a[0], offset), b2 = __shfl_down_sync(~0u, b[0], offset);
    const A n2 = __shfl_down_sync(~0u, n, offset);
    Rule::join(a[0], b[0], n, a2, b2, n2);
    n += n2;
  }
}

// A block's sums into p.scratch, (images, chunks, channels) pairs. All threads of a block call it.
template <typename Rule, int V, bool kChannelsLast, typename A>
__device__ __forceinline__ void write_partial(
    A (&a)[V], A (&b)[V], const Walk& w, const GroupNorm& p, const Tiles& t, A* shared) {
  const A n = static_cast<A>(w.count);
  auto* to = static_cast<Pair<A>*>(p.scratch) + (w.image * t.chunks + w.chunk) * p.channels;
  if constexpr (kChannelsLast) {
    join_rows<Rule>(a, b, n, w, t, shared);
  } else {
    join_warp<Rule>(a, b, n);
  }
  if (w.row != 0 || w.channel >= p.channels) return;
#pragma unroll
  for (int v = 0; v < (kChannelsLast ? V : 1); ++v) to[w.channel + v] = {a[v], b[v]};
}

template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// To all threads of a block of whole warps, at most kWarps.
template <typename A>
__device__ __forceinline__ A block_sum(A value) {
  __shared__ A parts[kWarps];
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  A total = parts[0];
  for (int k = 1; k < blockDim.x / 32; ++k) total += parts[k];
  __syncthreads();
  return total;
}

// Threads for a block that adds up a group's partial sums.
inline unsigned threads_for(int64_t entries) { return entries <= 64 ? 32 : kThreads; }

}  // namespace detectron::kernels
