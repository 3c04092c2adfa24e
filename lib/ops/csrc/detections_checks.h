// Argument checks of the operators on detections, shared by the CPU and the CUDA entry points.
#pragma once

#include "checks.h"
#include "detections.h"

namespace detectron {

inline SoftNmsRule check_soft_nms(
    const Tensor& boxes, const Tensor& scores, const Tensor& valid, double sigma,
    double overlap_thresh, double score_thresh, int64_t method) {
  TORCH_CHECK_VALUE(
      boxes.dim() == 3 && boxes.size(2) == 4, "soft_nms: boxes must be (P, K, 4), not ",
      boxes.sizes());
  for (const auto& [name, t] : {std::pair("scores", &scores), std::pair("valid", &valid)}) {
    TORCH_CHECK_VALUE(
        t->dim() == 2 && t->size(0) == boxes.size(0) && t->size(1) == boxes.size(1), "soft_nms: ",
        name, " must be (P, K) like boxes ", boxes.sizes(), ", not ", t->sizes());
  }
  check_device(scores, "soft_nms: scores", boxes, "boxes");
  check_device(valid, "soft_nms: valid", boxes, "boxes");
  check_floating(boxes, "soft_nms: boxes");
  check_floating(scores, "soft_nms: scores");
  check_dtype(valid, "soft_nms: valid", at::kBool);
  TORCH_CHECK_VALUE(method >= 0 && method <= 2, "soft_nms: method must be 0, 1 or 2, not ", method);
  TORCH_CHECK_VALUE(
      sigma > 0 || method != static_cast<int>(Decay::gaussian), "soft_nms: sigma must be > 0, not ",
      sigma);
  return {
      static_cast<Decay>(method), static_cast<float>(sigma), static_cast<float>(overlap_thresh),
      static_cast<float>(score_thresh)};
}

inline VoteRule check_box_voting(
    const Tensor& top, const Tensor& all, const Tensor& top_group, const Tensor& offsets,
    double thresh, int64_t method, double beta) {
  for (const auto& [name, t] : {std::pair("top_dets", &top), std::pair("all_dets", &all)}) {
    TORCH_CHECK_VALUE(
        t->dim() == 2 && t->size(1) == 5, "box_voting: ", name, " must be (K, 5), not ", t->sizes());
    TORCH_CHECK_TYPE(
        at::isFloatingType(t->scalar_type()), "box_voting: ", name, " must be floating point, not ",
        t->scalar_type());
  }
  TORCH_CHECK_VALUE(
      top_group.dim() == 1 && top_group.size(0) == top.size(0),
      "box_voting: top_group must be (T,) with T = ", top.size(0), ", not ", top_group.sizes());
  TORCH_CHECK_VALUE(
      offsets.dim() == 1 && offsets.size(0) >= 1, "box_voting: offsets must be (groups + 1,), not ",
      offsets.sizes());
  check_device(all, "box_voting: all_dets", top, "top_dets");
  check_device(top_group, "box_voting: top_group", top, "top_dets");
  check_device(offsets, "box_voting: offsets", top, "top_dets");
  check_dtype(top_group, "box_voting: top_group", at::kLong);
  check_dtype(offsets, "box_voting: offsets", at::kLong);
  TORCH_CHECK_VALUE(method >= 0 && method <= 5, "box_voting: method must be 0 to 5, not ", method);
  TORCH_CHECK_VALUE(beta > 0, "box_voting: beta must be > 0, not ", beta);
  return {static_cast<VoteScore>(method), static_cast<float>(thresh), beta};
}

constexpr int64_t kMaxPasteResolution = 1024;

inline void check_paste(const Tensor& masks, const Tensor& boxes, int64_t im_h, int64_t im_w) {
  TORCH_CHECK_VALUE(
      masks.dim() == 3 && masks.size(1) == masks.size(2),
      "paste_masks: masks must be (n, M, M), not ", masks.sizes());
  TORCH_CHECK_VALUE(
      masks.size(1) >= 1 && masks.size(1) <= kMaxPasteResolution,
      "paste_masks: the side of masks must be in [1, ", kMaxPasteResolution, "], not ",
      masks.size(1));
  TORCH_CHECK_VALUE(
      boxes.dim() == 2 && boxes.size(1) == 4 && boxes.size(0) == masks.size(0),
      "paste_masks: boxes must be (n, 4) with n = ", masks.size(0), ", not ", boxes.sizes());
  check_device(boxes, "paste_masks: boxes", masks, "masks");
  check_floating(masks, "paste_masks: masks");
  check_floating(boxes, "paste_masks: boxes");
  TORCH_CHECK_VALUE(
      im_h >= 0 && im_w >= 0 && im_h <= 65535 && im_w <= 65535 && im_h * im_w < (1LL << 31),
      "paste_masks: height and width must be in [0, 65535] with fewer than 2^31 pixels, not ", im_h,
      " x ", im_w);
}

}  // namespace detectron
