// Launchers of the CUDA kernels of anchor_windows; as in kernels.h, plain device pointers and a stream.
#pragma once

#include <cuda_runtime_api.h>

#include "anchor_windows.h"

namespace detectron::kernels {

void anchor_windows_forward(const AnchorWindows& p, cudaStream_t stream);
void anchor_windows_backward(const AnchorWindows& p, cudaStream_t stream);

}  // namespace detectron::kernels
