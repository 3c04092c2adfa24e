// What the CUDA kernels of group_norm read and write, and their launchers: plain pointers and a stream, no
// torch. All pointers are device pointers; "Acc" is float, or double where dtype is f64.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace detectron::kernels {

struct GroupNorm {
  DType dtype;
  bool channels_last;  // the layout of all maps
  bool relu;
  int64_t images;
  int channels, groups, pixels;  // none of them 0
  double eps;
  int multiprocessors;

  const void *x, *residual;     // maps (images, channels, pixels); residual may be null
  const void *weight, *bias;    // (channels,) Acc
  void* y;                      // a map: the result
  void *mean, *rstd;            // (images, groups) Acc; read by backward

  const void* grad;             // a map: the result's gradient
  const void* out;              // the result, where its sign is needed: relu after a residual; else null
  void* dx;                     // a map
  void* dresidual;              // a map, where out is given
  void *dweight, *dbias;        // (channels,) Acc

  void* scratch;  // group_norm_scratch() Acc, 16-byte aligned
};

// To be asked once all maps that will be used are in place.
int64_t group_norm_scratch(const GroupNorm& p);

// Both write every element of their results, in a fixed order: they repeat bit for bit.
void group_norm_forward(const GroupNorm& p, cudaStream_t stream);
void group_norm_backward(const GroupNorm& p, cudaStream_t stream);

}  // namespace detectron::kernels
