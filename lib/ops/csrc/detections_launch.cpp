// The host side of the CUDA operators on detections; see cuda_launch.cpp.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

#include "detections_checks.h"
#include "detections_kernels.h"
#include "ops.h"

namespace detectron::cuda {
namespace {

cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batched_soft_nms(
    const Tensor& boxes, const Tensor& scores, const Tensor& valid, double sigma,
    double overlap_thresh, double score_thresh, int64_t method) {
  const SoftNmsRule rule =
      check_soft_nms(boxes, scores, valid, sigma, overlap_thresh, score_thresh, method);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const int64_t problems = boxes.size(0), count = boxes.size(1);
  const auto longs = boxes.options().dtype(at::kLong);
  Tensor keep = at::full({problems, count}, -1, longs), kept = at::zeros({problems}, longs);
  Tensor decayed = at::zeros({problems, count}, boxes.options().dtype(at::kFloat));
  if (problems == 0 || count == 0) return {keep, decayed, kept};
  TORCH_CHECK_VALUE(
      count <= std::numeric_limits<int>::max(), "soft_nms: too many boxes in a problem: ", count);
  Tensor b = boxes.to(at::kFloat).contiguous();
  if (reinterpret_cast<uintptr_t>(b.const_data_ptr()) % 16 != 0) b = b.clone();  // read as float4
  Tensor live = scores.to(at::kFloat)
                    .masked_fill(valid.logical_not(), std::numeric_limits<double>::quiet_NaN())
                    .contiguous();
  kernels::SoftNms p{};
  p.boxes = b.const_data_ptr<float>();
  p.scores = live.mutable_data_ptr<float>();
  p.problems = static_cast<int>(problems);
  p.count = count;
  p.rule = rule;
  p.keep = keep.mutable_data_ptr<int64_t>();
  p.decayed = decayed.mutable_data_ptr<float>();
  p.kept = kept.mutable_data_ptr<int64_t>();
  kernels::soft_nms(p, current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {keep, decayed, kept};
}

Tensor box_voting(
    const Tensor& top_dets, const Tensor& all_dets, const Tensor& top_group, const Tensor& offsets,
    double thresh, int64_t method, double beta) {
  const VoteRule rule =
      check_box_voting(top_dets, all_dets, top_group, offsets, thresh, method, beta);
  const c10::cuda::CUDAGuard guard(top_dets.device());
  const Tensor top = top_dets.to(at::kFloat).contiguous(), all = all_dets.to(at::kFloat).contiguous(),
               group = top_group.contiguous(), ranges = offsets.contiguous();
  Tensor out = at::empty_like(top);
  if (out.numel() == 0) return out;
  kernels::BoxVoting p{};
  p.top = top.const_data_ptr<float>();
  p.all = all.const_data_ptr<float>();
  p.top_group = group.const_data_ptr<int64_t>();
  p.offsets = ranges.const_data_ptr<int64_t>();
  p.num_top = top.size(0);
  p.num_all = all.size(0);
  p.groups = ranges.numel() - 1;
  p.rule = rule;
  p.out = out.mutable_data_ptr<float>();
  kernels::box_voting(p, current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace detectron::cuda
