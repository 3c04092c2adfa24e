// Where the cells of roi_pool and ps_roi_pool and the samples of roi_crop lie on a feature map: the
// arithmetic shared by the CPU and CUDA kernels.
#pragma once

#include "roi_geometry.h"
#include "roi_maps.h"

namespace detectron {

// Cell or sample i of an RoI begins or lies at about start + i * step, in feature pixels.
template <typename A>
struct Axis {
  A start, step;
};

// Pixels [begin, end) of one axis; nothing where begin == end.
struct Span {
  int begin, end;
};

template <typename A>
HOST_DEVICE A area(Span ys, Span xs) {
  return static_cast<A>(static_cast<int64_t>(ys.end - ys.begin) * (xs.end - xs.begin));
}

template <typename A>
HOST_DEVICE int clipped(A v, int size) {  // size is at most kMaxExtent, so exact in float
  const A top = static_cast<A>(size);
  return v > A(0) ? (v < top ? static_cast<int>(v) : size) : 0;
}

// RoIPoolF: ends rounded (half away from zero) after scaling.
struct PoolRule {
  template <typename A>
  static HOST_DEVICE Axis<A> axis(A low, A high, A scale, int cells) {
    const A start = std::round(low * scale);
    const A size = std::round(high * scale) - start + A(1);
    return {start, (size > A(1) ? size : A(1)) / static_cast<A>(cells)};
  }
  template <typename A>
  static HOST_DEVICE Span span(const Axis<A>& axis, int cell, int size) {
    const A begin = std::floor(static_cast<A>(cell) * axis.step) + axis.start;
    const A end = std::ceil(static_cast<A>(cell + 1) * axis.step) + axis.start;
    return {clipped(begin, size), clipped(end, size)};
  }
};

// Position-sensitive pooling (R-FCN): ends rounded before scaling.
struct PositionSensitiveRule {
  template <typename A>
  static HOST_DEVICE Axis<A> axis(A low, A high, A scale, int cells) {
    const A start = std::round(low) * scale;
    const A size = (std::round(high) + A(1)) * scale - start;
    return {start, (size > A(0.1) ? size : A(0.1)) / static_cast<A>(cells)};
  }
  template <typename A>
  static HOST_DEVICE Span span(const Axis<A>& axis, int cell, int size) {
    const A begin = std::floor(static_cast<A>(cell) * axis.step + axis.start);
    const A end = std::ceil(static_cast<A>(cell + 1) * axis.step + axis.start);
    return {clipped(begin, size), clipped(end, size)};
  }
};

// RoICrop: evenly spaced points from one end of the RoI to the other, both included; a single point
// lies in the middle.
struct CropRule {
  template <typename A>
  static HOST_DEVICE Axis<A> axis(A low, A high, A scale, int points) {
    const A start = low * scale;
    const A extent = high * scale - start;
    if (points == 1) return {start + extent / A(2), A(0)};
    return {start, extent / static_cast<A>(points - 1)};
  }
  // Pixels outside the map count as zeros: their weight is 0.
  template <typename A>
  static HOST_DEVICE AxisSample<A> sample(const Axis<A>& axis, int point, int size) {
    AxisSample<A> s{};
    const A c = axis.start + static_cast<A>(point) * axis.step;
    s.inside = size > 0 && c > A(-1) && c < static_cast<A>(size);
    if (!s.inside) return s;
    const A floor = std::floor(c);
    const int low = static_cast<int>(floor);  // -1 ... size - 1
    const bool has_low = low >= 0, has_high = low + 1 < size;
    s.low = has_low ? low : 0;
    s.high = has_high ? low + 1 : size - 1;
    s.weight_low = has_low ? A(1) - (c - floor) : A(0);
    s.weight_high = has_high ? c - floor : A(0);
    return s;
  }
};

template <typename A>
struct FoundRoi {
  bool valid;  // false: padding row, batch index or level out of range, or coordinates not finite
  int level;
  int64_t image;
  Axis<A> y, x;
};

template <typename Rule, typename A>
HOST_DEVICE FoundRoi<A> find_roi(const RoiMaps& p, int64_t r, int steps_h, int steps_w) {
  FoundRoi<A> found{};
  const int64_t level = p.roi_levels ? p.roi_levels[r] : 0;
  const A* roi = static_cast<const A*>(p.boxes) + 5 * r;
  const bool exists = level >= 0 && level < p.levels && roi[0] >= A(0) &&
      roi[0] < static_cast<A>(p.images);
  if (!exists) return found;
  // Looked at before rounding and widening, which would hide them.
  if (!(is_finite(roi[1]) && is_finite(roi[2]) && is_finite(roi[3]) && is_finite(roi[4]))) {
    return found;
  }
  const A scale = static_cast<A>(p.scales[level]);
  found.level = static_cast<int>(level);
  found.image = static_cast<int64_t>(roi[0]);
  found.y = Rule::template axis<A>(roi[2], roi[4], scale, steps_h);
  found.x = Rule::template axis<A>(roi[1], roi[3], scale, steps_w);
  found.valid = is_finite(found.y.start) && is_finite(found.y.step) &&
      is_finite(found.x.start) && is_finite(found.x.step);
  return found;
}

// Steps in memory, in elements.
struct MapLayout {
  int64_t pixel, channel;
};

HOST_DEVICE MapLayout map_layout(const RoiMaps& p, int level) {
  if (p.channels_last) return {p.channels, 1};
  return {1, static_cast<int64_t>(p.heights[level]) * p.widths[level]};
}

HOST_DEVICE int64_t image_offset(const RoiMaps& p, int level, int64_t image) {
  return image * p.channels * p.heights[level] * p.widths[level];
}

// Where (RoI, channel, cell) lies in pooled and what has its shape.
HOST_DEVICE int64_t pooled_offset(
    const RoiMaps& p, int64_t roi, int64_t channels, int64_t channel, int cell) {
  const int64_t cells = static_cast<int64_t>(p.pooled_h) * p.pooled_w;
  return p.channels_last ? (roi * cells + cell) * channels + channel
                         : (roi * channels + channel) * cells + cell;
}

}  // namespace detectron
