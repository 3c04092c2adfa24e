// Largest values of 3x3 windows, stride 2, padding 1, without the places where they were.
//
// Channels last: a thread takes 16 bytes of channels of one window. Else it takes one channel.
#include "max_pool.h"
#include "values_device.h"

namespace detectron::kernels {
namespace {

constexpr int kThreads = 256, kWindow = 3, kStride = 2;

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) pool(MaxPool p, int64_t pixel_step, int64_t group_step) {
  using A = Acc<T>;
  const int64_t groups = p.channels / V;
  const int64_t total = p.images * p.out_height * p.out_width * groups;
  const int64_t id = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (id >= total) return;
  // Neighbouring threads: groups of channels in channels last, pixels otherwise.
  const int64_t pixels = static_cast<int64_t>(p.out_height) * p.out_width;
  const int64_t outer = p.channels_last ? id / groups : id;
  const int64_t group = p.channels_last ? id - outer * groups : id / pixels % groups;
  const int64_t image = p.channels_last ? outer / pixels : id / pixels / groups;
  const int pixel = static_cast<int>(outer % pixels);
  const int y = pixel / p.out_width * kStride - 1, x = pixel % p.out_width * kStride - 1;
  const T* map = static_cast<const T*>(p.in) + image * p.channels * p.height * p.width +
      group * group_step;
  A best[V];
#pragma unroll
  for (int v = 0; v < V; ++v) best[v] = -INFINITY;
#pragma unroll
  for (int dy = 0; dy < kWindow; ++dy) {
#pragma unroll
    for (int dx = 0; dx < kWindow; ++dx) {
      if (y + dy < 0 || y + dy >= p.height || x + dx < 0 || x + dx >= p.width) continue;
      Packed<T, V> packed;
      packed.load(map + (static_cast<int64_t>(y + dy) * p.width + x + dx) * pixel_step);
      A values[V];
      packed.expand(values);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (values[v] > best[v] || values[v] != values[v]) best[v] = values[v];  // NaN stays
      }
    }
  }
  Packed<T, V> packed;
  packed.pack(best);
  packed.store(static_cast<T*>(p.out) + id * V);
}

template <typename T, int V>
void launch(const MaxPool& p, cudaStream_t stream) {
  const int64_t total = p.images * p.out_height * p.out_width * (p.channels / V);
  const unsigned blocks = static_cast<unsigned>((total + kThreads - 1) / kThreads);
  const int64_t area = static_cast<int64_t>(p.height) * p.width;
  pool<T, V><<<blocks, kThreads, 0, stream>>>(
      p, p.channels_last ? p.channels : 1, p.channels_last ? V : area);
}

template <typename T>
void launch(const MaxPool& p, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  const bool wide = p.channels_last && p.channels % kWide == 0 && aligned_to(p.in, 16) &&
      aligned_to(p.out, 16);
  wide ? launch<T, kWide>(p, stream) : launch<T, 1>(p, stream);
}

}  // namespace

void max_pool(const MaxPool& p, cudaStream_t stream) {
  with_type(p.dtype, [&](auto zero) { launch<decltype(zero)>(p, stream); });
}

}  // namespace detectron::kernels
