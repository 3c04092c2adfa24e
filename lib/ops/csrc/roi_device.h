// Device code and launch sizes that the RoI kernels share. Included by .cu files only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "roi_maps.h"

namespace detectron::kernels {

constexpr int kThreads = 256;

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using Acc = typename Accumulator<T>::type;

__device__ __forceinline__ float to_acc(float v) { return v; }
__device__ __forceinline__ double to_acc(double v) { return v; }
__device__ __forceinline__ float to_acc(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_acc(Acc<T> v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_acc<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_acc<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T v[V];
};

// V values of T as they are loaded: 16 bytes through the read-only path, or a single value.
template <typename T, int V>
struct Packed {
  static_assert(sizeof(T) * V == 16);
  uint4 words;
  __device__ __forceinline__ void load(const T* from) {
    words = __ldg(reinterpret_cast<const uint4*>(from));
  }
  __device__ __forceinline__ void expand(Acc<T> (&to)[V]) const {
    const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) expand_word(word[i], to, i);
  }

 private:
  static __device__ __forceinline__ void expand_word(unsigned word, float (&to)[4], int i) {
    to[i] = __uint_as_float(word);
  }
  static __device__ __forceinline__ void expand_word(unsigned word, double (&to)[2], int i) {
    const auto bits = static_cast<unsigned long long>(__double_as_longlong(to[i / 2]));
    const unsigned long long half = static_cast<unsigned long long>(word) << (i % 2 * 32);
    to[i / 2] = __longlong_as_double(static_cast<long long>(i % 2 ? bits | half : half));
  }
  static __device__ __forceinline__ void expand_word(unsigned word, float (&to)[8], int i) {
    if constexpr (std::is_same_v<T, __half>) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
      to[2 * i] = pair.x;
      to[2 * i + 1] = pair.y;
    } else {  // bfloat16 is the upper half of a float
      to[2 * i] = __uint_as_float(word << 16);
      to[2 * i + 1] = __uint_as_float(word & 0xffff0000u);
    }
  }
};

template <typename T>
struct Packed<T, 1> {
  T value;
  __device__ __forceinline__ void load(const T* from) { value = *from; }
  __device__ __forceinline__ void expand(Acc<T> (&to)[1]) const { to[0] = to_acc(value); }
};

// ---- the work of a block ------------------------------------------------------------------------

// The i-th piece of work of an RoI: V channels from `channel` on of one cell.
struct Item {
  int64_t channel;
  int bin_y, bin_x;
};

template <int V, bool kChannelsLast>
__device__ __forceinline__ Item item_at(const RoiMaps& p, int64_t i) {
  Item item;
  int bin;
  const int bins = p.pooled_h * p.pooled_w;
  if (kChannelsLast) {
    const int64_t groups = p.channels / V;
    bin = static_cast<int>(i / groups);
    item.channel = (i - bin * groups) * V;
  } else {
    item.channel = i / bins;
    bin = static_cast<int>(i - item.channel * bins);
  }
  item.bin_y = bin / p.pooled_w;
  item.bin_x = bin - item.bin_y * p.pooled_w;
  return item;
}

inline bool aligned_to(const void* pointer, size_t bytes) {
  return reinterpret_cast<size_t>(pointer) % bytes == 0;
}

inline bool vectors_fit(const RoiMaps& p, int64_t per_vector) {
  bool fit = p.channels_last && p.channels % per_vector == 0 && aligned_to(p.pooled, 16);
  for (int l = 0; l < p.levels; ++l) fit = fit && aligned_to(p.maps[l], 16);
  return fit;
}

// One block an RoI, more where that leaves the GPU idle.
inline dim3 grid_of(const RoiMaps& p, int64_t items) {
  const int64_t wanted = (4 * p.multiprocessors + p.rois - 1) / p.rois;
  const int64_t most = (items + kThreads - 1) / kThreads;
  return dim3(
      static_cast<unsigned>(p.rois),
      static_cast<unsigned>(wanted < most ? (wanted < 1 ? 1 : wanted) : most));
}

}  // namespace detectron::kernels
