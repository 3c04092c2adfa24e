// RoIPoolF over one or several feature levels.
#include "roi_cpu.h"

namespace detectron::cpu {
namespace {

template <typename T>
void forward(const RoiPool& p) {
  using A = Acc<T>;
  T* const pooled = static_cast<T*>(p.pooled);
  for_each_roi<PoolRule, A>(
      p, p.channels, p.pooled_h, p.pooled_w,
      [&](const FoundRoi<A>& found, int64_t roi, int64_t channel, int cell) {
        T best = T(0);
        int32_t argmax = -1;
        if (found.valid) {
          const int width = p.widths[found.level];
          const MapLayout step = map_layout(p, found.level);
          const T* map = static_cast<const T*>(p.maps[found.level]) +
              image_offset(p, found.level, found.image) + channel * step.channel;
          const Span ys = PoolRule::span(found.y, cell / p.pooled_w, p.heights[found.level]);
          const Span xs = PoolRule::span(found.x, cell % p.pooled_w, width);
          for (int y = ys.begin; y < ys.end; ++y) {
            for (int x = xs.begin; x < xs.end; ++x) {
              const int32_t index = y * width + x;
              const T value = map[index * step.pixel];
              if (argmax < 0 || value > best || value != value) {
                best = value;
                argmax = index;
              }
            }
          }
        }
        const int64_t out = pooled_offset(p, roi, p.channels, channel, cell);
        pooled[out] = best;
        p.argmax[out] = argmax;
      });
}

template <typename T>
void backward(const RoiPool& p) {
  using A = Acc<T>;
  const T* const grad = static_cast<const T*>(p.pooled);
  for_each_channel<PoolRule, A>(
      p, p.channels, p.pooled_h, p.pooled_w,
      [&](const FoundRoi<A>& found, int64_t roi, int64_t channel, int cell) {
        const int64_t in = pooled_offset(p, roi, p.channels, channel, cell);
        const int64_t index = p.argmax[in];
        const int64_t area = static_cast<int64_t>(p.heights[found.level]) * p.widths[found.level];
        if (index < 0 || index >= area) return;
        const MapLayout step = map_layout(p, found.level);
        A* map = static_cast<A*>(p.maps[found.level]) + image_offset(p, found.level, found.image);
        map[index * step.pixel + channel * step.channel] += static_cast<A>(grad[in]);
      });
}

}  // namespace

std::tuple<Tensor, Tensor> roi_pool(
    at::TensorList features, const Tensor& rois, const std::optional<Tensor>& levels, Scales scales,
    int64_t pooled_h, int64_t pooled_w) {
  const auto run = [](const RoiPool& p) {
    with_type(p, [&](auto zero) { forward<decltype(zero)>(p); });
  };
  return roi_pool_with(run, features, rois, levels, scales, pooled_h, pooled_w);
}

std::vector<Tensor> roi_pool_backward(
    const Tensor& grad, const Tensor& argmax, const Tensor& rois,
    const std::optional<Tensor>& levels, Scales scales, Sizes sizes, bool channels_last) {
  const auto run = [](const RoiPool& p) {
    with_type(p, [&](auto zero) { backward<decltype(zero)>(p); });
  };
  return roi_pool_backward_with(run, grad, argmax, rois, levels, scales, sizes, channels_last);
}

}  // namespace detectron::cpu
