// Entry points of the operators; schemas and registration are in library.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace detectron {

using at::Tensor;
using Sizes = at::IntArrayRef;
using Scales = at::ArrayRef<double>;

#define DETECTRON_OPS(backend)                                                                   \
  namespace backend {                                                                            \
  Tensor nms(const Tensor& boxes, const Tensor& scores, double thresh, bool plus_one);           \
  std::tuple<Tensor, Tensor> batched_nms(                                                        \
      const Tensor& boxes, const Tensor& valid, double thresh, int64_t max_out, bool plus_one,   \
      const std::optional<Tensor>& groups);                                                      \
  Tensor roi_align(                                                                              \
      at::TensorList features, const Tensor& rois, const std::optional<Tensor>& levels,          \
      Scales scales, int64_t pooled_h, int64_t pooled_w, int64_t sampling_ratio, bool aligned);  \
  std::vector<Tensor> roi_align_backward(                                                        \
      const Tensor& grad, const Tensor& rois, const std::optional<Tensor>& levels,               \
      Scales scales, Sizes sizes, int64_t sampling_ratio, bool aligned, bool channels_last);     \
  std::tuple<Tensor, Tensor> roi_pool(                                                           \
      at::TensorList features, const Tensor& rois, const std::optional<Tensor>& levels,          \
      Scales scales, int64_t pooled_h, int64_t pooled_w);                                        \
  std::vector<Tensor> roi_pool_backward(                                                         \
      const Tensor& grad, const Tensor& argmax, const Tensor& rois,                              \
      const std::optional<Tensor>& levels, Scales scales, Sizes sizes, bool channels_last);      \
  std::tuple<Tensor, Tensor> roi_crop(                                                           \
      at::TensorList features, const Tensor& rois, const std::optional<Tensor>& levels,          \
      Scales scales, int64_t pooled_h, int64_t pooled_w, bool max_pool);                         \
  std::vector<Tensor> roi_crop_backward(                                                         \
      const Tensor& grad, const Tensor& choice, const Tensor& rois,                              \
      const std::optional<Tensor>& levels, Scales scales, Sizes sizes, bool max_pool,            \
      bool channels_last);                                                                       \
  Tensor ps_roi_pool(                                                                            \
      at::TensorList features, const Tensor& rois, const std::optional<Tensor>& levels,          \
      Scales scales, int64_t grid_size);                                                         \
  std::vector<Tensor> ps_roi_pool_backward(                                                      \
      const Tensor& grad, const Tensor& rois, const std::optional<Tensor>& levels,               \
      Scales scales, Sizes sizes, bool channels_last);                                           \
  Tensor image_batch(                                                                            \
      const Tensor& pixels, const Tensor& meta, int64_t height, int64_t width,                   \
      const Tensor& means);                                                                      \
  Tensor polygons_to_masks(                                                                      \
      const Tensor& coords, const Tensor& poly_offsets, const Tensor& object_offsets,            \
      const Tensor& rois, const Tensor& object_index, int64_t resolution);                       \
  std::tuple<Tensor, Tensor, Tensor> batched_soft_nms(                                           \
      const Tensor& boxes, const Tensor& scores, const Tensor& valid, double sigma,              \
      double overlap_thresh, double score_thresh, int64_t method);                               \
  Tensor box_voting(                                                                             \
      const Tensor& top_dets, const Tensor& all_dets, const Tensor& top_group,                   \
      const Tensor& offsets, double thresh, int64_t method, double beta);                        \
  Tensor paste_masks(                                                                            \
      const Tensor& masks, const Tensor& boxes, int64_t im_h, int64_t im_w, double thresh);      \
  std::tuple<Tensor, Tensor> encode_masks(                                                       \
      const Tensor& masks, const Tensor& boxes, int64_t im_h, int64_t im_w, double thresh);      \
  std::tuple<Tensor, Tensor, Tensor> group_norm(                                                 \
      const Tensor& x, const Tensor& weight, const Tensor& bias,                                 \
      const std::optional<Tensor>& residual, int64_t groups, double eps, bool relu);             \
  std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_backward(                                \
      const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,             \
      const Tensor& mean, const Tensor& rstd, const std::optional<Tensor>& out, int64_t groups,  \
      bool relu);                                                                                \
  void bias_act_(                                                                                \
      const Tensor& y, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, \
      bool relu);                                                                                \
  std::tuple<Tensor, Tensor> relu_backward(const Tensor& grad, const Tensor& y, bool with_sum);  \
  Tensor channel_sum(const Tensor& map);                                                         \
  Tensor add_upsampled(const Tensor& lateral, const Tensor& top);                                \
  Tensor sum_2x2(const Tensor& map);                                                             \
  std::tuple<Tensor, Tensor, Tensor, Tensor> match_anchors(                                      \
      const Tensor& anchors, const Tensor& gt_boxes, const Tensor& gt_valid,                     \
      const std::optional<Tensor>& im_info, double positive_overlap, double straddle_thresh);    \
  std::tuple<Tensor, Tensor> sample_anchors(                                                     \
      const Tensor& foreground, const Tensor& background, const Tensor& random,                  \
      int64_t max_foreground);                                                                   \
  }

DETECTRON_OPS(cpu)
DETECTRON_OPS(cuda)
#undef DETECTRON_OPS

namespace cuda {
// On the CPU it is torch's own passes: lib/ops/sigmoid_focal_loss.py.
std::tuple<Tensor, Tensor> sigmoid_focal_loss(
    const Tensor& logits, const Tensor& labels, double alpha, double gamma, bool with_grad);
}  // namespace cuda

}  // namespace detectron
