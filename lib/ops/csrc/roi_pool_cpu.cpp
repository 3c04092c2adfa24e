// RoIPoolF over one or several feature levels.
//
// Forward looks at many channels of a pixel at once. In NCHW, where they are far apart, it first copies
// an RoI's pixels of some channels.
#include <algorithm>
#include <vector>

#include "roi_cpu.h"

namespace detectron::cpu {
namespace {

constexpr int64_t kPlanes = 16;      // channels that are copied together
constexpr int64_t kStrip = 1 << 14;  // at most so many values at a time, or one row of cells

// Where the cells of all RoIs lie.
template <typename A>
struct Cells {
  std::vector<FoundRoi<A>> rois;
  std::vector<Span> spans;  // of each RoI: of its rows of cells, then of its columns

  explicit Cells(const RoiPool& p) : rois(p.rois), spans(p.rois * (p.pooled_h + p.pooled_w)) {
    Span* span = spans.data();
    for (int64_t r = 0; r < p.rois; ++r) {
      const auto& roi = rois[r] = find_roi<PoolRule, A>(p, r, p.pooled_h, p.pooled_w);
      const int height = roi.valid ? p.heights[roi.level] : 0;  // 0: all cells are empty
      const int width = roi.valid ? p.widths[roi.level] : 0;
      for (int i = 0; i < p.pooled_h; ++i) *span++ = PoolRule::span(roi.y, i, height);
      for (int i = 0; i < p.pooled_w; ++i) *span++ = PoolRule::span(roi.x, i, width);
    }
  }
};

// Pixels with the values of their channels side by side: a map, or a copy of a part of it.
template <typename T>
struct Pixels {
  const T* values;
  int64_t channels, width;
  int top, left;  // where it lies on the map
  int map_width;
};

// pool_cell() of a single channel, in registers.
template <typename T>
void pool_value(const Pixels<T>& pixels, Span ys, Span xs, T* pooled, int32_t* argmax) {
  const T* row = pixels.values + (ys.begin - pixels.top) * pixels.width - pixels.left;
  T best = row[xs.begin];
  int32_t at = ys.begin * pixels.map_width + xs.begin;
  for (int y = ys.begin; y < ys.end; ++y, row += pixels.width) {
    for (int x = xs.begin; x < xs.end; ++x) {
      const T value = row[x];
      if (value <= best) continue;  // nearly always, and then nothing else is asked
      if (value > best || value != value) {
        best = value;
        at = y * pixels.map_width + x;
      }
    }
  }
  *pooled = best;
  *argmax = at;
}

// The first of the largest values, or the last NaN, of each channel of a cell.
template <typename T>
void pool_cell(
    const Pixels<T>& pixels, Span ys, Span xs, T* __restrict__ best, int32_t* __restrict__ argmax) {
  const int64_t n = pixels.channels;
  if (ys.begin >= ys.end || xs.begin >= xs.end) {
    std::fill_n(best, n, T(0));
    std::fill_n(argmax, n, -1);
    return;
  }
  if (n == 1) return pool_value(pixels, ys, xs, best, argmax);
  for (int y = ys.begin; y < ys.end; ++y) {
    const T* __restrict__ values =
        pixels.values + ((y - pixels.top) * pixels.width + xs.begin - pixels.left) * n;
    for (int x = xs.begin; x < xs.end; ++x, values += n) {
      const int32_t index = y * pixels.map_width + x;
      if (y == ys.begin && x == xs.begin) {
        std::copy_n(values, n, best);
        std::fill_n(argmax, n, index);
        continue;
      }
      for (int64_t c = 0; c < n; ++c) {  // no branches, so that it is compiled for vectors
        const T value = values[c], old = best[c];
        const bool take = (value > old) | (value != value);
        best[c] = take ? value : old;
        argmax[c] = take ? index : argmax[c];
      }
    }
  }
}

// Rows [first, last) of an RoI's cells.
template <typename T>
void pool_cells(
    const Pixels<T>& pixels, int first, int last, int pooled_w, const Span* ys, const Span* xs,
    T* pooled, int32_t* argmax) {
  for (int i = first * pooled_w; i < last * pooled_w; ++i) {
    const int64_t at = i * pixels.channels;
    pool_cell(pixels, ys[i / pooled_w], xs[i % pooled_w], pooled + at, argmax + at);
  }
}

// to[i][j] = from[j][i]; the rows of `from` begin `step` apart.
template <typename T>
void transpose(const T* from, int64_t step, int64_t rows, int64_t columns, T* to) {
  for (int64_t i = 0; i < columns; ++i) {
    for (int64_t j = 0; j < rows; ++j) *to++ = from[j * step + i];
  }
}

template <typename T>
T* at_least(int64_t size, std::vector<T>& values) {
  if (static_cast<int64_t>(values.size()) < size) values.resize(size);
  return values.data();
}

// Pools some planes of an NCHW map by way of copies.
template <typename T>
struct Planes {
  std::vector<T> copy, best;
  std::vector<int32_t> indices;

