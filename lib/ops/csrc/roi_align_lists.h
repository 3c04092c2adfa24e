// What the kernels of RoIAlign's gradient share: the RoIs of each map, the tiles of the maps, and the
// weights with which cells read pixels. Included by .cu files only.
#pragma once

#include "roi_align_device.h"

namespace detectron::kernels {

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename A>
struct alignas(16) ListedRoi {
  int64_t roi;
  A start_h, bin_h, step_h, start_w, bin_w, step_w, weight;  // as in RoiGeometry
  int grid_h, grid_w;
};

// Pixels [first, last] of an axis: none where last < first.
struct PixelRange {
  int first, last;

  __device__ __forceinline__ bool meets(int begin, int count) const {
    return (last >= begin) & (first < begin + count);
  }
};

struct alignas(16) PixelBox {
  PixelRange ys, xs;

  // Without branches, so that the box is loaded as a whole.
  __device__ __forceinline__ bool meets(int top, int left, int rows, int columns) const {
    return ys.meets(top, rows) & xs.meets(left, columns);
  }
};

struct alignas(16) ListRange {
  int64_t begin, end;
};

// What lies in the scratch, in this order. The RoIs of a map begin at a multiple of 32, so that some of
// the `slots` are empty.
template <typename A>
struct Lists {
  ListRange* ranges;     // (levels * images,): the slots of a map
  PixelBox* boxes;       // (slots,): what the samples of an RoI read lies in it
  ListedRoi<A>* listed;  // (slots,): by map, then in their order
  int* map_of;           // (rois, and more up to a multiple of 4): -1 for none, without gradient
  unsigned* marks;       // (roi_align_marks(),): used by roi_align_products, which says what they are
  int64_t slots;
};

// The slots of a map, where `before` RoIs are on maps before it.
__device__ __forceinline__ int64_t first_slot(int64_t map, int64_t before) {
  return (before + 31) / 32 * 32 + 32 * map;
}

inline int64_t count_slots(const RoiAlign& p) {
  return (p.rois + 31) / 32 * 32 + 32 * p.levels * p.images;
}

// Writes roi_align_backward's maps by tensor cores: half types, channels last, 16-byte vectors. False,
// and nothing done, where the GPU or what it was compiled for has no such products.
bool roi_align_products(const RoiAlign& p, const Lists<float>& lists, cudaStream_t stream);
int64_t roi_align_marks(const RoiAlign& p);

// Sums of the lanes' values up to each lane.
__device__ __forceinline__ int running_sum(int value, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

// ---- tiles --------------------------------------------------------------------------------------

struct Tile {
  int level, top, left, height, width;  // the last two of the level's maps
  int64_t image;
  unsigned chunk;  // of the channels
};

template <int kTileRows, int kTileColumns>
int64_t count_tiles(const RoiAlign& p, int64_t chunks) {
  int64_t tiles = 0;
  for (int l = 0; l < p.levels; ++l) {
    const int64_t down = (p.heights[l] + kTileRows - 1) / kTileRows;
    tiles += down * ((p.widths[l] + kTileColumns - 1) / kTileColumns);
  }
  return tiles * p.images * chunks;
}

// The tile of this block. The coarsest level comes first: its tiles have the most RoIs.
template <int kTileRows, int kTileColumns>
__device__ __forceinline__ Tile find_tile(const RoiAlign& p, unsigned chunks) {
  unsigned block = blockIdx.x, tiles = 0, across = 1;
  const unsigned stack = static_cast<unsigned>(p.images) * chunks;
  int level = p.levels;
  while (level-- > 0) {
    across = (p.widths[level] + kTileColumns - 1) / kTileColumns;
    tiles = (p.heights[level] + kTileRows - 1) / kTileRows * across;
    if (block < tiles * stack) break;
    block -= tiles * stack;
  }
  Tile t;
  t.level = level;
  t.chunk = block % chunks;
  block /= chunks;
  t.image = block / tiles;
  const unsigned tile = block % tiles;
  t.top = tile / across * kTileRows;
  t.left = tile % across * kTileColumns;
  t.height = p.heights[level];
  t.width = p.widths[level];
  return t;
}

// ---- weights ------------------------------------------------------------------------------------

// Adds the weights with which the samples of cell `cell` read the N pixels from `pixel` on of an axis of
// `size` pixels.
template <typename A, int N>
__device__ __forceinline__ void add_weights(
    A start, A bin, A step, int grid, int cell, int pixel, int size, A (&weights)[N]) {
  const A origin = start + static_cast<A>(cell) * bin;
  int first, last;
  sample_range<A>(
      origin, step, grid, static_cast<A>(pixel - 1), static_cast<A>(pixel + N), &first, &last);
  for (int k = first; k < last; ++k) {
    const auto s = axis_sample<A>(origin + (static_cast<A>(k) + A(0.5)) * step, size);
    if (!s.inside) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (s.low == pixel + i) weights[i] += s.weight_low;
      if (s.high == pixel + i && s.high != s.low) weights[i] += s.weight_high;
    }
  }
}

}  // namespace detectron::kernels
