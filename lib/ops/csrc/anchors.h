// What matching boxes to ground truth and drawing anchors share between CPU and CUDA: the arithmetic, so
// that both give the same results. IoU is box_iou() of detections.h.
#pragma once

#include "detections.h"

namespace detectron {

// Which boxes lie inside an image.
struct InsideRule {
  bool any;      // all do
  float margin;  // pixels a box may reach outside

  HOST_DEVICE bool holds(const float* box, float height, float width) const {
    return any || (box[0] >= -margin && box[1] >= -margin && box[2] < width + margin &&
                   box[3] < height + margin);
  }
};

// False only if `b` has IoU 0 with every box that lies inside `a`: rounding keeps the order of sums.
HOST_DEVICE bool may_overlap(const float* a, const float* b) {
  return smaller(a[2], b[2]) - larger(a[0], b[0]) + 1.f > 0.f &&
         smaller(a[3], b[3]) - larger(a[1], b[1]) + 1.f > 0.f;
}

// Uniform in [0, count), count > 0, of a number in [0, 1).
HOST_DEVICE int draw_below(float uniform, int count) {
  const int drawn = static_cast<int>(uniform * static_cast<float>(count));
  return drawn < 0 ? 0 : drawn < count ? drawn : count - 1;
}

}  // namespace detectron
