// What the RoI operators read and write, as plain pointers: shared by the CPU and CUDA code.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace detectron {

struct RoiMaps {
  static constexpr int kMaxLevels = 8;
  DType dtype;
  bool channels_last;
  void* maps[kMaxLevels];  // (images, channels, height, width) in the given layout; written by backward
  int heights[kMaxLevels], widths[kMaxLevels];
  double scales[kMaxLevels];
  int levels;
  int64_t images, channels, rois;
  int pooled_h, pooled_w;
  const void* boxes;          // (rois, 5), float, or double where dtype is f64
  const int64_t* roi_levels;  // (rois,) or null: all on level 0
  void* pooled;               // (rois, pooled channels, pooled_h, pooled_w); read by backward
  int multiprocessors;        // 0 on the CPU
};

struct RoiAlign : RoiMaps {
  int sampling_ratio;
  bool aligned;
};

// Of these three, backward writes maps of float (double where dtype is f64) whatever the dtype.

struct RoiPool : RoiMaps {
  int32_t* argmax;  // like pooled: y * width + x of the largest value; -1: the cell is empty
};

struct RoiCrop : RoiMaps {
  bool max_pool;
  uint8_t* choice;  // with max_pool, like pooled: which of the 2x2 samples was largest; else null
};

struct PsRoiPool : RoiMaps {};  // pooled channels are channels / (pooled_h * pooled_w)

}  // namespace detectron
