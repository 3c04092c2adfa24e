// Argument checks shared by the CPU and the CUDA entry points, so that both give the same sentences.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <optional>
#include <string>

namespace detectron {

using at::Tensor;

inline void check_device(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  TORCH_CHECK_VALUE(
      t.device() == like.device(), name, " is on ", t.device(), " but ", like_name, " is on ",
      like.device(), "; put both on one device");
}

inline void check_dtype(const Tensor& t, const char* name, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(
      t.scalar_type() == dtype, name, " must be ", dtype, ", not ", t.scalar_type());
}

inline void check_floating(const Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(
      at::isFloatingType(t.scalar_type()), name, " must be floating point, not ", t.scalar_type());
}

inline void check_nms(const Tensor& boxes, const Tensor& scores) {
  TORCH_CHECK_VALUE(
      boxes.dim() == 2 && boxes.size(1) == 4, "nms: boxes must be (K, 4), not ", boxes.sizes());
  TORCH_CHECK_VALUE(
      scores.dim() == 1 && scores.size(0) == boxes.size(0), "nms: scores must be (K,) with K = ",
      boxes.size(0), ", not ", scores.sizes());
  check_device(scores, "nms: scores", boxes, "boxes");
  check_floating(boxes, "nms: boxes");
  check_floating(scores, "nms: scores");
}

inline void check_batched_nms(
    const Tensor& boxes, const Tensor& valid, int64_t max_out,
    const std::optional<Tensor>& groups) {
  TORCH_CHECK_VALUE(
      boxes.dim() == 3 && boxes.size(2) == 4, "batched_nms: boxes must be (P, K, 4), not ",
      boxes.sizes());
  TORCH_CHECK_VALUE(
      valid.dim() == 2 && valid.size(0) == boxes.size(0) && valid.size(1) == boxes.size(1),
      "batched_nms: valid must be (P, K) like boxes ", boxes.sizes(), ", not ", valid.sizes());
  check_device(valid, "batched_nms: valid", boxes, "boxes");
  check_floating(boxes, "batched_nms: boxes");
  check_dtype(valid, "batched_nms: valid", at::kBool);
  TORCH_CHECK_VALUE(max_out >= 0, "batched_nms: max_out must be >= 0, not ", max_out);
  if (!groups) return;
  TORCH_CHECK_VALUE(
      groups->sizes() == valid.sizes(), "batched_nms: groups must be (P, K) like valid ",
      valid.sizes(), ", not ", groups->sizes());
  check_device(*groups, "batched_nms: groups", boxes, "boxes");
  check_dtype(*groups, "batched_nms: groups", at::kLong);
}

constexpr int64_t kMaxLevels = 8;
constexpr int64_t kMaxExtent = 1 << 24;    // of a feature map: exact in float
constexpr int64_t kMaxPooledSize = 4096;  // the cells of an RoI are counted in int

// `op` is the operator's name, for the sentences.
inline void check_rois(
    const std::string& op, const Tensor& rois, const std::optional<Tensor>& levels,
    size_t num_levels, const Tensor& like) {
  TORCH_CHECK_VALUE(
      num_levels >= 1 && num_levels <= kMaxLevels, op, ": between 1 and ", kMaxLevels,
      " feature levels, not ", num_levels);
  TORCH_CHECK_VALUE(
      rois.dim() == 2 && rois.size(1) == 5, op, ": rois must be (R, 5), not ", rois.sizes());
  check_device(rois, (op + ": rois").c_str(), like, "features");
  check_floating(rois, (op + ": rois").c_str());
  TORCH_CHECK_VALUE(
      levels.has_value() || num_levels == 1, op,
      ": levels must be given when there is more than one feature level");
  if (levels.has_value()) {
    TORCH_CHECK_VALUE(
        levels->dim() == 1 && levels->size(0) == rois.size(0), op, ": levels must be (R,) with R = ",
        rois.size(0), ", not ", levels->sizes());
    check_device(*levels, (op + ": levels").c_str(), like, "features");
    check_dtype(*levels, (op + ": levels").c_str(), at::kLong);
  }
}

inline void check_roi_features(
    const std::string& op, at::TensorList features, const Tensor& rois,
    const std::optional<Tensor>& levels, at::ArrayRef<double> scales, int64_t pooled_h,
    int64_t pooled_w) {
  TORCH_CHECK_VALUE(!features.empty(), op, ": no feature level given");
  TORCH_CHECK_VALUE(
      scales.size() == features.size(), op, ": ", features.size(), " feature levels but ",
      scales.size(), " spatial scales");
  TORCH_CHECK_VALUE(
      pooled_h > 0 && pooled_w > 0 && pooled_h <= kMaxPooledSize && pooled_w <= kMaxPooledSize, op,
      ": output size must be positive and at most ", kMaxPooledSize, ", not ", pooled_h, " x ",
      pooled_w);
  const Tensor& first = features[0];
  check_floating(first, (op + ": features").c_str());
  for (const Tensor& f : features) {
    TORCH_CHECK_VALUE(f.dim() == 4, op, ": features must be (N, C, H, W), not ", f.sizes());
    check_device(f, (op + ": a feature level").c_str(), first, "the first level");
    check_dtype(f, (op + ": every feature level").c_str(), first.scalar_type());
    TORCH_CHECK_VALUE(
        f.size(0) == first.size(0) && f.size(1) == first.size(1), op,
        ": levels must agree in images and channels: ", f.sizes(), " and ", first.sizes());
    TORCH_CHECK_VALUE(
        f.size(2) <= kMaxExtent && f.size(3) <= kMaxExtent, op, ": feature maps of at most ",
        kMaxExtent, " pixels a side, not ", f.sizes());
  }
  check_rois(op, rois, levels, features.size(), first);
}

inline void check_image_batch(
    const Tensor& pixels, const Tensor& meta, int64_t height, int64_t width, const Tensor& means) {
  TORCH_CHECK_VALUE(pixels.dim() == 1, "image_batch: pixels must be (B,), not ", pixels.sizes());
  TORCH_CHECK_VALUE(
      meta.dim() == 2 && meta.size(1) == 9, "image_batch: meta must be (N, 9), not ", meta.sizes());
  TORCH_CHECK_VALUE(means.numel() == 3, "image_batch: means must be (3,), not ", means.sizes());
  TORCH_CHECK_VALUE(
      height >= 0 && width >= 0, "image_batch: height and width must be >= 0, not ", height, " x ",
      width);
  check_device(meta, "image_batch: meta", pixels, "pixels");
  check_device(means, "image_batch: means", pixels, "pixels");
  check_dtype(pixels, "image_batch: pixels", at::kByte);
  check_dtype(meta, "image_batch: meta", at::kDouble);
  check_dtype(means, "image_batch: means", at::kDouble);
}

constexpr int64_t kMaxMaskResolution = 256;

inline void check_polygons(
    const Tensor& coords, const Tensor& poly_offsets, const Tensor& object_offsets, const Tensor& rois,
    const Tensor& object_index, int64_t resolution) {
  TORCH_CHECK_VALUE(
      coords.dim() == 2 && coords.size(1) == 2, "polygons_to_masks: coords must be (T, 2), not ",
      coords.sizes());
  TORCH_CHECK_VALUE(
      poly_offsets.dim() == 1 && poly_offsets.size(0) >= 1,
      "polygons_to_masks: poly_offsets must be (polygons + 1,), not ", poly_offsets.sizes());
  TORCH_CHECK_VALUE(
      object_offsets.dim() == 1 && object_offsets.size(0) >= 1,
      "polygons_to_masks: object_offsets must be (objects + 1,), not ", object_offsets.sizes());
  TORCH_CHECK_VALUE(
      rois.dim() == 2 && rois.size(1) == 4, "polygons_to_masks: rois must be (R, 4), not ", rois.sizes());
  TORCH_CHECK_VALUE(
      object_index.dim() == 1 && object_index.size(0) == rois.size(0),
      "polygons_to_masks: object_index must be (R,) with R = ", rois.size(0), ", not ",
      object_index.sizes());
  TORCH_CHECK_VALUE(
      resolution >= 1 && resolution <= kMaxMaskResolution,
      "polygons_to_masks: resolution must be in [1, ", kMaxMaskResolution, "], not ", resolution);
  check_device(poly_offsets, "polygons_to_masks: poly_offsets", coords, "coords");
  check_device(object_offsets, "polygons_to_masks: object_offsets", coords, "coords");
  check_device(rois, "polygons_to_masks: rois", coords, "coords");
  check_device(object_index, "polygons_to_masks: object_index", coords, "coords");
  check_dtype(coords, "polygons_to_masks: coords", at::kFloat);
  check_dtype(rois, "polygons_to_masks: rois", at::kFloat);
  check_dtype(poly_offsets, "polygons_to_masks: poly_offsets", at::kLong);
  check_dtype(object_offsets, "polygons_to_masks: object_offsets", at::kLong);
  check_dtype(object_index, "polygons_to_masks: object_index", at::kLong);
}

// One layout for all levels: channels_last as soon as one level is unambiguously so.
inline bool features_are_channels_last(at::TensorList features) {
  for (const Tensor& f : features) {
    if (f.is_contiguous(at::MemoryFormat::ChannelsLast) && !f.is_contiguous()) return true;
  }
  return false;
}

inline at::MemoryFormat memory_format(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

}  // namespace detectron
