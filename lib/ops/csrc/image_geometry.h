// One image's place in a batch and the bilinear coordinates of its resized pixels; CPU and CUDA.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace detectron {

constexpr int kMetaColumns = 9;

struct ImageMeta {
  bool valid;  // the pixels lie inside the buffer and there are some
  int64_t offset;
  int height, width;
  bool flip;
  int out_height, out_width, crop_x, crop_y;
  double inv_scale;
};

HOST_DEVICE ImageMeta image_meta(const double* row, int64_t num_bytes) {
  ImageMeta m;
  m.offset = static_cast<int64_t>(row[0]);
  m.height = static_cast<int>(row[1]);
  m.width = static_cast<int>(row[2]);
  m.flip = row[3] != 0;
  m.out_height = static_cast<int>(row[4]);
  m.out_width = static_cast<int>(row[5]);
  m.crop_x = static_cast<int>(row[6]);
  m.crop_y = static_cast<int>(row[7]);
  m.inv_scale = row[8];
  constexpr int kMaxSide = 1 << 24;  // keeps the byte count below within int64
  m.valid = row[0] >= 0 && m.height > 0 && m.height < kMaxSide && m.width > 0 &&
      m.width < kMaxSide && m.inv_scale - m.inv_scale == 0 &&
      m.offset <= num_bytes - static_cast<int64_t>(m.height) * m.width * 3;
  return m;
}

struct Bilinear {
  int low, high;
  float weight_low, weight_high;
};

// OpenCV's INTER_LINEAR for a given factor: half-pixel centres, borders replicated, float weights.
HOST_DEVICE Bilinear bilinear(int position, double inv_scale, int size) {
  const double exact = (static_cast<double>(position) + 0.5) * inv_scale - 0.5;
  const double last = static_cast<double>(size - 1);
  const double c = exact < 0 ? 0 : (exact > last ? last : exact);
  Bilinear b;
  b.low = static_cast<int>(c);
  b.weight_high = static_cast<float>(c - b.low);
  b.high = b.low + 1 < size ? b.low + 1 : b.low;
  b.weight_low = 1.f - b.weight_high;
  return b;
}

}  // namespace detectron
