// Polygons of objects, seen through RoIs, as binary masks.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "checks.h"
#include "ops.h"
#include "polygon_edges.h"

namespace detectron::cpu {
namespace {

void check_offsets(const Tensor& offsets, const char* name, int64_t total) {
  const int64_t* o = offsets.const_data_ptr<int64_t>();
  const int64_t n = offsets.numel();
  TORCH_CHECK_VALUE(
      o[0] >= 0 && o[n - 1] <= total && std::is_sorted(o, o + n), "polygons_to_masks: ", name,
      " must ascend within [0, ", total, "]");
}

// Adds (union) one polygon to `mask`, stored column by column.
void add_polygon(
    const float* points, int64_t count, const float* roi, int size, std::vector<uint8_t>& toggles,
    std::vector<uint8_t>& mask) {
  if (count < 3) return;
  const float width = std::max(roi[2] - roi[0], 1.f), height = std::max(roi[3] - roi[1], 1.f);
  std::fill(toggles.begin(), toggles.end(), 0);
  const float* last = points + 2 * (count - 1);
  int x0 = roi_grid(last[0], roi[0], width, size), y0 = roi_grid(last[1], roi[1], height, size);
  for (int64_t i = 0; i < count; ++i) {
    const int x1 = roi_grid(points[2 * i], roi[0], width, size);
    const int y1 = roi_grid(points[2 * i + 1], roi[1], height, size);
    for_each_crossing(x0, y0, x1, y1, size, [&](int position) { toggles[position] ^= 1; });
    x0 = x1;
    y0 = y1;
  }
  uint8_t inside = 0;
  for (size_t k = 0; k < mask.size(); ++k) {
    inside ^= toggles[k];
    mask[k] |= inside;
  }
}

}  // namespace

Tensor polygons_to_masks(
    const Tensor& coords, const Tensor& poly_offsets, const Tensor& object_offsets, const Tensor& rois,
    const Tensor& object_index, int64_t resolution) {
  check_polygons(coords, poly_offsets, object_offsets, rois, object_index, resolution);
  const Tensor c = coords.contiguous(), po = poly_offsets.contiguous(),
               oo = object_offsets.contiguous(), r = rois.contiguous(), oi = object_index.contiguous();
  check_offsets(po, "poly_offsets", c.size(0));
  check_offsets(oo, "object_offsets", po.numel() - 1);
  const int64_t objects = oo.numel() - 1;
  const int size = static_cast<int>(resolution), area = size * size;
  Tensor out = at::zeros({r.size(0), resolution, resolution}, coords.options().dtype(at::kByte));
  const float *points = c.const_data_ptr<float>(), *boxes = r.const_data_ptr<float>();
  const int64_t *polygon = po.const_data_ptr<int64_t>(), *object = oo.const_data_ptr<int64_t>(),
                *index = oi.const_data_ptr<int64_t>();
  uint8_t* masks = out.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, r.size(0), 8, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> toggles(area + 1), mask(area);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t o = index[i];
      if (o < 0 || o >= objects) continue;
      std::fill(mask.begin(), mask.end(), 0);
      for (int64_t k = object[o]; k < object[o + 1]; ++k) {
        add_polygon(
            points + 2 * polygon[k], polygon[k + 1] - polygon[k], boxes + 4 * i, size, toggles, mask);
      }
      for (int y = 0; y < size; ++y) {
        for (int x = 0; x < size; ++x) masks[i * area + y * size + x] = mask[x * size + y];
      }
    }
  });
  return out;
}

}  // namespace detectron::cpu
