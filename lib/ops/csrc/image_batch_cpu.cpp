// Flip, subtract the means, resize, crop and pad a batch of packed uint8 BGR images.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>

#include "checks.h"
#include "image_geometry.h"
#include "ops.h"

namespace detectron::cpu {
namespace {

using Table = std::array<std::array<float, 256>, 3>;

Table subtract_means(const double* means) {
  Table table;
  for (int c = 0; c < 3; ++c) {
    for (int v = 0; v < 256; ++v) table[c][v] = static_cast<float>(v - means[c]);
  }
  return table;
}

void resize_row(
    const uint8_t* image, const ImageMeta& m, const Table& table, int y, int columns,
    const std::vector<Bilinear>& xs, float* out, int64_t plane) {
  const Bilinear by = bilinear(y + m.crop_y, m.inv_scale, m.height);
  const uint8_t* top = image + static_cast<int64_t>(by.low) * m.width * 3;
  const uint8_t* bottom = image + static_cast<int64_t>(by.high) * m.width * 3;
  for (int x = 0; x < columns; ++x) {
    const Bilinear& bx = xs[x];
    const int left = 3 * bx.low, right = 3 * bx.high;
    for (int c = 0; c < 3; ++c) {
      const auto& t = table[c];
      const float a = bx.weight_low * t[top[left + c]] + bx.weight_high * t[top[right + c]];
      const float b = bx.weight_low * t[bottom[left + c]] + bx.weight_high * t[bottom[right + c]];
      out[c * plane + x] = by.weight_low * a + by.weight_high * b;
    }
  }
}

}  // namespace

Tensor image_batch(
    const Tensor& pixels, const Tensor& meta, int64_t height, int64_t width, const Tensor& means) {
  check_image_batch(pixels, meta, height, width, means);
  const Tensor p = pixels.contiguous(), m = meta.contiguous(), mean = means.contiguous();
  const int64_t images = m.size(0), plane = height * width;
  Tensor out = at::zeros({images, 3, height, width}, pixels.options().dtype(at::kFloat));
  const Table table = subtract_means(mean.const_data_ptr<double>());
  const uint8_t* bytes = p.const_data_ptr<uint8_t>();
  float* data = out.mutable_data_ptr<float>();
  for (int64_t n = 0; n < images; ++n) {
    const ImageMeta im = image_meta(m.const_data_ptr<double>() + n * kMetaColumns, p.numel());
    TORCH_CHECK_VALUE(
        im.valid, "image_batch: image ", n, " (offset ", im.offset, ", ", im.height, " x ", im.width,
        ") does not lie inside the ", p.numel(), " bytes of pixels");
    const int rows = static_cast<int>(std::min<int64_t>(im.out_height, height));
    const int columns = static_cast<int>(std::min<int64_t>(im.out_width, width));
    std::vector<Bilinear> xs(std::max(columns, 0));
    for (int x = 0; x < columns; ++x) {
      xs[x] = bilinear(x + im.crop_x, im.inv_scale, im.width);
      if (im.flip) {
        xs[x].low = im.width - 1 - xs[x].low;
        xs[x].high = im.width - 1 - xs[x].high;
      }
    }
    float* o = data + n * 3 * plane;
    at::parallel_for(0, std::max(rows, 0), 16, [&](int64_t begin, int64_t end) {
      for (int64_t y = begin; y < end; ++y) {
        resize_row(
            bytes + im.offset, im, table, static_cast<int>(y), columns, xs, o + y * width, plane);
      }
    });
  }
  return out;
}

}  // namespace detectron::cpu
