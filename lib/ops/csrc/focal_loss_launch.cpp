// The host side of the sigmoid_focal_loss kernel. Nothing waits for the device.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>

#include "checks.h"
#include "cuda_current.h"
#include "focal_loss.h"
#include "ops.h"
#include "roi_host.h"

namespace detectron::cuda {

std::tuple<Tensor, Tensor> sigmoid_focal_loss(
    const Tensor& logits, const Tensor& labels, double alpha, double gamma, bool with_grad) {
  const char* const op = "sigmoid_focal_loss";
  check_floating(logits, "sigmoid_focal_loss: logits");
  check_device(labels, "sigmoid_focal_loss: labels", logits, "logits");
  check_dtype(labels, "sigmoid_focal_loss: labels", at::kLong);
  TORCH_CHECK_VALUE(
      logits.dim() == 4 && labels.dim() == 4 && labels.size(0) == logits.size(0) &&
          labels.size(2) == logits.size(2) && labels.size(3) == logits.size(3) &&
          labels.size(1) > 0 && logits.size(1) % labels.size(1) == 0,
      op, ": logits must be (N, A * C, H, W) and labels (N, A, H, W), not ", logits.sizes(),
      " and ", labels.sizes());
  const c10::cuda::CUDAGuard guard(logits.device());
  const bool last = features_are_channels_last({logits});
  const auto layout = memory_format(last);
  const Tensor in = logits.contiguous(layout), own = labels.contiguous(layout);
  const auto type = logits.scalar_type(), wide = type == at::kDouble ? at::kDouble : at::kFloat;
  Tensor grad = with_grad
      ? at::empty_like(in, in.options().dtype(type == at::kHalf ? at::kFloat : type))
      : at::empty({0}, in.options());
  if (in.numel() == 0) return {at::zeros({}, in.options().dtype(wide)), grad};
  kernels::FocalLoss p{};
  p.dtype = roi_dtype(op, type);
  p.logits = in.const_data_ptr();
  p.labels = own.const_data_ptr<int64_t>();
  p.grad = with_grad ? grad.mutable_data_ptr() : nullptr;
  p.count = in.numel();
  p.classes = in.size(1) / own.size(1);
  p.inner = last ? 1 : in.size(2) * in.size(3);
  p.alpha = alpha;
  p.gamma = gamma;
  p.blocks = 8 * multiprocessors();
  Tensor sums = at::empty({p.blocks}, in.options().dtype(at::kDouble));
  p.sums = sums.mutable_data_ptr<double>();
  kernels::sigmoid_focal_loss(p, current_stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {sums.sum().to(wide), grad};
}

}  // namespace detectron::cuda
