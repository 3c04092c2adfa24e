// Position-sensitive RoI pooling over one or several feature levels.
#include "roi_cpu.h"

namespace detectron::cpu {
namespace {

template <typename T>
void forward(const PsRoiPool& p) {
  using A = Acc<T>;
  using Rule = PositionSensitiveRule;
  const int cells = p.pooled_h * p.pooled_w;
  const int64_t channels = p.channels / cells;
  T* const pooled = static_cast<T*>(p.pooled);
  for_each_roi<Rule, A>(
      p, channels, p.pooled_h, p.pooled_w,
      [&](const FoundRoi<A>& found, int64_t roi, int64_t channel, int cell) {
        A mean = 0;
        if (found.valid) {
          const int64_t width = p.widths[found.level];
          const MapLayout step = map_layout(p, found.level);
          const T* map = static_cast<const T*>(p.maps[found.level]) +
              image_offset(p, found.level, found.image) + (channel * cells + cell) * step.channel;
          const Span ys = Rule::span(found.y, cell / p.pooled_w, p.heights[found.level]);
          const Span xs = Rule::span(found.x, cell % p.pooled_w, p.widths[found.level]);
          A sum = 0;
          for (int y = ys.begin; y < ys.end; ++y) {
            for (int x = xs.begin; x < xs.end; ++x) {
              sum += static_cast<A>(map[(y * width + x) * step.pixel]);
            }
          }
          if (ys.begin < ys.end && xs.begin < xs.end) mean = sum / area<A>(ys, xs);
        }
        pooled[pooled_offset(p, roi, channels, channel, cell)] = static_cast<T>(mean);
      });
}

template <typename T>
void backward(const PsRoiPool& p) {
  using A = Acc<T>;
  using Rule = PositionSensitiveRule;
  const int cells = p.pooled_h * p.pooled_w;
  const int64_t channels = p.channels / cells;
  const T* const grad = static_cast<const T*>(p.pooled);
  for_each_channel<Rule, A>(
      p, channels, p.pooled_h, p.pooled_w,
      [&](const FoundRoi<A>& found, int64_t roi, int64_t channel, int cell) {
        const int64_t width = p.widths[found.level];
        const Span ys = Rule::span(found.y, cell / p.pooled_w, p.heights[found.level]);
        const Span xs = Rule::span(found.x, cell % p.pooled_w, p.widths[found.level]);
        const A value = static_cast<A>(grad[pooled_offset(p, roi, channels, channel, cell)]);
        const A part = value / area<A>(ys, xs);  // not used where there are no pixels
        const MapLayout step = map_layout(p, found.level);
        A* map = static_cast<A*>(p.maps[found.level]) +
            image_offset(p, found.level, found.image) + (channel * cells + cell) * step.channel;
        for (int y = ys.begin; y < ys.end; ++y) {
          for (int x = xs.begin; x < xs.end; ++x) map[(y * width + x) * step.pixel] += part;
        }
      });
}

}  // namespace

Tensor ps_roi_pool(
    at::TensorList features, const Tensor& rois, const std::optional<Tensor>& levels, Scales scales,
    int64_t grid_size) {
  const auto run = [](const PsRoiPool& p) {
    with_type(p.dtype, [&](auto zero) { forward<decltype(zero)>(p); });
  };
  return ps_roi_pool_with(run, features, rois, levels, scales, grid_size);
}

std::vector<Tensor> ps_roi_pool_backward(
    const Tensor& grad, const Tensor& rois, const std::optional<Tensor>& levels, Scales scales,
    Sizes sizes, bool channels_last) {
  const auto run = [](const PsRoiPool& p) {
    with_type(p.dtype, [&](auto zero) { backward<decltype(zero)>(p); });
  };
  return ps_roi_pool_backward_with(run, grad, rois, levels, scales, sizes, channels_last);
}

}  // namespace detectron::cpu
