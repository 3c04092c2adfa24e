// RoIAlign over one or several feature levels.
//
// The mean of bilinear samples is separable: sum_yx wy * wx * f[y, x] over the rows and columns that a
// bin's samples touch. The tables of (index, weight) per bin and axis are made once for an RoI, so
// samples that share a pixel cost one multiplication.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "checks.h"
#include "ops.h"
#include "roi_geometry.h"

namespace detectron::cpu {
namespace {

template <typename A>
struct AxisTable {
  std::vector<int> begin;  // first entry of each bin; one more at the end
  std::vector<int> index;
  std::vector<A> weight;

  void build(A start, A bin, A step, int grid, int bins, int size) {
    begin.assign(1, 0);
    index.clear();
    weight.clear();
    for (int b = 0; b < bins; ++b) {
      const A origin = start + static_cast<A>(b) * bin;
      int first, last;
      sample_range<A>(origin, step, grid, A(-1), static_cast<A>(size), &first, &last);
      for (int i = first; i < last; ++i) {
        const auto s = axis_sample<A>(origin + (static_cast<A>(i) + A(0.5)) * step, size);
        if (!s.inside) continue;
        add(s.low, s.weight_low);
        if (s.weight_high != A(0)) add(s.high, s.weight_high);
      }
      begin.push_back(static_cast<int>(index.size()));
    }
  }

 private:
  void add(int i, A w) {  // neighbouring samples mostly hit one of the last two pixels
    const int n = static_cast<int>(index.size()), floor = std::max(begin.back(), n - 2);
    for (int k = n - 1; k >= floor; --k) {
      if (index[k] == i) {
        weight[k] += w;
        return;
      }
    }
    index.push_back(i);
    weight.push_back(w);
  }
};

struct Level {
  int64_t height, width;
  double scale;
};

struct Problem {
  std::vector<Level> levels;
  int64_t images, channels, pooled_h, pooled_w, sampling_ratio;
  bool aligned;
  const int64_t* roi_levels;  // null: all on level 0
};

// Level of RoI r and the tables of its samples; -1 for a row that points nowhere (pools to zeros).
template <typename A>
int64_t prepare(
    const Problem& p, const A* roi, int64_t r, RoiGeometry<A>& g, AxisTable<A>& rows,
    AxisTable<A>& columns) {
  const int64_t l = p.roi_levels ? p.roi_levels[r] : 0;
  if (l < 0 || l >= static_cast<int64_t>(p.levels.size())) return -1;
  const Level& level = p.levels[l];
  g = roi_geometry<A>(
      roi, static_cast<A>(level.scale), p.images, static_cast<int>(p.pooled_h),
      static_cast<int>(p.pooled_w), static_cast<int>(p.sampling_ratio), p.aligned);
  if (!g.valid) return -1;
  rows.build(g.start_h, g.bin_h, g.step_h, g.grid_h, static_cast<int>(p.pooled_h),
             static_cast<int>(level.height));
  columns.build(g.start_w, g.bin_w, g.step_w, g.grid_w, static_cast<int>(p.pooled_w),
                static_cast<int>(level.width));
  return l;
}

// Sum over the pixels that a bin touches, for all channels at once: rows of `channels` contiguous values.
template <typename T, typename A>
void pool_channels_last(
    const Problem& p, const T* map, int64_t width, const AxisTable<A>& rows,
    const AxisTable<A>& columns, A weight, T* out) {
  const int64_t C = p.channels;
  std::vector<A> sum(C);
  for (int64_t by = 0; by < p.pooled_h; ++by) {
    for (int64_t bx = 0; bx < p.pooled_w; ++bx, out += C) {
      std::fill(sum.begin(), sum.end(), A(0));
      for (int i = rows.begin[by]; i < rows.begin[by + 1]; ++i) {
        for (int j = columns.begin[bx]; j < columns.begin[bx + 1]; ++j) {
          const A w = rows.weight[i] * columns.weight[j] * weight;
          const T* src = map + (rows.index[i] * width + columns.index[j]) * C;
          for (int64_t c = 0; c < C; ++c) sum[c] += w * static_cast<A>(src[c]);
        }
      }
      for (int64_t c = 0; c < C; ++c) out[c] = static_cast<T>(sum[c]);
    }
  }
}

// The same for one plane of an NCHW map, from the list of all pixels and weights of each cell.
template <typename A>
struct CellList {
  std::vector<int> begin;  // first entry of each cell; one more at the end
  std::vector<int64_t> offset;
  std::vector<A> weight;

