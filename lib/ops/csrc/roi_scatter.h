// The backward pass of roi_pool, roi_crop and ps_roi_pool, and their dispatch by type and layout. Included
// by .cu files only.
//
// A rule of spreading, Spread<T>, has
//   Rule: the axis rule of roi_cells.h;
//   pooled_channels(p), steps_h(p), steps_w(p);
//   add(p, found, roi, channel, cell, add): adds the gradient of one pooled value to its pixels, by calls
//   add(Acc<T>* address, Acc<T> value), only to addresses of its own (image, channel, cell) of the maps.
#pragma once

#include "roi_cells.h"
#include "roi_device.h"

namespace detectron::kernels {

constexpr int kOwners = 64;

template <typename T, typename Spread, typename P>
__global__ void __launch_bounds__(kThreads) scatter(P p) {
  using A = Acc<T>;
  const int64_t roi = blockIdx.x;
  const auto found =
      find_roi<typename Spread::Rule, A>(p, roi, Spread::steps_h(p), Spread::steps_w(p));
  if (!found.valid) return;
  const int cells = p.pooled_h * p.pooled_w;
  const int64_t channels = Spread::pooled_channels(p), items = channels * cells;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < items;
       i += stride) {
    const int64_t channel = p.channels_last ? i % channels : i / cells;
    const int cell = static_cast<int>(p.channels_last ? i / channels : i % cells);
    Spread::add(p, found, roi, channel, cell, [](A* address, A value) {
      atomicAdd(address, value);
    });
  }
}

// In a fixed order: a thread owns a channel of one image on one level and walks through the RoIs.
template <typename T, typename Spread, typename P>
__global__ void __launch_bounds__(kOwners) scatter_in_order(P p) {
  using A = Acc<T>;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kOwners + threadIdx.x;
  if (channel >= Spread::pooled_channels(p)) return;
  const int cells = p.pooled_h * p.pooled_w, level = static_cast<int>(blockIdx.z);
  for (int64_t image = blockIdx.y; image < p.images; image += gridDim.y) {
    for (int64_t roi = 0; roi < p.rois; ++roi) {
      const auto found =
          find_roi<typename Spread::Rule, A>(p, roi, Spread::steps_h(p), Spread::steps_w(p));
      if (!found.valid || found.level != level || found.image != image) continue;
      for (int cell = 0; cell < cells; ++cell) {
        Spread::add(p, found, roi, channel, cell, [](A* address, A value) { *address += value; });
      }
    }
  }
}

template <typename T, typename Spread, typename P>
void launch_scatter(const P& p, bool deterministic, cudaStream_t stream) {
  const int64_t channels = Spread::pooled_channels(p);
  if (p.rois == 0 || channels == 0 || p.images == 0) return;
  if (!deterministic) {
    const dim3 grid = grid_of(p, channels * p.pooled_h * p.pooled_w);
    scatter<T, Spread><<<grid, kThreads, 0, stream>>>(p);
    return;
  }
  const dim3 grid(
      static_cast<unsigned>((channels + kOwners - 1) / kOwners),
      static_cast<unsigned>(p.images < 65535 ? p.images : 65535), static_cast<unsigned>(p.levels));
  scatter_in_order<T, Spread><<<grid, kOwners, 0, stream>>>(p);
}

// Calls f(T()) with the type of the features.
template <typename F>
void with_type(const RoiMaps& p, F f) {
  switch (p.dtype) {
    case DType::f32: return f(float());
    case DType::f64: return f(double());
    case DType::f16: return f(__half());
    case DType::bf16: return f(__nv_bfloat16());
  }
}

}  // namespace detectron::kernels
