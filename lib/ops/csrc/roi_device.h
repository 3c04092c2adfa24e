// Device code and launch sizes that the RoI kernels share. Included by .cu files only.
#pragma once

#include "roi_maps.h"
#include "values_device.h"

namespace detectron::kernels {

constexpr int kThreads = 256;

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