  void build(const AxisTable<A>& rows, const AxisTable<A>& columns, int64_t width, A scale) {
    begin.assign(1, 0);
    offset.clear();
    weight.clear();
    for (size_t by = 0; by + 1 < rows.begin.size(); ++by) {
      for (size_t bx = 0; bx + 1 < columns.begin.size(); ++bx) {
        for (int i = rows.begin[by]; i < rows.begin[by + 1]; ++i) {
          for (int j = columns.begin[bx]; j < columns.begin[bx + 1]; ++j) {
            offset.push_back(rows.index[i] * width + columns.index[j]);
            weight.push_back(rows.weight[i] * columns.weight[j] * scale);
          }
        }
        begin.push_back(static_cast<int>(offset.size()));
      }
    }
  }
};

// kPlanes at a time: independent sums keep the processor busy while the gathers wait.
template <int kPlanes, typename T, typename A>
void pool_planes(const CellList<A>& cells, const T* plane, int64_t area, T* out) {
  const int64_t bins = static_cast<int64_t>(cells.begin.size()) - 1;
  for (int64_t b = 0; b < bins; ++b) {
    A sum[kPlanes] = {};
    for (int i = cells.begin[b]; i < cells.begin[b + 1]; ++i) {
      const T* src = plane + cells.offset[i];
      for (int k = 0; k < kPlanes; ++k) {
        sum[k] += cells.weight[i] * static_cast<A>(src[k * area]);
      }
    }
    for (int k = 0; k < kPlanes; ++k) out[k * bins + b] = static_cast<T>(sum[k]);
  }
}

template <typename T, typename A>
void forward(
    const Problem& p, const std::vector<const T*>& features, const A* rois, int64_t num_rois, T* out,
    bool channels_last) {
  const int64_t bins = p.pooled_h * p.pooled_w, C = p.channels;
  at::parallel_for(0, num_rois, 1, [&](int64_t begin, int64_t end) {
    AxisTable<A> rows, columns;
    CellList<A> cells;
    RoiGeometry<A> g;
    for (int64_t r = begin; r < end; ++r) {
      T* o = out + r * C * bins;
      const int64_t l = prepare(p, rois + 5 * r, r, g, rows, columns);
      if (l < 0) {
        std::fill(o, o + C * bins, T(0));
        continue;
      }
      const int64_t width = p.levels[l].width, area = p.levels[l].height * width;
      const T* f = features[l] + g.image * C * area;
      if (channels_last) {
        pool_channels_last(p, f, width, rows, columns, g.weight, o);
      } else {
        cells.build(rows, columns, width, g.weight);
        int64_t c = 0;
        for (; c + 4 <= C; c += 4) pool_planes<4>(cells, f + c * area, area, o + c * bins);
        for (; c < C; ++c) pool_planes<1>(cells, f + c * area, area, o + c * bins);
      }
    }
  });
}

// Adds one RoI's gradient to channels [c0, c1) of a channels_last map.
template <typename T, typename A>
void spread_channels_last(
    const Problem& p, const T* grad, int64_t c0, int64_t c1, int64_t width, const AxisTable<A>& rows,
    const AxisTable<A>& columns, A weight, A* map) {
  const int64_t C = p.channels, n = c1 - c0;
  std::vector<A> part(n);
  for (int64_t by = 0; by < p.pooled_h; ++by) {
    for (int64_t bx = 0; bx < p.pooled_w; ++bx) {
      const T* src = grad + (by * p.pooled_w + bx) * C + c0;
      for (int64_t c = 0; c < n; ++c) part[c] = static_cast<A>(src[c]) * weight;
      for (int i = rows.begin[by]; i < rows.begin[by + 1]; ++i) {
        for (int j = columns.begin[bx]; j < columns.begin[bx + 1]; ++j) {
          const A w = rows.weight[i] * columns.weight[j];
          A* dst = map + (rows.index[i] * width + columns.index[j]) * C + c0;
          for (int64_t c = 0; c < n; ++c) dst[c] += w * part[c];
        }
      }
    }
  }
}

template <typename T, typename A>
void spread_plane(const CellList<A>& cells, const T* grad, A* plane) {
  for (size_t b = 0; b + 1 < cells.begin.size(); ++b) {
    const A value = static_cast<A>(grad[b]);
    for (int i = cells.begin[b]; i < cells.begin[b + 1]; ++i) {
      plane[cells.offset[i]] += cells.weight[i] * value;
    }
  }
}

// Threads own ranges of channels, so no two of them add to one element: parallel and deterministic.
template <typename T, typename A>
void backward(
    const Problem& p, const T* grad, const A* rois, int64_t num_rois, const std::vector<A*>& out,
    bool channels_last) {
  const int64_t bins = p.pooled_h * p.pooled_w, C = p.channels;
  at::parallel_for(0, C, 16, [&](int64_t c0, int64_t c1) {
    AxisTable<A> rows, columns;
    CellList<A> cells;
    RoiGeometry<A> g;
    for (int64_t r = 0; r < num_rois; ++r) {
      const int64_t l = prepare(p, rois + 5 * r, r, g, rows, columns);
      if (l < 0) continue;
      const int64_t width = p.levels[l].width, area = p.levels[l].height * width;
      const T* src = grad + r * C * bins;
      A* map = out[l] + g.image * C * area;
      if (channels_last) {
        spread_channels_last(p, src, c0, c1, width, rows, columns, g.weight, map);
      } else {
        cells.build(rows, columns, width, g.weight);
        for (int64_t c = c0; c < c1; ++c) spread_plane(cells, src + c * bins, map + c * area);
      }
    }
  });
}

}  // namespace

Tensor roi_align(
    at::TensorList features, const Tensor& rois, const std::optional<Tensor>& levels, Scales scales,
    int64_t pooled_h, int64_t pooled_w, int64_t sampling_ratio, bool aligned) {
  check_roi_features("roi_align", features, rois, levels, scales, pooled_h, pooled_w);
  const bool channels_last = features_are_channels_last(features);
  const Tensor& first = features[0];
  const auto dtype = first.scalar_type();
  const auto compute = dtype == at::kDouble ? at::kDouble : at::kFloat;
  Problem p{{},      first.size(0),  first.size(1), pooled_h, pooled_w,
            sampling_ratio, aligned, nullptr};
  std::vector<Tensor> held;
  for (size_t l = 0; l < features.size(); ++l) {
    p.levels.push_back({features[l].size(2), features[l].size(3), scales[l]});
    held.push_back(features[l].contiguous(memory_format(channels_last)));
  }
  const Tensor r = rois.to(compute).contiguous();
  const Tensor level_index = levels.has_value() ? levels->contiguous() : Tensor();
  if (level_index.defined()) p.roi_levels = level_index.const_data_ptr<int64_t>();
  Tensor out = at::empty(
      {rois.size(0), p.channels, pooled_h, pooled_w}, first.options(), memory_format(channels_last));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "roi_align", [&] {
    using A = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    std::vector<const scalar_t*> data;
    for (const Tensor& f : held) data.push_back(f.const_data_ptr<scalar_t>());
    forward<scalar_t, A>(
        p, data, r.const_data_ptr<A>(), r.size(0), out.mutable_data_ptr<scalar_t>(), channels_last);
  });
  return out;
}

