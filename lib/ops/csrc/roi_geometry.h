// Where an RoI's samples lie on a feature map: the arithmetic shared by the CPU and CUDA kernels.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace detectron {

template <typename T>
HOST_DEVICE bool is_finite(T v) {
  return v - v == T(0);
}

// Cap of the adaptive grid per bin and axis: far beyond any feature map, and safe to cast to int.
constexpr int kMaxGrid = 1 << 20;

template <typename T>
struct RoiGeometry {
  bool valid;  // false: padding row, batch index out of range, or coordinates not finite
  int64_t image;
  T start_h, start_w;  // feature pixels
  T bin_h, bin_w;
  int grid_h, grid_w;  // samples per bin
  T step_h, step_w;
  T weight;  // of one sample in the mean
};

template <typename T>
HOST_DEVICE int grid_size(int sampling_ratio, T bin) {
  if (sampling_ratio > 0) return sampling_ratio;
  const T grid = std::ceil(bin);
  return grid >= T(kMaxGrid) ? kMaxGrid : (grid > T(0) ? static_cast<int>(grid) : 0);
}

template <typename T>
HOST_DEVICE RoiGeometry<T> roi_geometry(
    const T* roi, T scale, int64_t images, int pooled_h, int pooled_w, int sampling_ratio,
    bool aligned) {
  RoiGeometry<T> g{};
  const T offset = aligned ? T(0.5) : T(0);
  g.start_w = roi[1] * scale - offset;
  g.start_h = roi[2] * scale - offset;
  T width = roi[3] * scale - offset - g.start_w;
  T height = roi[4] * scale - offset - g.start_h;
  g.valid = roi[0] >= T(0) && roi[0] < static_cast<T>(images) && is_finite(g.start_w) &&
      is_finite(g.start_h) && is_finite(width) && is_finite(height);
  if (!g.valid) return g;
  g.image = static_cast<int64_t>(roi[0]);
  if (!aligned) {  // Detectron: malformed RoIs are at least one feature pixel
    width = width > T(1) ? width : T(1);
    height = height > T(1) ? height : T(1);
  }
  g.bin_h = height / static_cast<T>(pooled_h);
  g.bin_w = width / static_cast<T>(pooled_w);
  g.grid_h = grid_size(sampling_ratio, g.bin_h);
  g.grid_w = grid_size(sampling_ratio, g.bin_w);
  g.step_h = g.grid_h > 0 ? g.bin_h / static_cast<T>(g.grid_h) : T(0);
  g.step_w = g.grid_w > 0 ? g.bin_w / static_cast<T>(g.grid_w) : T(0);
  const T count = static_cast<T>(g.grid_h) * static_cast<T>(g.grid_w);
  g.weight = count > T(1) ? T(1) / count : T(1);
  return g;
}

// One sample on one axis: it reads `low` and `high` with these weights. `inside` is false beyond one
// pixel outside the map, where a sample counts as zero.
template <typename T>
struct AxisSample {
  bool inside;
  int low, high;
  T weight_low, weight_high;
};

template <typename T>
HOST_DEVICE AxisSample<T> axis_sample(T coordinate, int size) {
  AxisSample<T> s;
  s.inside = coordinate >= T(-1) && coordinate <= static_cast<T>(size);
  if (!s.inside || size == 0) {
    s.inside = false;
    s.low = s.high = 0;
    s.weight_low = s.weight_high = T(0);
    return s;
  }
  const T c = coordinate > T(0) ? coordinate : T(0);
  s.low = static_cast<int>(c);
  if (s.low >= size - 1) {
    s.low = s.high = size - 1;
    s.weight_high = T(0);
  } else {
    s.high = s.low + 1;
    s.weight_high = c - static_cast<T>(s.low);
  }
  s.weight_low = T(1) - s.weight_high;
  return s;
}

// Indices [first, last) of the samples start + (i + 0.5) * step, i < grid, that may lie in [lo, hi]:
// generous by a sample at either end. Keeps the adaptive grid of a huge RoI from being walked in full.
template <typename T>
HOST_DEVICE void sample_range(T start, T step, int grid, T lo, T hi, int* first, int* last) {
  *first = 0;
  *last = grid;
  if (grid <= 8 || !(step > T(0))) return;
  const T from = std::floor((lo - start) / step) - T(2);
  const T to = std::ceil((hi - start) / step) + T(2);
  if (from > T(0)) *first = from < static_cast<T>(grid) ? static_cast<int>(from) : grid;
  if (to < static_cast<T>(grid)) *last = to > T(0) ? static_cast<int>(to) : 0;
}

}  // namespace detectron
