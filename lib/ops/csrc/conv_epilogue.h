// What stands between a convolution and the next layer: kernels on maps (N, C, H, W), as plain pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace detectron::kernels {

struct EpilogueMaps {
  DType dtype;
  bool channels_last;
  int64_t images, channels, height, width;
  int multiprocessors;
};

// out = act(in + bias + residual), in float (double for f64), rounded once. `out` may be `in`.
struct BiasAct : EpilogueMaps {
  const void* in;
  const void* bias;      // (channels,) or null
  bool bias_wide;        // the bias is float (double for f64) rather than of `dtype`
  const void* residual;  // like in, or with `upsample` of half the height and width; or null
  bool upsample;
  bool relu;
  void* out;
};

void bias_act(const BiasAct& p, cudaStream_t stream);

// masked = grad where y > 0 or NaN, else 0; sum = sums of masked over N, H and W, in a fixed order.
struct ReluBackward : EpilogueMaps {
  const void* grad;
  const void* y;   // null: nothing is masked, and masked is not written
  void* masked;
  void* sum;       // (channels,) float (double for f64), or null
  void* partials;  // (channel_sum_parts(), channels) like sum: scratch
};

int64_t channel_sum_parts(const EpilogueMaps& p);
void relu_backward(const ReluBackward& p, cudaStream_t stream);

// Sums of 2x2 pixels; the maps' height and width are those of `in`, both even.
struct Sum2x2 : EpilogueMaps {
  const void* in;
  void* out;
};

void sum_2x2(const Sum2x2& p, cudaStream_t stream);

}  // namespace detectron::kernels
