// Launchers of the CUDA kernels on anchors; as in kernels.h, plain device pointers and a stream.
#pragma once

#include <cuda_runtime_api.h>

#include "anchors.h"

namespace detectron::kernels {

struct MatchAnchors {
  const float* anchors;   // 16-byte aligned
  int64_t image_stride;   // anchors from one image's to the next's; 0 if all have the same
  const float* gt_boxes;  // (images, slots, 4), 16-byte aligned
  const bool* gt_valid;   // (images, slots)
  const float* im_info;   // (images, 3) or null where the rule lets any anchor in
  int images, slots;
  int64_t count;  // anchors of an image
  InsideRule rule;
  float positive;
  unsigned* best;  // (images, slots), zero filled: bits of each ground truth's best IoU
  // (images, count); every element is written
  bool *inside, *foreground;
  float* max_overlap;
  int64_t* gt_index;
};

void match_anchors(const MatchAnchors& p, cudaStream_t stream);

struct SampleAnchors {
  const bool *foreground, *background;  // (images, count)
  const float* random;                  // (images, max_foreground + draws)
  int images, max_foreground, draws;
  int64_t count;
  unsigned *foreground_bits, *background_bits;  // (images, ceil(count / 32)): scratch
  // (images, draws); every element is written
  int64_t* index;
  int8_t* labels;
};

void sample_anchors(const SampleAnchors& p, cudaStream_t stream);

}  // namespace detectron::kernels
