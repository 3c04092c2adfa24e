// The host side of the CUDA operators on detections; see cuda_launch.cpp.
#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
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
#include "paste_runs.h"

namespace detectron::cuda {
namespace {

cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// `masks` and `boxes`, float and contiguous, own the memory that the result points to.
kernels::PasteMasks paste_problem(
    const Tensor& masks, const Tensor& boxes, int64_t im_h, int64_t im_w, double thresh) {
  TORCH_CHECK_VALUE(
      masks.size(0) <= 65535, "paste_masks: at most 65535 masks in a call, not ", masks.size(0));
  kernels::PasteMasks p{};
  p.masks = masks.const_data_ptr<float>();
  p.boxes = boxes.const_data_ptr<float>();
  p.instances = masks.size(0);
  p.resolution = static_cast<int>(masks.size(1));
  p.height = static_cast<int>(im_h);
  p.width = static_cast<int>(im_w);
  p.thresh = static_cast<float>(thresh);
  return p;
}

// A copy on the host, once the current stream has made it. In pinned memory: a copy to other memory keeps
// the driver, which other threads launch through, until what it copies has been worked out.
Tensor on_host(const Tensor& t) {
  Tensor copy = at::empty(t.sizes(), t.options().device(at::kCPU).pinned_memory(true));
  copy.copy_(t, /*non_blocking=*/true);
  c10::cuda::getCurrentCUDAStream().synchronize();
  return copy;
}

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

Tensor paste_masks(
    const Tensor& masks, const Tensor& boxes, int64_t im_h, int64_t im_w, double thresh) {
  check_paste(masks, boxes, im_h, im_w);
  const c10::cuda::CUDAGuard guard(masks.device());
  const Tensor m = masks.to(at::kFloat).contiguous(), b = boxes.to(at::kFloat).contiguous();
  Tensor out = at::empty({m.size(0), im_h, im_w}, m.options().dtype(at::kByte));
  if (out.numel() == 0) return out;
  kernels::paste_masks(
      paste_problem(m, b, im_h, im_w, thresh), out.mutable_data_ptr<uint8_t>(), current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

// Two sizes come to the host: the number of runs, and then the runs.
std::tuple<Tensor, Tensor> encode_masks(
    const Tensor& masks, const Tensor& boxes, int64_t im_h, int64_t im_w, double thresh) {
  check_paste(masks, boxes, im_h, im_w);
  const c10::cuda::CUDAGuard guard(masks.device());
  const Tensor m = masks.to(at::kFloat).contiguous(), b = boxes.to(at::kFloat).contiguous();
  const int64_t count = m.size(0), area = im_h * im_w;
  if (count == 0 || area == 0) {
    const std::vector<int64_t> none(count, 0);
    return encode_runs(nullptr, none.data(), count, area);
  }
  const auto p = paste_problem(m, b, im_h, im_w, thresh);
  const Tensor counts = at::empty({count, im_w}, m.options().dtype(at::kInt));
  kernels::count_runs(p, counts.mutable_data_ptr<int>(), current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const Tensor run_ends = at::cumsum(counts.view({-1}), 0, at::kLong);
  const Tensor ends_there = run_ends.view({count, im_w}).select(1, im_w - 1).contiguous();
  const Tensor ends = on_host(ends_there);
  const int64_t* end = ends.const_data_ptr<int64_t>();
  const Tensor runs = at::empty({end[count - 1], 2}, counts.options());
  if (runs.numel() > 0) {
    kernels::write_runs(
        p, run_ends.const_data_ptr<int64_t>(), reinterpret_cast<int2*>(runs.mutable_data_ptr<int>()),
        current_stream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const Tensor copied = on_host(runs);
  static_assert(sizeof(Run) == 2 * sizeof(int));
  return encode_runs(
      reinterpret_cast<const Run*>(copied.const_data_ptr<int>()), end, count, area);
}

}  // namespace detectron::cuda
