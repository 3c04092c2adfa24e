// RoICrop over one or several feature levels.
#include "roi_cpu.h"

namespace detectron::cpu {
namespace {

// The pixels and weights of one bilinear sample.
template <typename A>
struct Sample {
  AxisSample<A> y, x;
  int64_t low_row, high_row;

  Sample(const RoiCrop& p, const FoundRoi<A>& found, int point_y, int point_x) {
    const int width = p.widths[found.level];
    y = CropRule::sample(found.y, point_y, p.heights[found.level]);
    x = CropRule::sample(found.x, point_x, width);
    low_row = static_cast<int64_t>(y.low) * width;
    high_row = static_cast<int64_t>(y.high) * width;
  }
  bool inside() const { return y.inside && x.inside; }

  template <typename F>
  void for_each_pixel(F f) const {  // f(pixel index, weight)
    f(low_row + x.low, y.weight_low * x.weight_low);
    f(low_row + x.high, y.weight_low * x.weight_high);
    f(high_row + x.low, y.weight_high * x.weight_low);
    f(high_row + x.high, y.weight_high * x.weight_high);
  }
};

template <typename T>
void forward(const RoiCrop& p) {
  using A = Acc<T>;
  const int fine = p.max_pool ? 2 : 1;
  T* const pooled = static_cast<T*>(p.pooled);
  for_each_roi<CropRule, A>(
      p, p.channels, fine * p.pooled_h, fine * p.pooled_w,
      [&](const FoundRoi<A>& found, int64_t roi, int64_t channel, int cell) {
        A best = 0;
        int choice = 0;
        for (int k = 0; found.valid && k < fine * fine; ++k) {
          const Sample<A> sample(
              p, found, cell / p.pooled_w * fine + k / 2, cell % p.pooled_w * fine + k % 2);
          A value = 0;
          if (sample.inside()) {
            const MapLayout step = map_layout(p, found.level);
            const T* map = static_cast<const T*>(p.maps[found.level]) +
                image_offset(p, found.level, found.image) + channel * step.channel;
            sample.for_each_pixel([&](int64_t pixel, A weight) {
              value += weight * static_cast<A>(map[pixel * step.pixel]);
            });
          }
          if (k == 0 || value > best || value != value) {
            best = value;
            choice = k;
          }
        }
        const int64_t out = pooled_offset(p, roi, p.channels, channel, cell);
        pooled[out] = static_cast<T>(best);
        if (p.max_pool) p.choice[out] = static_cast<uint8_t>(choice);
      });
}

template <typename T>
void backward(const RoiCrop& p) {
  using A = Acc<T>;
  const int fine = p.max_pool ? 2 : 1;
  const T* const grad = static_cast<const T*>(p.pooled);
  for_each_channel<CropRule, A>(
      p, p.channels, fine * p.pooled_h, fine * p.pooled_w,
      [&](const FoundRoi<A>& found, int64_t roi, int64_t channel, int cell) {
        const int64_t in = pooled_offset(p, roi, p.channels, channel, cell);
        const int k = p.max_pool ? p.choice[in] & 3 : 0;
        const Sample<A> sample(
            p, found, cell / p.pooled_w * fine + k / 2, cell % p.pooled_w * fine + k % 2);
        if (!sample.inside()) return;
        const MapLayout step = map_layout(p, found.level);
        A* map = static_cast<A*>(p.maps[found.level]) +
            image_offset(p, found.level, found.image) + channel * step.channel;
        sample.for_each_pixel([&](int64_t pixel, A weight) {
          map[pixel * step.pixel] += weight * static_cast<A>(grad[in]);
        });
      });
}

}  // namespace

std::tuple<Tensor, Tensor> roi_crop(
    at::TensorList features, const Tensor& rois, const std::optional<Tensor>& levels, Scales scales,
    int64_t pooled_h, int64_t pooled_w, bool max_pool) {
  const auto run = [](const RoiCrop& p) {
    with_type(p.dtype, [&](auto zero) { forward<decltype(zero)>(p); });
  };
  return roi_crop_with(run, features, rois, levels, scales, pooled_h, pooled_w, max_pool);
}

std::vector<Tensor> roi_crop_backward(
    const Tensor& grad, const Tensor& choice, const Tensor& rois,
    const std::optional<Tensor>& levels, Scales scales, Sizes sizes, bool max_pool,
    bool channels_last) {
  const auto run = [](const RoiCrop& p) {
    with_type(p.dtype, [&](auto zero) { backward<decltype(zero)>(p); });
  };
  return roi_crop_backward_with(
      run, grad, choice, rois, levels, scales, sizes, max_pool, channels_last);
}

}  // namespace detectron::cpu
