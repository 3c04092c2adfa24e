// The best ground truth of each anchor, and which anchors are foreground. Neighbours in the list of
// anchors are neighbours in the image: most ground truths are ruled out for a whole run of them at once.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "anchors_checks.h"
#include "ops.h"

namespace detectron::cpu {
namespace {

constexpr int64_t kRun = 64;

struct GroundTruth {
  float box[4];
  int64_t index;
};

struct Problem {
  const float *anchors, *im_info;  // im_info is null where every anchor is inside
  int64_t count, image_stride;     // anchors of an image; floats from one image's to the next's
  InsideRule rule;
  float positive;
  std::vector<std::vector<GroundTruth>> gts;            // the valid ones of each image
  std::vector<std::vector<std::atomic<float>>> best;    // their best IoU
  bool *inside, *foreground;
  float* max_overlap;
  int64_t* gt_index;
};

void raise(std::atomic<float>& value, float least) {
  float seen = value.load(std::memory_order_relaxed);
  while (seen < least && !value.compare_exchange_weak(seen, least, std::memory_order_relaxed)) {
  }
}

// Anchors begin to end of an image, with the places in gts[image] of those that may overlap some.
template <typename Visit>
void for_each_run(const Problem& p, int64_t begin, int64_t end, const Visit& visit) {
  const int64_t runs = (p.count + kRun - 1) / kRun;
  std::vector<size_t> near;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t image = r / runs, first = r % runs * kRun, last = std::min(first + kRun, p.count);
    const float* anchors = p.anchors + image * p.image_stride;
    constexpr float far = std::numeric_limits<float>::infinity();
    float bounds[4] = {far, far, -far, -far};
    for (int64_t a = first; a < last; ++a) {
      for (int k = 0; k < 2; ++k) bounds[k] = smaller(bounds[k], anchors[4 * a + k]);
      for (int k = 2; k < 4; ++k) bounds[k] = larger(bounds[k], anchors[4 * a + k]);
    }
    near.clear();
    const auto& gts = p.gts[image];
    for (size_t g = 0; g < gts.size(); ++g) {
      if (may_overlap(bounds, gts[g].box)) near.push_back(g);
    }
    visit(image, anchors, first, last, near);
  }
}

void find_best(Problem& p, int64_t begin, int64_t end) {
  for_each_run(p, begin, end, [&](int64_t image, const float* anchors, int64_t first, int64_t last,
                                  const std::vector<size_t>& near) {
    const auto& gts = p.gts[image];
    const float* size = p.im_info ? p.im_info + 3 * image : nullptr;
    for (int64_t a = first; a < last; ++a) {
      const float* box = anchors + 4 * a;
      const bool inside = !size || p.rule.holds(box, size[0], size[1]);
      float overlap = -1.f;
      int64_t index = 0;
      if (inside && !gts.empty()) {
        overlap = 0.f;
        index = gts[0].index;
        for (const size_t g : near) {
          const float iou = box_iou(box, gts[g].box);
          if (iou > overlap) {
            overlap = iou;
            index = gts[g].index;
          }
          if (iou > 0.f) raise(p.best[image][g], iou);
        }
      }
      p.inside[image * p.count + a] = inside;
      p.max_overlap[image * p.count + a] = overlap;
      p.gt_index[image * p.count + a] = index;
    }
  });
}

void find_foreground(const Problem& p, int64_t begin, int64_t end) {
  for_each_run(p, begin, end, [&](int64_t image, const float* anchors, int64_t first, int64_t last,
                                  const std::vector<size_t>& near) {
    const auto& gts = p.gts[image];
    const auto& best = p.best[image];
    // A ground truth that no anchor overlaps is tied by all of them.
    const bool all = std::any_of(best.begin(), best.end(), [](const auto& b) { return b == 0.f; });
    for (int64_t a = first; a < last; ++a) {
      const int64_t place = image * p.count + a;
      const float overlap = p.max_overlap[place];
      bool foreground = p.inside[place] && (all || overlap >= p.positive);
      if (p.inside[place] && !foreground && overlap > 0.f) {
        foreground = std::any_of(near.begin(), near.end(), [&](size_t g) {
          const float most = best[g].load(std::memory_order_relaxed);
          // It cannot tie with more than it has.
          return most <= overlap && box_iou(anchors + 4 * a, gts[g].box) == most;
        });
      }
      p.foreground[place] = foreground;
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> match_anchors(
    const Tensor& anchors, const Tensor& gt_boxes, const Tensor& gt_valid,
    const std::optional<Tensor>& im_info, double positive_overlap, double straddle_thresh) {
  Problem p{};
  p.rule = check_match_anchors(anchors, gt_boxes, gt_valid, im_info, straddle_thresh);
  const int64_t images = gt_boxes.size(0), slots = gt_boxes.size(1);
  p.count = anchors.size(-2);
  p.image_stride = anchors.dim() == 3 ? 4 * p.count : 0;
  p.positive = static_cast<float>(positive_overlap);
  const Tensor boxes = anchors.to(at::kFloat).contiguous(), gt = gt_boxes.to(at::kFloat).contiguous(),
               valid = gt_valid.contiguous();
  const Tensor info = p.rule.any ? Tensor() : im_info->to(at::kFloat).contiguous();
  p.anchors = boxes.const_data_ptr<float>();
  p.im_info = info.defined() ? info.const_data_ptr<float>() : nullptr;
  const float* gt_data = gt.const_data_ptr<float>();
  const bool* valid_data = valid.const_data_ptr<bool>();
  for (int64_t n = 0; n < images; ++n) {
    auto& own = p.gts.emplace_back();
    for (int64_t g = 0; g < slots; ++g) {
      if (!valid_data[n * slots + g]) continue;
      own.push_back({{}, g});
      std::copy_n(gt_data + 4 * (n * slots + g), 4, own.back().box);
    }
    p.best.emplace_back(own.size());
  }
  Tensor inside = at::empty({images, p.count}, anchors.options().dtype(at::kBool));
  Tensor foreground = at::empty({images, p.count}, inside.options());
  Tensor max_overlap = at::empty({images, p.count}, inside.options().dtype(at::kFloat));
  Tensor gt_index = at::empty({images, p.count}, inside.options().dtype(at::kLong));
  p.inside = inside.mutable_data_ptr<bool>();
  p.foreground = foreground.mutable_data_ptr<bool>();
  p.max_overlap = max_overlap.mutable_data_ptr<float>();
  p.gt_index = gt_index.mutable_data_ptr<int64_t>();
  const int64_t runs = images * ((p.count + kRun - 1) / kRun);
  at::parallel_for(0, runs, 16, [&](int64_t begin, int64_t end) { find_best(p, begin, end); });
  at::parallel_for(0, runs, 16, [&](int64_t begin, int64_t end) { find_foreground(p, begin, end); });
  return {inside, foreground, max_overlap, gt_index};
}

}  // namespace detectron::cpu
