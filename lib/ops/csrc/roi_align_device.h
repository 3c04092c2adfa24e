// One RoI of RoIAlign, as its CUDA kernels see it. Included by .cu files only.
#pragma once

#include "roi_device.h"
#include "roi_geometry.h"

namespace detectron::kernels {

template <typename T>
struct Target {
  bool valid;
  T* map;  // of the RoI's image
  int height, width;
  int64_t level;
  RoiGeometry<Acc<T>> g;
};

template <typename T>
__device__ __forceinline__ Target<T> find_target(const RoiAlign& p, int64_t roi) {
  Target<T> t{};
  const int64_t level = p.roi_levels ? p.roi_levels[roi] : 0;
  if (level < 0 || level >= p.levels) return t;
  t.g = roi_geometry<Acc<T>>(
      static_cast<const Acc<T>*>(p.boxes) + 5 * roi, static_cast<Acc<T>>(p.scales[level]), p.images,
      p.pooled_h, p.pooled_w, p.sampling_ratio, p.aligned);
  t.valid = t.g.valid;
  if (!t.valid) return t;
  t.level = level;
  t.height = p.heights[level];
  t.width = p.widths[level];
  t.map = static_cast<T*>(p.maps[level]) + t.g.image * p.channels * t.height * t.width;
  return t;
}

}  // namespace detectron::kernels
