// Soft masks to binary masks in their image, or to COCO's compressed run lengths.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>

#include "detections_checks.h"
#include "ops.h"
#include "paste_geometry.h"
#include "paste_runs.h"

namespace detectron {
namespace {

// One number of COCO's text: 5 bits a character, low bits first, 0x20 says that more follow. From the
// fourth on a count is stored as its difference to the one two before.
void append_number(std::vector<uint8_t>& text, int64_t number) {
  bool more = true;
  while (more) {
    uint8_t bits = number & 0x1f;
    number >>= 5;
    more = bits & 0x10 ? number != -1 : number != 0;
    text.push_back(static_cast<uint8_t>((more ? bits | 0x20 : bits) + 48));
  }
}

void append_mask(std::vector<uint8_t>& text, const Run* runs, int64_t count, int64_t area) {
  int64_t last[2] = {0, 0};  // the counts one and two before
  int64_t written = 0, position = 0;
  const auto append = [&](int64_t number) {
    append_number(text, written > 2 ? number - last[1] : number);
    last[1] = last[0];
    last[0] = number;
    ++written;
  };
  for (int64_t i = 0; i < count;) {
    const int64_t begin = runs[i].begin;
    int64_t end = runs[i].end;
    for (++i; i < count && runs[i].begin == end; ++i) end = runs[i].end;
    append(begin - position);
    append(end - begin);
    position = end;
  }
  if (position < area || written == 0) append(area - position);
}

}  // namespace

std::tuple<Tensor, Tensor> encode_runs(
    const Run* runs, const int64_t* ends, int64_t masks, int64_t area) {
  Tensor offsets = at::zeros({masks + 1}, at::kLong);
  int64_t* offset = offsets.mutable_data_ptr<int64_t>();
  std::vector<uint8_t> text;
  for (int64_t i = 0; i < masks; ++i) {
    const int64_t first = i ? ends[i - 1] : 0;
    append_mask(text, runs + first, ends[i] - first, area);
    offset[i + 1] = static_cast<int64_t>(text.size());
  }
  Tensor out = at::empty({static_cast<int64_t>(text.size())}, at::kByte);
  if (!text.empty()) std::memcpy(out.mutable_data_ptr<uint8_t>(), text.data(), text.size());
  return {out, offsets};
}

namespace cpu {
namespace {

// Calls paint(x, begin, end) for each vertical run of the mask, columns and rows ascending.
template <class Paint>
void for_each_run(
    const float* map, int resolution, const float* box, int im_h, int im_w, float thresh,
    Paint paint) {
  const float scale = paste_scale(resolution);
  const PasteAxis xs(box[0], box[2], scale, im_w), ys(box[1], box[3], scale, im_h);
  const int side = resolution + 2;
  std::vector<PasteSample> samples;
  samples.reserve(ys.end - ys.begin);
  for (int y = ys.begin; y < ys.end; ++y) samples.emplace_back(ys, y, side);
  std::vector<float> column(side);
  for (int x = xs.begin; x < xs.end; ++x) {
    const PasteSample across(xs, x, side);
    for (int row = 0; row < side; ++row) {
      column[row] = across.mix(
          bordered(map, resolution, row, across.low), bordered(map, resolution, row, across.high));
    }
    int begin = -1;
    for (int y = ys.begin; y < ys.end; ++y) {
      const PasteSample& down = samples[y - ys.begin];
      const bool inside = down.mix(column[down.low], column[down.high]) > thresh;
      if (inside && begin < 0) begin = y;
      if (!inside && begin >= 0) {
        paint(x, begin, y);
        begin = -1;
      }
    }
    if (begin >= 0) paint(x, begin, ys.end);
  }
}

}  // namespace

Tensor paste_masks(
    const Tensor& masks, const Tensor& boxes, int64_t im_h, int64_t im_w, double thresh) {
  check_paste(masks, boxes, im_h, im_w);
  const Tensor m = masks.to(at::kFloat).contiguous(), b = boxes.to(at::kFloat).contiguous();
  Tensor out = at::zeros({m.size(0), im_h, im_w}, m.options().dtype(at::kByte));
  const int resolution = static_cast<int>(m.size(1)), height = static_cast<int>(im_h),
            width = static_cast<int>(im_w);
  const float *maps = m.const_data_ptr<float>(), *box = b.const_data_ptr<float>();
  uint8_t* planes = out.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, m.size(0), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      uint8_t* plane = planes + i * im_h * im_w;
      for_each_run(
          maps + i * resolution * resolution, resolution, box + 4 * i, height, width,
          static_cast<float>(thresh), [&](int x, int begin, int end) {
            for (int64_t y = begin; y < end; ++y) plane[y * im_w + x] = 1;
          });
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> encode_masks(
    const Tensor& masks, const Tensor& boxes, int64_t im_h, int64_t im_w, double thresh) {
  check_paste(masks, boxes, im_h, im_w);
  const Tensor m = masks.to(at::kFloat).contiguous(), b = boxes.to(at::kFloat).contiguous();
  const int resolution = static_cast<int>(m.size(1)), height = static_cast<int>(im_h),
            width = static_cast<int>(im_w);
  const float *maps = m.const_data_ptr<float>(), *box = b.const_data_ptr<float>();
  std::vector<std::vector<Run>> found(m.size(0));
  at::parallel_for(0, m.size(0), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      for_each_run(
          maps + i * resolution * resolution, resolution, box + 4 * i, height, width,
          static_cast<float>(thresh), [&](int x, int begin, int end) {
            found[i].push_back({x * height + begin, x * height + end});
          });
    }
  });
  std::vector<Run> runs;
  std::vector<int64_t> ends;
  for (const auto& own : found) {
    runs.insert(runs.end(), own.begin(), own.end());
    ends.push_back(static_cast<int64_t>(runs.size()));
  }
  return encode_runs(runs.data(), ends.data(), m.size(0), im_h * im_w);
}

}  // namespace cpu
}  // namespace detectron
