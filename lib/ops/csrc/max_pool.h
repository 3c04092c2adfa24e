// What the CUDA kernel of max_pool reads and writes, and its launcher: plain pointers and a stream, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace detectron::kernels {

struct MaxPool {
  DType dtype;
  bool channels_last;
  const void* in;  // (images, channels, height, width) in the given layout, not empty
  void* out;       // (images, channels, out_height, out_width), every element is written
  int64_t images, channels;
  int height, width, out_height, out_width;
};

void max_pool(const MaxPool& p, cudaStream_t stream);

}  // namespace detectron::kernels
