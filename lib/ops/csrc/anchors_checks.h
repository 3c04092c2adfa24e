// Argument checks of the operators on anchors, shared by the CPU and the CUDA entry points.
#pragma once

#include <limits>

#include "anchors.h"
#include "checks.h"

namespace detectron {

constexpr int64_t kMaxAnchors = std::numeric_limits<int32_t>::max() - 4096;  // counted in int
constexpr int64_t kMaxAnchorImages = 65535;                                   // of a CUDA grid

inline InsideRule check_match_anchors(
    const Tensor& anchors, const Tensor& gt_boxes, const Tensor& gt_valid,
    const std::optional<Tensor>& im_info, double straddle_thresh) {
  TORCH_CHECK_VALUE(
      gt_boxes.dim() == 3 && gt_boxes.size(2) == 4,
      "match_anchors: gt_boxes must be (N, G, 4), not ", gt_boxes.sizes());
  const int64_t images = gt_boxes.size(0);
  TORCH_CHECK_VALUE(
      (anchors.dim() == 2 || (anchors.dim() == 3 && anchors.size(0) == images)) &&
          anchors.size(-1) == 4,
      "match_anchors: anchors must be (A, 4), or (N, A, 4) with N = ", images, ", not ",
      anchors.sizes());
  TORCH_CHECK_VALUE(
      gt_valid.dim() == 2 && gt_valid.size(0) == images && gt_valid.size(1) == gt_boxes.size(1),
      "match_anchors: gt_valid must be (N, G) like gt_boxes ", gt_boxes.sizes(), ", not ",
      gt_valid.sizes());
  check_device(gt_boxes, "match_anchors: gt_boxes", anchors, "anchors");
  check_device(gt_valid, "match_anchors: gt_valid", anchors, "anchors");
  check_floating(anchors, "match_anchors: anchors");
  check_floating(gt_boxes, "match_anchors: gt_boxes");
  check_dtype(gt_valid, "match_anchors: gt_valid", at::kBool);
  if (im_info) {
    TORCH_CHECK_VALUE(
        im_info->dim() == 2 && im_info->size(0) == images && im_info->size(1) == 3,
        "match_anchors: im_info must be (N, 3) with N = ", images, ", not ", im_info->sizes());
    check_device(*im_info, "match_anchors: im_info", anchors, "anchors");
    check_floating(*im_info, "match_anchors: im_info");
  }
  TORCH_CHECK_VALUE(
      anchors.size(-2) <= kMaxAnchors && gt_boxes.size(1) <= kMaxAnchors &&
          images <= kMaxAnchorImages,
      "match_anchors: too many at once: anchors ", anchors.sizes(), ", gt_boxes ",
      gt_boxes.sizes());
  return {!im_info || !(straddle_thresh >= 0), static_cast<float>(straddle_thresh)};
}

constexpr int64_t kMaxDraws = 2048;  // their slots lie in a block's memory

// How many anchors are drawn in an image.
inline int64_t check_sample_anchors(
    const Tensor& foreground, const Tensor& background, const Tensor& random,
    int64_t max_foreground) {
  TORCH_CHECK_VALUE(
      foreground.dim() == 2 && foreground.size(1) >= 1,
      "sample_anchors: foreground must be (N, A) with A > 0, not ", foreground.sizes());
  TORCH_CHECK_VALUE(
      background.sizes() == foreground.sizes(),
      "sample_anchors: background must be (N, A) like foreground ", foreground.sizes(), ", not ",
      background.sizes());
  check_device(background, "sample_anchors: background", foreground, "foreground");
  check_device(random, "sample_anchors: random", foreground, "foreground");
  check_dtype(foreground, "sample_anchors: foreground", at::kBool);
  check_dtype(background, "sample_anchors: background", at::kBool);
  check_dtype(random, "sample_anchors: random", at::kFloat);
  const int64_t draws = random.dim() == 2 ? random.size(1) - max_foreground : -1;
  TORCH_CHECK_VALUE(
      max_foreground >= 0 && draws >= max_foreground && draws <= kMaxDraws &&
          random.size(0) == foreground.size(0),
      "sample_anchors: random must be (N, max_foreground + draws) with N = ", foreground.size(0),
      " and max_foreground = ", max_foreground, " <= draws <= ", kMaxDraws, ", not ",
      random.sizes());
  TORCH_CHECK_VALUE(
      foreground.size(1) <= kMaxAnchors && foreground.size(0) <= kMaxAnchorImages,
      "sample_anchors: too many at once: ", foreground.sizes());
  return draws;
}

}  // namespace detectron
