// Host side of the RoI operators: checks, outputs, and the plain pointers into tensors that the kernels
// take. The CPU and CUDA entry points differ only in the `run` that they hand in.
#pragma once

#include <ATen/ops/empty.h>

#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "ops.h"
#include "roi_maps.h"

namespace detectron {

// What a RoiMaps points into; must live as long.
struct RoiTensors {
  std::vector<Tensor> maps;
  Tensor boxes, levels, pooled;
};

inline at::ScalarType accumulate_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

inline DType roi_dtype(const char* op, at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return DType::f32;
    case at::kDouble: return DType::f64;
    case at::kHalf: return DType::f16;
    case at::kBFloat16: return DType::bf16;
    default:
      TORCH_CHECK_TYPE(
          false, op, ": features must be float32, float64, float16 or bfloat16, not ", dtype);
  }
}

inline void point_to_rois(
    RoiMaps& p, RoiTensors& held, const char* op, const Tensor& rois,
    const std::optional<Tensor>& levels, Scales scales, at::ScalarType dtype) {
  p.dtype = roi_dtype(op, dtype);
  p.levels = static_cast<int>(scales.size());
  for (int l = 0; l < p.levels; ++l) p.scales[l] = scales[l];
  p.rois = rois.size(0);
  held.boxes = rois.to(accumulate_dtype(dtype)).contiguous();
  p.boxes = held.boxes.const_data_ptr();
  if (levels.has_value()) {
    held.levels = levels->contiguous();
    p.roi_levels = held.levels.const_data_ptr<int64_t>();
  }
}

// For forward, which only reads the maps.
inline RoiTensors point_to_features(
    RoiMaps& p, const char* op, at::TensorList features, const Tensor& rois,
    const std::optional<Tensor>& levels, Scales scales, int64_t pooled_h, int64_t pooled_w) {
  check_roi_features(op, features, rois, levels, scales, pooled_h, pooled_w);
  RoiTensors held;
  point_to_rois(p, held, op, rois, levels, scales, features[0].scalar_type());
  p.channels_last = features_are_channels_last(features);
  p.images = features[0].size(0);
  p.channels = features[0].size(1);
  p.pooled_h = static_cast<int>(pooled_h);
  p.pooled_w = static_cast<int>(pooled_w);
  for (int l = 0; l < p.levels; ++l) {
    held.maps.push_back(features[l].contiguous(memory_format(p.channels_last)));
    p.heights[l] = static_cast<int>(features[l].size(2));
    p.widths[l] = static_cast<int>(features[l].size(3));
    p.maps[l] = const_cast<void*>(held.maps[l].const_data_ptr());
  }
  return held;
}

// How a backward kernel makes the maps of gradients.
enum class Gradient {
  kScattered,  // it adds to zeros and reads the pooled gradient in the maps' layout
  kGathered,   // it writes every element and reads the pooled gradient channels last
};

// For backward: new maps. `per_pooled`: map channels per pooled channel.
inline RoiTensors point_to_gradient(
    RoiMaps& p, const char* op, const Tensor& grad, const Tensor& rois,
    const std::optional<Tensor>& levels, Scales scales, Sizes sizes, bool channels_last,
    at::ScalarType map_dtype, int64_t per_pooled = 1, Gradient way = Gradient::kScattered) {
  check_rois(op, rois, levels, scales.size(), grad);
  TORCH_CHECK_VALUE(
      sizes.size() == 2 + 2 * scales.size() && grad.dim() == 4 && grad.size(0) == rois.size(0) &&
          grad.size(1) * per_pooled == sizes[1],
      op, ": the gradient ", grad.sizes(), " fits neither ", rois.size(0), " RoIs nor maps of sizes ",
      sizes);
  RoiTensors held;
  point_to_rois(p, held, op, rois, levels, scales, grad.scalar_type());
  p.channels_last = channels_last;
  p.images = sizes[0];
  p.channels = sizes[1];
  p.pooled_h = static_cast<int>(grad.size(2));
  p.pooled_w = static_cast<int>(grad.size(3));
  const bool scattered = way == Gradient::kScattered;
  held.pooled = grad.contiguous(memory_format(channels_last || !scattered));
  p.pooled = const_cast<void*>(held.pooled.const_data_ptr());
  for (int l = 0; l < p.levels; ++l) {
    p.heights[l] = static_cast<int>(sizes[2 + 2 * l]);
    p.widths[l] = static_cast<int>(sizes[3 + 2 * l]);
    held.maps.push_back(at::empty(
        {p.images, p.channels, p.heights[l], p.widths[l]}, grad.options().dtype(map_dtype),
        memory_format(channels_last)));
    if (scattered) held.maps[l].zero_();
    p.maps[l] = held.maps[l].mutable_data_ptr();
  }
  return held;
}

inline Tensor new_pooled(
    const RoiMaps& p, const Tensor& like, int64_t channels, at::ScalarType dtype) {
  return at::empty(
      {p.rois, channels, p.pooled_h, p.pooled_w}, like.options().dtype(dtype),
      memory_format(p.channels_last));
}

// The index that forward saved for backward, in the gradient's layout.
inline Tensor saved_index(
    const std::string& name, const Tensor& index, const Tensor& grad, at::ScalarType dtype,
    bool channels_last) {
  TORCH_CHECK_VALUE(
      index.sizes() == grad.sizes(), name, " must have the gradient's shape ", grad.sizes(), ", not ",
      index.sizes());
  check_device(index, name.c_str(), grad, "the gradient");
  check_dtype(index, name.c_str(), dtype);
  return index.contiguous(memory_format(channels_last));
}

