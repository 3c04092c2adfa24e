// The anchors of an image that the RPN learns from: foreground without, background with replacement.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "anchors_checks.h"
#include "ops.h"

namespace detectron::cpu {
namespace {

std::vector<int> places_of(const bool* flags, int64_t count) {
  std::vector<int> places(count + 1);
  int64_t found = 0;
  for (int64_t a = 0; a < count; ++a) {
    places[found] = static_cast<int>(a);
    found += flags[a];
  }
  places.resize(found);
  return places;
}

void sample(
    const bool* foreground, const bool* background, int64_t count, const float* random,
    int64_t max_foreground, int64_t draws, int64_t* index, int8_t* labels) {
  const std::vector<int> objects = places_of(foreground, count), rest = places_of(background, count);
  const int total = static_cast<int>(objects.size()), others = static_cast<int>(rest.size());
  const int chosen = static_cast<int>(std::min<int64_t>(total, max_foreground));
  std::vector<int> rank(draws, -1);
  // Floyd's way to draw without replacement; with nothing to choose all are taken.
  for (int i = 0; i < chosen; ++i) {
    const int last = total - chosen + i, drawn = draw_below(random[i], last + 1);
    const bool taken = std::find(rank.begin(), rank.begin() + i, drawn) != rank.begin() + i;
    rank[i] = total <= max_foreground ? i : taken ? last : drawn;
  }
  for (int i = 0; i < draws - chosen; ++i) {
    if (others <= draws - chosen) {
      rank[chosen + i] = i < others ? i : -1;
    } else {
      rank[chosen + i] = draw_below(random[max_foreground + i], others);
    }
  }
  std::fill_n(labels, draws, int8_t{-1});
  std::fill_n(index, draws, 0);
  for (int i = static_cast<int>(draws) - 1; i >= chosen; --i) {
    if (rank[i] < 0) continue;
    index[i] = rest[rank[i]];
    // Drawn twice, it counts once.
    const auto end = rank.begin() + i;
    labels[i] = std::find(rank.begin() + chosen, end, rank[i]) == end ? 0 : -1;
  }
  for (int i = 0; i < chosen; ++i) {
    index[i] = objects[rank[i]];
    bool overwritten = false;
    for (int64_t k = chosen; k < draws; ++k) overwritten |= rank[k] >= 0 && index[k] == index[i];
    labels[i] = overwritten ? -1 : 1;
  }
}

}  // namespace

std::tuple<Tensor, Tensor> sample_anchors(
    const Tensor& foreground, const Tensor& background, const Tensor& random,
    int64_t max_foreground) {
  const int64_t draws = check_sample_anchors(foreground, background, random, max_foreground);
  const int64_t images = foreground.size(0), count = foreground.size(1);
  const Tensor fg = foreground.contiguous(), bg = background.contiguous(), r = random.contiguous();
  Tensor index = at::empty({images, draws}, fg.options().dtype(at::kLong));
  Tensor labels = at::empty({images, draws}, fg.options().dtype(at::kChar));
  const bool *fg_data = fg.const_data_ptr<bool>(), *bg_data = bg.const_data_ptr<bool>();
  const float* random_data = r.const_data_ptr<float>();
  int64_t* index_data = index.mutable_data_ptr<int64_t>();
  int8_t* label_data = labels.mutable_data_ptr<int8_t>();
  at::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      sample(
          fg_data + n * count, bg_data + n * count, count, random_data + n * (max_foreground + draws),
          max_foreground, draws, index_data + n * draws, label_data + n * draws);
    }
  });
  return {index, labels};
}

}  // namespace detectron::cpu
