// The host side of match_anchors_cuda.cu and sample_anchors_cuda.cu. Nothing waits for the device.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>

#include "anchors_checks.h"
#include "anchors_kernels.h"
#include "cuda_current.h"
#include "ops.h"

namespace detectron::cuda {
namespace {

// Kernels read boxes as float4: a view at an odd offset into a larger tensor is copied.
Tensor aligned_floats(const Tensor& boxes) {
  Tensor b = boxes.to(at::kFloat).contiguous();
  return reinterpret_cast<uintptr_t>(b.const_data_ptr()) % 16 == 0 ? b : b.clone();
}

unsigned* bits_of(const Tensor& words) {
  return reinterpret_cast<unsigned*>(words.mutable_data_ptr<int>());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> match_anchors(
    const Tensor& anchors, const Tensor& gt_boxes, const Tensor& gt_valid,
    const std::optional<Tensor>& im_info, double positive_overlap, double straddle_thresh) {
  kernels::MatchAnchors p{};
  p.rule = check_match_anchors(anchors, gt_boxes, gt_valid, im_info, straddle_thresh);
  const c10::cuda::CUDAGuard guard(anchors.device());
  const int64_t images = gt_boxes.size(0), slots = gt_boxes.size(1);
  p.count = anchors.size(-2);
  p.image_stride = anchors.dim() == 3 ? p.count : 0;
  Tensor inside = at::empty({images, p.count}, anchors.options().dtype(at::kBool));
  Tensor foreground = at::empty({images, p.count}, inside.options());
  Tensor max_overlap = at::empty({images, p.count}, inside.options().dtype(at::kFloat));
  Tensor gt_index = at::empty({images, p.count}, inside.options().dtype(at::kLong));
  if (inside.numel() == 0) return {inside, foreground, max_overlap, gt_index};
  const Tensor boxes = aligned_floats(anchors), gt = aligned_floats(gt_boxes),
               valid = gt_valid.contiguous();
  const Tensor info = p.rule.any ? Tensor() : im_info->to(at::kFloat).contiguous();
  const Tensor best = at::zeros({images, slots}, inside.options().dtype(at::kInt));
  p.anchors = boxes.const_data_ptr<float>();
  p.gt_boxes = gt.const_data_ptr<float>();
  p.gt_valid = valid.const_data_ptr<bool>();
  p.im_info = info.defined() ? info.const_data_ptr<float>() : nullptr;
  p.images = static_cast<int>(images);
  p.slots = static_cast<int>(slots);
  p.positive = static_cast<float>(positive_overlap);
  p.best = bits_of(best);
  p.inside = inside.mutable_data_ptr<bool>();
  p.foreground = foreground.mutable_data_ptr<bool>();
  p.max_overlap = max_overlap.mutable_data_ptr<float>();
  p.gt_index = gt_index.mutable_data_ptr<int64_t>();
  kernels::match_anchors(p, current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {inside, foreground, max_overlap, gt_index};
}

std::tuple<Tensor, Tensor> sample_anchors(
    const Tensor& foreground, const Tensor& background, const Tensor& random,
    int64_t max_foreground) {
  const int64_t draws = check_sample_anchors(foreground, background, random, max_foreground);
  const c10::cuda::CUDAGuard guard(foreground.device());
  const int64_t images = foreground.size(0), count = foreground.size(1);
  const Tensor fg = foreground.contiguous(), bg = background.contiguous(), r = random.contiguous();
  Tensor index = at::empty({images, draws}, fg.options().dtype(at::kLong));
  Tensor labels = at::empty({images, draws}, fg.options().dtype(at::kChar));
  if (index.numel() == 0) return {index, labels};
  const Tensor bits = at::empty({2, images, (count + 31) / 32}, fg.options().dtype(at::kInt));
  kernels::SampleAnchors p{};
  p.foreground = fg.const_data_ptr<bool>();
  p.background = bg.const_data_ptr<bool>();
  p.random = r.const_data_ptr<float>();
  p.images = static_cast<int>(images);
  p.max_foreground = static_cast<int>(max_foreground);
  p.draws = static_cast<int>(draws);
  p.count = count;
  p.foreground_bits = bits_of(bits);
  p.background_bits = p.foreground_bits + bits.numel() / 2;
  p.index = index.mutable_data_ptr<int64_t>();
  p.labels = labels.mutable_data_ptr<int8_t>();
  kernels::sample_anchors(p, current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {index, labels};
}

}  // namespace detectron::cuda
