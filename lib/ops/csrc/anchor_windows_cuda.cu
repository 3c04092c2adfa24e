// The 3x3 windows around the cells of anchors, and their gradient: a block an anchor, a thread a channel.
#include "anchor_windows_kernels.h"
#include "values_device.h"

namespace detectron::kernels {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kAll = 0xffffffffu;

template <typename T>
__global__ void __launch_bounds__(kThreads) forward(AnchorWindows p) {
  const int64_t slot = blockIdx.x;
  const AnchorCell cell = cell_of(p, p.index[slot]);
  T* out = static_cast<T*>(p.windows) + slot * kTaps * p.channels;
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    const AnchorCell at = tap_of(cell, tap);
    if (on_map(p, at)) {
      const PixelLayout pixel = pixel_of(p, slot / p.slots, at);
      const T* map = static_cast<const T*>(p.maps[at.level]) + pixel.offset;
      for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) {
        out[tap * p.channels + c] = map[c * pixel.channel];
      }
    } else {
      for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) {
        out[tap * p.channels + c] = from_acc<T>(Acc<T>(0));
      }
    }
  }
}

// A pixel belongs to the first of the slots whose windows hold it, which sums over all of them in their order:
// no atomics, and sums in the wide type.
template <typename T>
__global__ void __launch_bounds__(kThreads) backward(AnchorWindows p) {
  __shared__ unsigned holders[AnchorWindows::kMaxSlots / 32];
  extern __shared__ AnchorCell cells[];  // of the image's slots
  const int64_t image = blockIdx.y, first = image * p.slots;
  const int slot = blockIdx.x, words = (p.slots + 31) / 32;
  for (int i = threadIdx.x; i < p.slots; i += kThreads) cells[i] = cell_of(p, p.index[first + i]);
  __syncthreads();
  const T* const grad = static_cast<const T*>(p.windows) + first * kTaps * p.channels;
  for (int tap = 0; tap < kTaps; ++tap) {
    const AnchorCell at = tap_of(cells[slot], tap);
    if (!on_map(p, at)) continue;  // for the whole block
    for (int i = threadIdx.x; i < 32 * words; i += kThreads) {
      const unsigned bits = __ballot_sync(kAll, i < p.slots && tap_at(cells[i], at) >= 0);
      if (i % 32 == 0) holders[i / 32] = bits;
    }
    __syncthreads();
    bool owner = true;
    for (int w = 0; owner && w <= slot / 32; ++w) {
      const unsigned before = w < slot / 32 ? kAll : (1u << (slot % 32)) - 1;
      owner = (holders[w] & before) == 0;
    }
    if (owner) {
      const PixelLayout pixel = pixel_of(p, image, at);
      T* map = static_cast<T*>(p.maps[at.level]) + pixel.offset;
      for (int64_t c = threadIdx.x; c < p.channels; c += kThreads) {
        Acc<T> sum = 0;
        for (int w = slot / 32; w < words; ++w) {
          for (unsigned left = holders[w]; left != 0; left &= left - 1) {
            const int other = 32 * w + __ffs(left) - 1;
            const int64_t row = static_cast<int64_t>(other) * kTaps + tap_at(cells[other], at);
            sum += to_acc(grad[row * p.channels + c]);
          }
        }
        map[c * pixel.channel] = from_acc<T>(sum);
      }
    }
    __syncthreads();  // the next tap writes the holders
  }
}

}  // namespace

void anchor_windows_forward(const AnchorWindows& p, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(p.images * p.slots);
  with_type(p.dtype, [&](auto zero) {
    forward<decltype(zero)><<<blocks, kThreads, 0, stream>>>(p);
  });
}

void anchor_windows_backward(const AnchorWindows& p, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(p.slots), static_cast<unsigned>(p.images));
  const size_t memory = p.slots * sizeof(AnchorCell);
  with_type(p.dtype, [&](auto zero) {
    backward<decltype(zero)><<<blocks, kThreads, memory, stream>>>(p);
  });
}

}  // namespace detectron::kernels