std::vector<Tensor> roi_align_backward(
    const Tensor& grad, const Tensor& rois, const std::optional<Tensor>& levels, Scales scales,
    Sizes sizes, int64_t sampling_ratio, bool aligned, bool channels_last) {
  check_rois("roi_align", rois, levels, scales.size(), grad);
  const auto dtype = grad.scalar_type();
  const auto compute = dtype == at::kDouble ? at::kDouble : at::kFloat;
  Problem p{{},      sizes[0],       sizes[1], grad.size(2), grad.size(3),
            sampling_ratio, aligned, nullptr};
  std::vector<Tensor> out;
  for (size_t l = 0; l < scales.size(); ++l) {
    const int64_t height = sizes[2 + 2 * l], width = sizes[3 + 2 * l];
    p.levels.push_back({height, width, scales[l]});
    out.push_back(at::empty(
        {p.images, p.channels, height, width}, grad.options().dtype(compute), memory_format(channels_last)));
    out.back().zero_();
  }
  const Tensor g = grad.contiguous(memory_format(channels_last));
  const Tensor r = rois.to(compute).contiguous();
  const Tensor level_index = levels.has_value() ? levels->contiguous() : Tensor();
  if (level_index.defined()) p.roi_levels = level_index.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "roi_align_backward", [&] {
    using A = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    std::vector<A*> data;
    for (Tensor& t : out) data.push_back(t.mutable_data_ptr<A>());
    backward<scalar_t, A>(
        p, g.const_data_ptr<scalar_t>(), r.const_data_ptr<A>(), r.size(0), data, channels_last);
  });
  for (Tensor& t : out) t = t.to(dtype);
  return out;
}

}  // namespace detectron::cpu
