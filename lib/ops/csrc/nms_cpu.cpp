// Greedy non-maximum suppression. A candidate is compared with the boxes kept so far (not each kept
// box with all later ones): same result, and a suppressed candidate stops at its first suppressor.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <limits>

#include "checks.h"
#include "ops.h"

namespace detectron::cpu {
namespace {

constexpr int64_t kBlock = 64;  // comparisons between two looks at the result; vectorised

// Structure of arrays, so that the comparison loop runs over contiguous floats.
class KeptBoxes {
 public:
  explicit KeptBoxes(int64_t capacity)
      : stride_(capacity), data_(5 * capacity), groups_(capacity) {}

  bool suppresses(const float* box, float area, int64_t group, float thresh, float one) const {
    const float *x1 = data_.data(), *y1 = x1 + stride_, *x2 = y1 + stride_, *y2 = x2 + stride_,
                *areas = y2 + stride_;
    const float bx1 = box[0], by1 = box[1], bx2 = box[2], by2 = box[3];
    for (int64_t begin = 0; begin < size_; begin += kBlock) {
      const int64_t end = std::min(begin + kBlock, size_);
      int any = 0;
      for (int64_t i = begin; i < end; ++i) {
        const float w = std::min(bx2, x2[i]) - std::max(bx1, x1[i]) + one;
        const float h = std::min(by2, y2[i]) - std::max(by1, y1[i]) + one;
        const float inter = std::max(0.f, w) * std::max(0.f, h);
        any |= (inter / (areas[i] + area - inter) >= thresh) & (groups_[i] == group);
      }
      if (any) return true;
    }
    return false;
  }

  void add(const float* box, float area, int64_t group) {
    for (int k = 0; k < 4; ++k) data_[k * stride_ + size_] = box[k];
    data_[4 * stride_ + size_] = area;
    groups_[size_] = group;
    ++size_;
  }

  int64_t size() const { return size_; }

 private:
  int64_t stride_;
  int64_t size_ = 0;
  std::vector<float> data_;
  std::vector<int64_t> groups_;
};

// Indices into `order` (or into the boxes where order is null) of the kept boxes; at most max_out.
// Without groups all boxes are of one.
int64_t greedy(
    const float* boxes, const bool* valid, const int64_t* groups, const int64_t* order,
    int64_t count, float thresh, int64_t max_out, bool plus_one, int64_t* keep) {
  const float one = plus_one ? 1.f : 0.f;
  KeptBoxes kept(std::min(count, max_out));
  for (int64_t i = 0; i < count && kept.size() < max_out; ++i) {
    if (valid && !valid[i]) continue;
    const int64_t index = order ? order[i] : i;
    const float* box = boxes + 4 * index;
    const float area = (box[2] - box[0] + one) * (box[3] - box[1] + one);
    const int64_t group = groups ? groups[index] : 0;
    if (kept.suppresses(box, area, group, thresh, one)) continue;
    keep[kept.size()] = index;
    kept.add(box, area, group);
  }
  return kept.size();
}

}  // namespace

Tensor nms(const Tensor& boxes, const Tensor& scores, double thresh, bool plus_one) {
  check_nms(boxes, scores);
  const int64_t count = boxes.size(0);
  const Tensor keep = at::empty({count}, boxes.options().dtype(at::kLong));
  const Tensor b = boxes.to(at::kFloat).contiguous();
  const Tensor ranked = scores.masked_fill(scores.isnan(), -std::numeric_limits<double>::infinity());
  const Tensor order = std::get<1>(ranked.sort(/*stable=*/true, 0, /*descending=*/true)).contiguous();
  int64_t* out = keep.mutable_data_ptr<int64_t>();
  const int64_t kept = greedy(
      b.const_data_ptr<float>(), nullptr, nullptr, order.const_data_ptr<int64_t>(), count,
      static_cast<float>(thresh), count, plus_one, out);
  std::sort(out, out + kept);
  return keep.slice(0, 0, kept).clone();
}

std::tuple<Tensor, Tensor> batched_nms(
    const Tensor& boxes, const Tensor& valid, double thresh, int64_t max_out, bool plus_one,
    const std::optional<Tensor>& groups) {
  check_batched_nms(boxes, valid, max_out, groups);
  const int64_t problems = boxes.size(0), count = boxes.size(1);
  const auto longs = boxes.options().dtype(at::kLong);
  Tensor keep = at::full({problems, max_out}, -1, longs);
  Tensor counts = at::empty({problems}, longs);
  const Tensor b = boxes.to(at::kFloat).contiguous(), v = valid.contiguous();
  const float* box_data = b.const_data_ptr<float>();
  const bool* valid_data = v.const_data_ptr<bool>();
  const Tensor g = groups ? groups->contiguous() : Tensor();
  const int64_t* group_data = groups ? g.const_data_ptr<int64_t>() : nullptr;
  int64_t* keep_data = keep.mutable_data_ptr<int64_t>();
  int64_t* count_data = counts.mutable_data_ptr<int64_t>();
  at::parallel_for(0, problems, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      count_data[p] = greedy(
          box_data + p * count * 4, valid_data + p * count,
          group_data ? group_data + p * count : nullptr, nullptr, count,
          static_cast<float>(thresh), max_out, plus_one, keep_data + p * max_out);
    }
  });
  return {keep, counts};
}

}  // namespace detectron::cpu
