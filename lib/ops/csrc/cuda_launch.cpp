// The CUDA operators' host side: checks, outputs, scratch memory, then the launchers of kernels.h.
// Everything runs on the inputs' device and the current stream; only nms reads a size back (its output
// has as many rows as boxes survive).
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

#include "checks.h"
#include "cuda_current.h"
#include "kernels.h"
#include "ops.h"

namespace detectron::cuda {
namespace {

// Kernels read boxes as float4: a view at an odd offset into a larger tensor is copied.
Tensor aligned_floats(const Tensor& boxes) {
  Tensor b = boxes.to(at::kFloat).contiguous();
  return reinterpret_cast<uintptr_t>(b.const_data_ptr()) % 16 == 0 ? b : b.clone();
}

// keep (problems, max_out) and count (problems,) of boxes sorted by score; valid and groups (int)
// may be undefined.
std::tuple<Tensor, Tensor> suppress(
    const Tensor& boxes, const Tensor& valid, const Tensor& groups, double thresh, int64_t max_out,
    bool plus_one) {
  const int64_t problems = boxes.size(0), count = boxes.size(1);
  const auto longs = boxes.options().dtype(at::kLong);
  Tensor keep = at::full({problems, max_out}, -1, longs);
  Tensor kept = at::zeros({problems}, longs);
  if (problems == 0 || count == 0 || max_out == 0) return {keep, kept};
  TORCH_CHECK_VALUE(problems <= 65535, "batched_nms: at most 65535 problems, not ", problems);
  const int64_t rows = std::min<int64_t>(count, kernels::kNmsChunk), words = (rows + 63) / 64;
  const Tensor matrix = at::empty({problems, rows, words}, longs);
  const Tensor removed = at::empty({problems, words}, longs);
  kernels::NmsProblems p{};
  p.boxes = boxes.const_data_ptr<float>();
  p.valid = valid.defined() ? valid.const_data_ptr<bool>() : nullptr;
  p.groups = groups.defined() ? groups.const_data_ptr<int>() : nullptr;
  p.problems = static_cast<int>(problems);
  p.count = count;
  p.max_out = max_out;
  p.thresh = static_cast<float>(thresh);
  p.plus_one = plus_one;
  p.matrix = reinterpret_cast<unsigned long long*>(matrix.mutable_data_ptr<int64_t>());
  p.removed = reinterpret_cast<unsigned long long*>(removed.mutable_data_ptr<int64_t>());
  p.keep = keep.mutable_data_ptr<int64_t>();
  p.kept = kept.mutable_data_ptr<int64_t>();
  kernels::nms(p, current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {keep, kept};
}

}  // namespace

Tensor nms(const Tensor& boxes, const Tensor& scores, double thresh, bool plus_one) {
  check_nms(boxes, scores);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const int64_t count = boxes.size(0);
  if (count == 0) return at::empty({0}, boxes.options().dtype(at::kLong));
  const Tensor ranked =
      scores.masked_fill(scores.isnan(), -std::numeric_limits<double>::infinity());
  const Tensor order =
      std::get<1>(ranked.sort(/*stable=*/true, 0, /*descending=*/true)).contiguous();
  const Tensor sorted = aligned_floats(boxes.index_select(0, order)).unsqueeze(0);
  const auto [keep, kept] = suppress(sorted, Tensor(), Tensor(), thresh, count, plus_one);
  Tensor flags = at::zeros({count}, boxes.options().dtype(at::kBool));
  kernels::nms_mark(
      keep.const_data_ptr<int64_t>(), kept.const_data_ptr<int64_t>(),
      order.const_data_ptr<int64_t>(), count, flags.mutable_data_ptr<bool>(), current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return flags.nonzero().squeeze(1);
}

std::tuple<Tensor, Tensor> batched_nms(
    const Tensor& boxes, const Tensor& valid, double thresh, int64_t max_out, bool plus_one,
    const std::optional<Tensor>& groups) {
  check_batched_nms(boxes, valid, max_out, groups);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const Tensor ints = groups ? groups->to(at::kInt).contiguous() : Tensor();
  return suppress(aligned_floats(boxes), valid.contiguous(), ints, thresh, max_out, plus_one);
}

Tensor image_batch(
    const Tensor& pixels, const Tensor& meta, int64_t height, int64_t width, const Tensor& means) {
  check_image_batch(pixels, meta, height, width, means);
  const c10::cuda::CUDAGuard guard(pixels.device());
  const Tensor bytes = pixels.contiguous(), m = meta.contiguous(), mean = means.contiguous();
  Tensor out = at::empty({m.size(0), 3, height, width}, pixels.options().dtype(at::kFloat));
  if (out.numel() == 0) return out;
  TORCH_CHECK_VALUE(
      m.size(0) <= 65535 && height <= 4 * 65535, "image_batch: ", m.size(0), " images of height ",
      height, " are too many for one call");
  kernels::ImageBatch p{};
  p.pixels = bytes.const_data_ptr<uint8_t>();
  p.num_bytes = bytes.numel();
  p.meta = m.const_data_ptr<double>();
  p.means = mean.const_data_ptr<double>();
  p.images = static_cast<int>(m.size(0));
  p.height = height;
  p.width = width;
  p.out = out.mutable_data_ptr<float>();
  kernels::image_batch(p, current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

Tensor polygons_to_masks(
    const Tensor& coords, const Tensor& poly_offsets, const Tensor& object_offsets,
    const Tensor& rois, const Tensor& object_index, int64_t resolution) {
  check_polygons(coords, poly_offsets, object_offsets, rois, object_index, resolution);
  const c10::cuda::CUDAGuard guard(coords.device());
  const Tensor c = coords.contiguous(), po = poly_offsets.contiguous(),
               oo = object_offsets.contiguous(), r = rois.contiguous(),
               oi = object_index.contiguous();
  Tensor out = at::empty({r.size(0), resolution, resolution}, coords.options().dtype(at::kByte));
  if (out.numel() == 0) return out;
  kernels::Polygons p{};
  p.coords = c.const_data_ptr<float>();
  p.poly_offsets = po.const_data_ptr<int64_t>();
  p.object_offsets = oo.const_data_ptr<int64_t>();
  p.rois = r.const_data_ptr<float>();
  p.object_index = oi.const_data_ptr<int64_t>();
  p.points = c.size(0);
  p.polygons = po.numel() - 1;
  p.objects = oo.numel() - 1;
  p.num_rois = r.size(0);
  p.resolution = static_cast<int>(resolution);
  p.masks = out.mutable_data_ptr<uint8_t>();
  kernels::polygons_to_masks(p, current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace detectron::cuda