inline std::vector<Tensor> in_dtype(std::vector<Tensor> maps, at::ScalarType dtype) {
  for (Tensor& map : maps) map = map.to(dtype);
  return maps;
}

template <typename Run>
std::tuple<Tensor, Tensor> roi_pool_with(
    Run run, at::TensorList features, const Tensor& rois, const std::optional<Tensor>& levels,
    Scales scales, int64_t pooled_h, int64_t pooled_w) {
  RoiPool p{};
  const RoiTensors held =
      point_to_features(p, "roi_pool", features, rois, levels, scales, pooled_h, pooled_w);
  for (const Tensor& f : features) {
    TORCH_CHECK_VALUE(
        f.size(2) * f.size(3) <= std::numeric_limits<int32_t>::max(),
        "roi_pool: feature maps of at most 2147483647 pixels, not ", f.sizes());
  }
  Tensor pooled = new_pooled(p, features[0], p.channels, features[0].scalar_type());
  Tensor argmax = new_pooled(p, features[0], p.channels, at::kInt);
  p.pooled = pooled.mutable_data_ptr();
  p.argmax = argmax.mutable_data_ptr<int32_t>();
  if (pooled.numel() > 0) run(p);
  return {pooled, argmax};
}

template <typename Run>
std::vector<Tensor> roi_pool_backward_with(
    Run run, const Tensor& grad, const Tensor& argmax, const Tensor& rois,
    const std::optional<Tensor>& levels, Scales scales, Sizes sizes, bool channels_last) {
  RoiPool p{};
  RoiTensors held = point_to_gradient(
      p, "roi_pool", grad, rois, levels, scales, sizes, channels_last,
      accumulate_dtype(grad.scalar_type()));
  const Tensor index = saved_index("roi_pool: argmax", argmax, grad, at::kInt, channels_last);
  p.argmax = const_cast<int32_t*>(index.const_data_ptr<int32_t>());
  if (grad.numel() > 0) run(p);
  return in_dtype(std::move(held.maps), grad.scalar_type());
}

template <typename Run>
std::tuple<Tensor, Tensor> roi_crop_with(
    Run run, at::TensorList features, const Tensor& rois, const std::optional<Tensor>& levels,
    Scales scales, int64_t pooled_h, int64_t pooled_w, bool max_pool) {
  RoiCrop p{};
  const RoiTensors held =
      point_to_features(p, "roi_crop", features, rois, levels, scales, pooled_h, pooled_w);
  Tensor pooled = new_pooled(p, features[0], p.channels, features[0].scalar_type());
  Tensor choice = max_pool ? new_pooled(p, features[0], p.channels, at::kByte)
                           : at::empty({0}, features[0].options().dtype(at::kByte));
  p.max_pool = max_pool;
  p.pooled = pooled.mutable_data_ptr();
  p.choice = max_pool ? choice.mutable_data_ptr<uint8_t>() : nullptr;
  if (pooled.numel() > 0) run(p);
  return {pooled, choice};
}

template <typename Run>
std::vector<Tensor> roi_crop_backward_with(
    Run run, const Tensor& grad, const Tensor& choice, const Tensor& rois,
    const std::optional<Tensor>& levels, Scales scales, Sizes sizes, bool max_pool,
    bool channels_last) {
  RoiCrop p{};
  RoiTensors held = point_to_gradient(
      p, "roi_crop", grad, rois, levels, scales, sizes, channels_last,
      accumulate_dtype(grad.scalar_type()));
  Tensor index;
  p.max_pool = max_pool;
  if (max_pool) {
    index = saved_index("roi_crop: choice", choice, grad, at::kByte, channels_last);
    p.choice = const_cast<uint8_t*>(index.const_data_ptr<uint8_t>());
  }
  if (grad.numel() > 0) run(p);
  return in_dtype(std::move(held.maps), grad.scalar_type());
}

template <typename Run>
Tensor ps_roi_pool_with(
    Run run, at::TensorList features, const Tensor& rois, const std::optional<Tensor>& levels,
    Scales scales, int64_t grid_size) {
  PsRoiPool p{};
  const RoiTensors held =
      point_to_features(p, "ps_roi_pool", features, rois, levels, scales, grid_size, grid_size);
  const int64_t cells = grid_size * grid_size;
  TORCH_CHECK_VALUE(
      p.channels % cells == 0, "ps_roi_pool: ", p.channels, " channels cannot be shared by ", cells,
      " cells; they must be a multiple of grid_size squared");
  Tensor pooled = new_pooled(p, features[0], p.channels / cells, features[0].scalar_type());
  p.pooled = pooled.mutable_data_ptr();
  if (pooled.numel() > 0) run(p);
  return pooled;
}

template <typename Run>
std::vector<Tensor> ps_roi_pool_backward_with(
    Run run, const Tensor& grad, const Tensor& rois, const std::optional<Tensor>& levels,
    Scales scales, Sizes sizes, bool channels_last) {
  PsRoiPool p{};
  const int64_t cells = grad.dim() == 4 ? grad.size(2) * grad.size(3) : 1;
  RoiTensors held = point_to_gradient(
      p, "ps_roi_pool", grad, rois, levels, scales, sizes, channels_last,
      accumulate_dtype(grad.scalar_type()), cells);
  if (grad.numel() > 0) run(p);
  return in_dtype(std::move(held.maps), grad.scalar_type());
}

}  // namespace detectron
