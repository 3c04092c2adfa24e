// Polygons of objects, seen through RoIs, as binary masks: one block an RoI.
//
// Masks are bit sets in column-major order. The edges of a polygon are shared out among the threads and
// toggle bits; a prefix parity over the bits fills the polygon; polygons of an object are ORed.
#include "kernels.h"
#include "polygon_edges.h"

namespace detectron::kernels {
namespace {

constexpr int kThreads = 128;
constexpr unsigned kAllLanes = 0xffffffffu;

// union |= prefix parity of toggles, by one warp; toggles are cleared on the way.
__device__ void fill_and_merge(unsigned* toggles, unsigned* merged, int words) {
  const int lane = threadIdx.x;
  unsigned carry = 0;  // parity of everything before, as a mask of all bits
  for (int first = 0; first < words; first += 32) {
    const int i = first + lane;
    unsigned bits = i < words ? toggles[i] : 0;
    bits ^= bits << 1;
    bits ^= bits << 2;
    bits ^= bits << 4;
    bits ^= bits << 8;
    bits ^= bits << 16;
    const unsigned odd = __ballot_sync(kAllLanes, bits >> 31);
    const unsigned before = __popc(odd & ((1u << lane) - 1)) & 1 ? ~carry : carry;
    if (i < words) {
      merged[i] |= bits ^ before;
      toggles[i] = 0;
    }
    if (__popc(odd) & 1) carry = ~carry;
  }
}

__global__ void __launch_bounds__(kThreads) rasterise(Polygons p) {
  extern __shared__ unsigned shared[];
  const int size = p.resolution, area = size * size;
  const int words = area / 32 + 1;  // a crossing may lie at `area`, just behind the last pixel
  unsigned *toggles = shared, *merged = shared + words;
  for (int i = threadIdx.x; i < 2 * words; i += kThreads) shared[i] = 0;
  __syncthreads();

  const int64_t roi = blockIdx.x;
  const int64_t object = p.object_index[roi];
  const float x1 = p.rois[4 * roi], y1 = p.rois[4 * roi + 1];
  const float w = p.rois[4 * roi + 2] - x1, h = p.rois[4 * roi + 3] - y1;
  const float width = w < 1.f ? 1.f : w, height = h < 1.f ? 1.f : h;

  int64_t polygon = 0, end = 0;
  if (object >= 0 && object < p.objects) {
    polygon = p.object_offsets[object];
    end = p.object_offsets[object + 1];
    if (polygon < 0 || end > p.polygons) end = polygon;  // malformed offsets: nothing is read
  }
  for (; polygon < end; ++polygon) {  // uniform over the block
    const int64_t from = p.poly_offsets[polygon], to = p.poly_offsets[polygon + 1];
    if (from < 0 || to > p.points || to - from < 3) continue;
    for (int64_t i = from + threadIdx.x; i < to; i += kThreads) {
      const float* a = p.coords + 2 * (i == from ? to - 1 : i - 1);
      const float* b = p.coords + 2 * i;
      for_each_crossing(
          roi_grid(a[0], x1, width, size), roi_grid(a[1], y1, height, size),
          roi_grid(b[0], x1, width, size), roi_grid(b[1], y1, height, size), size,
          [&](int position) { atomicXor(&toggles[position / 32], 1u << (position % 32)); });
    }
    __syncthreads();
    if (threadIdx.x < 32) fill_and_merge(toggles, merged, words);
    __syncthreads();
  }
  uint8_t* mask = p.masks + roi * area;
  for (int i = threadIdx.x; i < area; i += kThreads) {
    const int position = i % size * size + i / size;
    mask[i] = merged[position / 32] >> (position % 32) & 1u;
  }
}

}  // namespace

void polygons_to_masks(const Polygons& p, cudaStream_t stream) {
  const int words = p.resolution * p.resolution / 32 + 1;
  const size_t bytes = 2 * sizeof(unsigned) * words;  // 16 KiB at the largest resolution, 256
  rasterise<<<static_cast<unsigned>(p.num_rois), kThreads, bytes, stream>>>(p);
}

}  // namespace detectron::kernels
