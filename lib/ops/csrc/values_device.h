// Values of the four floating types in device code: what they are summed in, and 16 bytes of them at once.
// Included by .cu files only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <type_traits>

#include "dtype.h"

namespace detectron::kernels {

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
  __device__ __forceinline__ void pack(const Acc<T> (&from)[V]) {
    words = make_uint4(
        pack_word(from, 0), pack_word(from, 1), pack_word(from, 2), pack_word(from, 3));
  }
  __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<uint4*>(to) = words; }

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
  static __device__ __forceinline__ unsigned pack_word(const float (&from)[4], int i) {
    return __float_as_uint(from[i]);
  }
  static __device__ __forceinline__ unsigned pack_word(const double (&from)[2], int i) {
    return static_cast<unsigned>(
        i % 2 ? __double2hiint(from[i / 2]) : __double2loint(from[i / 2]));
  }
  static __device__ __forceinline__ unsigned pack_word(const float (&from)[8], int i) {
    if constexpr (std::is_same_v<T, __half>) {
      const __half2 pair = __floats2half2_rn(from[2 * i], from[2 * i + 1]);
      return *reinterpret_cast<const unsigned*>(&pair);
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
      return *reinterpret_cast<const unsigned*>(&pair);
    }
  }
};

template <typename T>
struct Packed<T, 1> {
  T value;
  __device__ __forceinline__ void load(const T* from) { value = *from; }
  __device__ __forceinline__ void expand(Acc<T> (&to)[1]) const { to[0] = to_acc(value); }
  __device__ __forceinline__ void pack(const Acc<T> (&from)[1]) { value = from_acc<T>(from[0]); }
  __device__ __forceinline__ void store(T* to) const { *to = value; }
};

// Calls f(T()) with the type's name in device code.
template <typename F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(float());
    case DType::f64: return f(double());
    case DType::f16: return f(__half());
    case DType::bf16: return f(__nv_bfloat16());
  }
}

inline bool aligned_to(const void* pointer, size_t bytes) {
  return reinterpret_cast<size_t>(pointer) % bytes == 0;
}

}  // namespace detectron::kernels
