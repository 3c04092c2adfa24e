// Box voting: each detection becomes the score-weighted mean of the boxes that overlap it.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>

#include "detections_checks.h"
#include "ops.h"

namespace detectron::cpu {

Tensor box_voting(
    const Tensor& top_dets, const Tensor& all_dets, const Tensor& top_group, const Tensor& offsets,
    double thresh, int64_t method, double beta) {
  const VoteRule rule =
      check_box_voting(top_dets, all_dets, top_group, offsets, thresh, method, beta);
  const Tensor top = top_dets.to(at::kFloat).contiguous(), all = all_dets.to(at::kFloat).contiguous(),
               group = top_group.contiguous(), ranges = offsets.contiguous();
  Tensor out = at::empty_like(top);
  const float *dets = top.const_data_ptr<float>(), *voters = all.const_data_ptr<float>();
  const int64_t *group_of = group.const_data_ptr<int64_t>(), *o = ranges.const_data_ptr<int64_t>();
  const int64_t groups = ranges.numel() - 1, num_all = all.size(0);
  float* result = out.mutable_data_ptr<float>();
  at::parallel_for(0, top.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* det = dets + 5 * i;
      const int64_t g = group_of[i];
      Votes votes;
      if (g >= 0 && g < groups && o[g] >= 0 && o[g + 1] <= num_all) {
        for (int64_t k = o[g]; k < o[g + 1]; ++k) {
          const float iou = box_iou(det, voters + 5 * k);
          if (iou >= rule.thresh) votes.add(rule, iou, voters + 5 * k);
        }
      }
      votes.result(rule, det, result + 5 * i);
    }
  });
  return out;
}

}  // namespace detectron::cpu
