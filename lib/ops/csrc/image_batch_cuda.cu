// Flip, subtract the means, resize, crop and pad a batch of packed uint8 BGR images.
#include "image_geometry.h"
#include "kernels.h"

namespace detectron::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = 4;

// A block makes kThreads columns of kRowsPerBlock rows. Means are subtracted through a table: float64
// arithmetic on every pixel is slow on GPUs without full-rate double precision.
__global__ void __launch_bounds__(kThreads) resize(ImageBatch p) {
  __shared__ float table[3][256];
  for (int i = threadIdx.x; i < 3 * 256; i += kThreads) {
    table[i / 256][i % 256] = static_cast<float>(static_cast<double>(i % 256) - p.means[i / 256]);
  }
  __syncthreads();

  const int64_t x = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (x >= p.width) return;
  const int64_t image = blockIdx.z, plane = p.height * p.width;
  const ImageMeta m = image_meta(p.meta + image * kMetaColumns, p.num_bytes);
  const bool filled_x = m.valid && x < m.out_width;
  Bilinear bx{};
  if (filled_x) {
    bx = bilinear(static_cast<int>(x) + m.crop_x, m.inv_scale, m.width);
    if (m.flip) {
      bx.low = m.width - 1 - bx.low;
      bx.high = m.width - 1 - bx.high;
    }
  }
  for (int64_t y = static_cast<int64_t>(blockIdx.y) * kRowsPerBlock;
       y < p.height && y < (static_cast<int64_t>(blockIdx.y) + 1) * kRowsPerBlock; ++y) {
    float* out = p.out + image * 3 * plane + y * p.width + x;
    if (!filled_x || y >= m.out_height) {
      for (int c = 0; c < 3; ++c) out[c * plane] = 0.f;
      continue;
    }
    const Bilinear by = bilinear(static_cast<int>(y) + m.crop_y, m.inv_scale, m.height);
    const uint8_t* top = p.pixels + m.offset + static_cast<int64_t>(by.low) * m.width * 3;
    const uint8_t* bottom = p.pixels + m.offset + static_cast<int64_t>(by.high) * m.width * 3;
    for (int c = 0; c < 3; ++c) {
      const int left = 3 * bx.low + c, right = 3 * bx.high + c;
      const float a = bx.weight_low * table[c][top[left]] + bx.weight_high * table[c][top[right]];
      const float b =
          bx.weight_low * table[c][bottom[left]] + bx.weight_high * table[c][bottom[right]];
      out[c * plane] = by.weight_low * a + by.weight_high * b;
    }
  }
}

}  // namespace

void image_batch(const ImageBatch& p, cudaStream_t stream) {
  const dim3 grid(
      static_cast<unsigned>((p.width + kThreads - 1) / kThreads),
      static_cast<unsigned>((p.height + kRowsPerBlock - 1) / kRowsPerBlock),
      static_cast<unsigned>(p.images));
  resize<<<grid, kThreads, 0, stream>>>(p);
}

}  // namespace detectron::kernels