  void pool(
      const RoiPool& p, int level, const T* map, int64_t n, const Span* ys, const Span* xs,
      T* pooled, int32_t* argmax) {
    const int width = p.widths[level], left = xs[0].begin;
    const int64_t area = static_cast<int64_t>(p.heights[level]) * width;
    const int64_t cells = static_cast<int64_t>(p.pooled_h) * p.pooled_w;
    const int64_t columns = xs[p.pooled_w - 1].end - left;
    at_least(cells * n, best);
    at_least(cells * n, indices);
    for (int first = 0, last; first < p.pooled_h; first = last) {
      const int top = ys[first].begin;
      const auto values = [&](int row) { return (ys[row].end - top) * columns * n; };
      for (last = first + 1; last < p.pooled_h && values(last) <= kStrip; ++last) {}
      T* strip = at_least(values(last - 1), copy);
      for (int y = top; y < ys[last - 1].end; ++y, strip += columns * n) {
        transpose(map + static_cast<int64_t>(y) * width + left, area, n, columns, strip);
      }
      pool_cells<T>(
          {copy.data(), n, columns, top, left, width}, first, last, p.pooled_w, ys, xs, best.data(),
          indices.data());
    }
    transpose(best.data(), n, cells, n, pooled);
    transpose(indices.data(), n, cells, n, argmax);
  }
};

template <typename T>
void forward(const RoiPool& p) {
  using A = Acc<T>;
  const Cells<A> cells(p);
  const int64_t at_once = p.channels_last ? p.channels : std::min(p.channels, kPlanes);
  const int64_t blocks = (p.channels + at_once - 1) / at_once;
  // All RoIs of a block of channels, then those of the next: its planes stay in the cache.
  at::parallel_for(0, p.rois * blocks, 1, [&](int64_t begin, int64_t end) {
    Planes<T> planes;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i % p.rois, channel = i / p.rois * at_once;
      const int64_t n = std::min(at_once, p.channels - channel);
      const int level = cells.rois[r].level, width = p.widths[level];
      const T* map = static_cast<const T*>(p.maps[level]) +
          image_offset(p, level, cells.rois[r].image) + channel * map_layout(p, level).channel;
      const Span* ys = cells.spans.data() + r * (p.pooled_h + p.pooled_w);
      const Span* xs = ys + p.pooled_h;
      const int64_t out = pooled_offset(p, r, p.channels, channel, 0);
      T* pooled = static_cast<T*>(p.pooled) + out;
      if (p.channels_last || n == 1) {  // the pixels of one plane lie as they are wanted
        pool_cells<T>(
            {map, n, width, 0, 0, width}, 0, p.pooled_h, p.pooled_w, ys, xs, pooled,
            p.argmax + out);
      } else {
        planes.pool(p, level, map, n, ys, xs, pooled, p.argmax + out);
      }
    }
  });
}

template <typename T>
void backward(const RoiPool& p) {
  using A = Acc<T>;
  const T* const grad = static_cast<const T*>(p.pooled);
  std::vector<FoundRoi<A>> rois;
  for (int64_t r = 0; r < p.rois; ++r) {
    rois.push_back(find_roi<PoolRule, A>(p, r, p.pooled_h, p.pooled_w));
  }
  const auto spread = [&](int64_t r, int64_t begin, int64_t end) {
    const FoundRoi<A>& roi = rois[r];
    if (!roi.valid) return;
    const MapLayout step = map_layout(p, roi.level);
    const int64_t area = static_cast<int64_t>(p.heights[roi.level]) * p.widths[roi.level];
    A* const map = static_cast<A*>(p.maps[roi.level]) + image_offset(p, roi.level, roi.image);
    for_each_item(p, begin, end, [&](int64_t c, int cell) {
      const int64_t in = pooled_offset(p, r, p.channels, c, cell);
      const int64_t index = p.argmax[in];
      if (index < 0 || index >= area) return;
      map[index * step.pixel + c * step.channel] += static_cast<A>(grad[in]);
    });
  };
  // Threads own ranges of channels, so no two of them add to one element: parallel and deterministic.
  // In NCHW one channel after the other: its plane stays in the cache.
  at::parallel_for(0, p.channels, 16, [&](int64_t begin, int64_t end) {
    const int64_t at_once = p.channels_last ? end - begin : 1;
    for (int64_t c = begin; c < end; c += at_once) {
      for (int64_t r = 0; r < p.rois; ++r) spread(r, c, c + at_once);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> roi_pool(
    at::TensorList features, const Tensor& rois, const std::optional<Tensor>& levels, Scales scales,
    int64_t pooled_h, int64_t pooled_w) {
  const auto run = [](const RoiPool& p) {
    with_type(p.dtype, [&](auto zero) { forward<decltype(zero)>(p); });
  };
  return roi_pool_with(run, features, rois, levels, scales, pooled_h, pooled_w);
}

std::vector<Tensor> roi_pool_backward(
    const Tensor& grad, const Tensor& argmax, const Tensor& rois,
    const std::optional<Tensor>& levels, Scales scales, Sizes sizes, bool channels_last) {
  const auto run = [](const RoiPool& p) {
    with_type(p.dtype, [&](auto zero) { backward<decltype(zero)>(p); });
  };
  return roi_pool_backward_with(run, grad, argmax, rois, levels, scales, sizes, channels_last);
}

}  // namespace detectron::cpu
