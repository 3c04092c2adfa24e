// Soft-NMS: pick the best, lower the scores of the others by their overlap with it, again.
#include <ATen/Parallel.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include "detections_checks.h"
#include "ops.h"

namespace detectron::cpu {
namespace {

struct Candidate {
  float box[4];
  float score;
  int64_t index;
};

// The candidates stay in input order, so that of equal scores the first is picked.
int64_t decay_problem(
    std::vector<Candidate>& candidates, const SoftNmsRule& rule, int64_t* keep, float* decayed) {
  int64_t kept = 0;
  while (!candidates.empty()) {
    size_t best = 0;
    for (size_t i = 1; i < candidates.size(); ++i) {
      if (candidates[i].score > candidates[best].score) best = i;
    }
    const Candidate chosen = candidates[best];
    keep[kept] = chosen.index;
    decayed[kept] = chosen.score;
    ++kept;
    size_t alive = 0;
    for (size_t i = 0; i < candidates.size(); ++i) {
      if (i == best) continue;
      Candidate other = candidates[i];
      const float iou = box_iou(chosen.box, other.box);
      if (iou > 0.f) other.score *= rule.weight(iou);
      if (other.score >= rule.score_thresh) candidates[alive++] = other;
    }
    candidates.resize(alive);
  }
  return kept;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batched_soft_nms(
    const Tensor& boxes, const Tensor& scores, const Tensor& valid, double sigma,
    double overlap_thresh, double score_thresh, int64_t method) {
  const SoftNmsRule rule =
      check_soft_nms(boxes, scores, valid, sigma, overlap_thresh, score_thresh, method);
  const int64_t problems = boxes.size(0), count = boxes.size(1);
  const auto longs = boxes.options().dtype(at::kLong);
  Tensor keep = at::full({problems, count}, -1, longs), counts = at::zeros({problems}, longs);
  Tensor decayed = at::zeros({problems, count}, boxes.options().dtype(at::kFloat));
  const Tensor b = boxes.to(at::kFloat).contiguous(), s = scores.to(at::kFloat).contiguous(),
               v = valid.contiguous();
  const float *box_data = b.const_data_ptr<float>(), *score_data = s.const_data_ptr<float>();
  const bool* valid_data = v.const_data_ptr<bool>();
  int64_t *keep_data = keep.mutable_data_ptr<int64_t>(), *kept = counts.mutable_data_ptr<int64_t>();
  float* decayed_data = decayed.mutable_data_ptr<float>();
  at::parallel_for(0, problems, 1, [&](int64_t begin, int64_t end) {
    std::vector<Candidate> candidates;
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t k = p * count + i;
        if (!valid_data[k] || !(score_data[k] >= rule.score_thresh)) continue;
        const float* box = box_data + 4 * k;
        candidates.push_back({{box[0], box[1], box[2], box[3]}, score_data[k], i});
      }
      kept[p] =
          decay_problem(candidates, rule, keep_data + p * count, decayed_data + p * count);
    }
  });
  return {keep, decayed, counts};
}

}  // namespace detectron::cpu
