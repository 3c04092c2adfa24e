// What the CUDA kernel of sigmoid_focal_loss reads and writes, and its launcher: plain pointers and a
// stream, no torch. All pointers are device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace detectron::kernels {

struct FocalLoss {
  DType dtype;
  const void* logits;     // (outer, classes, inner): NCHW is (N * A, C, H * W), channels last (.., C, 1)
  const int64_t* labels;  // (outer, inner): the class counted from 1, 0 none, -1 does not count
  void* grad;             // like the logits, float for f16; null if it is not wanted
  double* sums;           // (blocks,), each is written
  int64_t count;          // of logits, not 0
  int64_t classes, inner;
  double alpha, gamma;
  int blocks;
};

void sigmoid_focal_loss(const FocalLoss& p, cudaStream_t stream);

}  // namespace detectron::kernels
