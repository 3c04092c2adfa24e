// The gradient of RoIAlign in half precision, by tensor cores.
//
// First each row and each column of tiles of a map marks the RoIs that reach it, a bit each: one that both
// have marked reaches the tile. Then a warp owns a tile of 4x4 pixels and 256 channels, and all that it
// needs: no barriers. It strings together the cells of the RoIs that reach the tile, and adds
//     gradient[pixel, channel] += weight[pixel, cell] * pooled[cell, channel]
// sixteen cells a time, in float registers, in the order of the RoIs. A weight is split in two halves of
// the type, whose sum is the float weight to 2^-17 (bfloat16) or better.
//
// Which channel is which column of a product is free, and is chosen so that a lane loads and stores 16
// bytes of one cell or pixel at a time, with nothing to exchange between lanes.
//
// A product spreads a value that is not finite over its tile, as 0 * inf is NaN. So where a sum is not
// finite, the tile is summed again cell by cell, each into just the pixels that it has weights for.
#include <type_traits>

#include "kernels.h"
#include "roi_align_lists.h"

namespace detectron::kernels {
namespace {

constexpr int kSide = 4;             // pixels, of a warp's tile
constexpr int kDepth = 16;           // cells, of a product
constexpr int kStaged = 32;          // cells prepared at a time, a lane each
constexpr int kPitch = kStaged + 8;  // keeps what a warp reads at a time in different banks
constexpr int kGroup = 64;           // channels: eight lanes of 8, or eight products of 8
constexpr int kGroups = 4;           // of a warp
constexpr int kWarps = 4, kWarpsAcross = 2;
constexpr int kBlockRows = kWarps / kWarpsAcross * kSide, kBlockColumns = kWarpsAcross * kSide;
constexpr int kBlocks = 2;        // a multiprocessor
constexpr int kLooked = 32 * 32;  // slots looked at at a time: 32 marks of each lane
constexpr int kMarking = 8;       // blocks that mark the RoIs of a map

// float16 has few bits left for small numbers; weights are at most 1.
template <typename T>
constexpr float kScale = std::is_same_v<T, __half> ? 4096.f : 1.f;

// What a warp keeps in shared memory.
template <typename T>
struct alignas(16) Stage {
  const T* cells[kStaged];       // from the warp's first channel on
  float rows[kSide][kPitch];     // weights on the tile's rows of pixels, of each cell
  float columns[kSide][kPitch];  // likewise on its columns
  uint16_t near[kLooked];        // those of the slots looked at that reach the tile
};

// Channel group, product, and as the hardware lays out a product: (pixel, column), (pixel, column + 1),
// (pixel + 8, column), (pixel + 8, column + 1).
using Sums = float[kGroups][8][4];

__device__ __forceinline__ int64_t first_channel(const Tile& tile) {
  return static_cast<int64_t>(tile.chunk) * (kGroups * kGroup);
}

// ---- products -----------------------------------------------------------------------------------

__device__ __forceinline__ void multiply_add(
    float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], __nv_bfloat16) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

__device__ __forceinline__ void multiply_add(
    float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2], __half) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

template <typename T>
__device__ __forceinline__ unsigned pack(T low, T high) {
  const Vector<T, 2> pair{low, high};
  return *reinterpret_cast<const unsigned*>(&pair);
}

// Two weights as pairs of halves: the first halves in one register, what is left of them in another.
template <typename T>
__device__ __forceinline__ void split(float low, float high, unsigned* halves, unsigned* rests) {
  const T low_half = from_acc<T>(low), high_half = from_acc<T>(high);
  *halves = pack(low_half, high_half);
  *rests = pack(from_acc<T>(low - to_acc(low_half)), from_acc<T>(high - to_acc(high_half)));
}

__device__ __forceinline__ unsigned word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Which 8 channels of a group a lane loads as its column of the products, so that it then holds sums of
// 8 and another 8 channels in a row: those of `stored_vector`.
__device__ __forceinline__ int loaded_vector(int lane) {
  const int column = lane / 4;
  return column % 2 * 4 + column / 2;
}
__device__ __forceinline__ int stored_vector(int lane, int which) { return which * 4 + lane % 4; }

// Adds kDepth staged cells from `from` on. `channels` are those from the warp's first on.
template <typename T>
__device__ __forceinline__ void add_products(
    const Stage<T>& stage, int from, int channels, int lane, Sums& sums) {
  const int pixel = lane / 4;
  const int k = from + lane % 4 * 2;  // the lane's cells: k, k + 1, k + 8, k + 9
  const int vector = loaded_vector(lane) * 8;
  uint4 value[kGroups][4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const T* const cell = stage.cells[k + c / 2 * 8 + c % 2] + vector;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      value[j][c] = make_uint4(0, 0, 0, 0);
      if (j * kGroup + vector < channels) {
        value[j][c] = __ldg(reinterpret_cast<const uint4*>(cell + j * kGroup));
      }
    }
  }
  unsigned halves[4], rests[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // (pixel, k), (pixel + 8, k), (pixel, k + 8), (pixel + 8, k + 8)
    const int at = k + i / 2 * 8;
    const float* const row = &stage.rows[pixel / kSide + i % 2 * 2][at];
    const float* const column = &stage.columns[pixel % kSide][at];
    split<T>(row[0] * column[0], row[1] * column[1], &halves[i], &rests[i]);
  }
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    if (j * kGroup >= channels) break;
    unsigned b[8][2];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int order = e % 2 ? 0x7632 : 0x5410;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const uint4 &low = value[j][2 * c], &high = value[j][2 * c + 1];
        b[e][c] = __byte_perm(word_of(low, e / 2), word_of(high, e / 2), order);
      }
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) multiply_add(sums[j][e], rests, b[e], T());
#pragma unroll
    for (int e = 0; e < 8; ++e) multiply_add(sums[j][e], halves, b[e], T());
  }
}

// The same sums, of `count` staged cells, without what has no weight.
template <typename T>
__device__ __forceinline__ void add_plainly(
    const Stage<T>& stage, int count, int channels, int lane, Sums& sums) {
  const int pixel = lane / 4;
  for (int k = 0; k < count; ++k) {
    const float column = stage.columns[pixel % kSide][k];
    const float weight[2] = {
        stage.rows[pixel / kSide][k] * column, stage.rows[pixel / kSide + 2][k] * column};
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const int channel = j * kGroup + stored_vector(lane, which) * 8;
        if (channel >= channels) continue;
        Packed<T, 8> value;
        value.load(stage.cells[k] + channel);
        float part[8];
        value.expand(part);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (weight[half] == 0.f) continue;
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            float& sum = sums[j][e][half * 2 + which];
            sum = fmaf(weight[half], part[e], sum);
          }
        }
      }
    }
  }
}

// ---- marking ------------------------------------------------------------------------------------

HOST_DEVICE int tiles_along(int size) { return (size + kSide - 1) / kSide; }

// marks[t][slot / 32] bit slot % 32: the RoI may reach the row of tiles t, or the column t - tiles down.
__global__ void __launch_bounds__(kThreads) mark_rois(RoiAlign p, Lists<float> lists) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t map = blockIdx.x;
  const int level = static_cast<int>(map / p.images);
  const int down = tiles_along(p.heights[level]), both = down + tiles_along(p.widths[level]);
  const ListRange range = lists.ranges[map];
  for (int64_t first = range.begin + warp * 32; first < range.end; first += kThreads) {
    PixelBox box{{0, -1}, {0, -1}};
    if (first + lane < range.end) box = lists.boxes[first + lane];
    unsigned* const marks = lists.marks + first / 32;
    for (int t = blockIdx.y; t < both; t += kMarking) {
      const bool reaches = t < down ? box.ys.meets(t * kSide, kSide)
                                    : box.xs.meets((t - down) * kSide, kSide);
      const unsigned lanes = __ballot_sync(kAllLanes, reaches);
      if (lane == 0) marks[t * (lists.slots / 32)] = lanes;
    }
  }
}

// ---- the cells of a tile ------------------------------------------------------------------------

// Cells [first, first + count) of an axis may read its kSide pixels from `pixel` on.
struct CellRange {
  int first, count;
};

__device__ __forceinline__ CellRange cells_reaching(
    float start, float bin, float step, int grid, int cells, int pixel) {
  if (!(bin > 0.f)) return {0, cells};  // inverted: rare
  const float low = static_cast<float>(pixel - 1), high = static_cast<float>(pixel + kSide);
  const float to_first = 0.5f * step, to_last = (static_cast<float>(grid - 1) + 0.5f) * step;
  const float most = static_cast<float>(cells);
  // Estimates, then moved to where they belong; samples lie in the order of their cells.
  int first = static_cast<int>(fminf(fmaxf(__fdividef(low - start, bin), 0.f), most));
  while (first > 0 && (start + static_cast<float>(first - 1) * bin) + to_last >= low) --first;
  while (first < cells && (start + static_cast<float>(first) * bin) + to_last < low) ++first;
  int end = static_cast<int>(fminf(fmaxf(__fdividef(high - start, bin), 0.f), most));
  while (end > 0 && (start + static_cast<float>(end - 1) * bin) + to_first > high) --end;
  while (end < cells && (start + static_cast<float>(end) * bin) + to_first <= high) ++end;
  return {first, end > first ? end - first : 0};
}

// Adds the cells of up to 32 RoIs, a lane each: of the lane's slot, or none where it is negative.
template <typename T, bool kPlain>
__device__ __forceinline__ void add_rois(
    const RoiAlign& p, const Lists<float>& lists, const Tile& tile, int channels, int64_t slot,
    int lane, Stage<T>* stage, Sums& sums) {
  CellRange ys{0, 0}, xs{0, 0};
  if (slot >= 0) {
    const ListedRoi<float> r = lists.listed[slot];
    ys = cells_reaching(r.start_h, r.bin_h, r.step_h, r.grid_h, p.pooled_h, tile.top);
    xs = cells_reaching(r.start_w, r.bin_w, r.step_w, r.grid_w, p.pooled_w, tile.left);
  }
  const int cells = ys.count * xs.count;
  const int through = running_sum(cells, lane);  // cells of the RoIs up to the lane's
  const int total = __shfl_sync(kAllLanes, through, 31);
  for (int from = 0; from < total; from += kStaged) {
    // The lane's cell; those past the last repeat it without weight.
    const int i = from + lane < total ? from + lane : total - 1;
    int owner = 0;  // the lane of its RoI
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      if (i >= __shfl_sync(kAllLanes, through, owner + step - 1)) owner += step;
    }
    const int within = i - __shfl_sync(kAllLanes, through - cells, owner);
    const int across = __shfl_sync(kAllLanes, xs.count, owner);
    const int y = __shfl_sync(kAllLanes, ys.first, owner) + within / across;
    const int x = __shfl_sync(kAllLanes, xs.first, owner) + within % across;
    const ListedRoi<float> r = lists.listed[__shfl_sync(kAllLanes, slot, owner)];
    float rows[kSide] = {}, columns[kSide] = {};
    add_weights<float, kSide>(
        r.start_h, r.bin_h, r.step_h, r.grid_h, y, tile.top, tile.height, rows);
    add_weights<float, kSide>(
        r.start_w, r.bin_w, r.step_w, r.grid_w, x, tile.left, tile.width, columns);
    const float factor = from + lane < total ? r.weight * kScale<T> : 0.f;
    __syncwarp();  // what was staged before is used up
#pragma unroll
    for (int k = 0; k < kSide; ++k) {
      stage->rows[k][lane] = factor * rows[k];
      stage->columns[k][lane] = columns[k];
    }
    stage->cells[lane] = static_cast<const T*>(p.pooled) +
        ((r.roi * p.pooled_h + y) * p.pooled_w + x) * p.channels + first_channel(tile);
    __syncwarp();
    const int now = total - from < kStaged ? total - from : kStaged;
    if (kPlain) {
      add_plainly<T>(*stage, now, channels, lane, sums);
    } else {
      for (int k = 0; k < now; k += kDepth) {
        add_products<T>(*stage, k, channels, lane, sums);
      }
    }
  }
}

// Adds up the tile; false where nothing reaches it.
template <typename T, bool kPlain>
__device__ __forceinline__ bool add_tile(
    const RoiAlign& p, const Lists<float>& lists, const Tile& tile, int channels, int lane,
    Stage<T>* stage, Sums& sums) {
  const ListRange range = lists.ranges[tile.level * p.images + tile.image];
  const int64_t words = lists.slots / 32;
  const unsigned* const by_row = lists.marks + tile.top / kSide * words;
  const unsigned* const by_column =
      lists.marks + (tiles_along(tile.height) + tile.left / kSide) * words;
  bool any = false;
  for (int64_t first = range.begin; first < range.end; first += kLooked) {
    const int64_t word = first / 32 + lane;
    unsigned hits = word * 32 < range.end ? by_row[word] & by_column[word] : 0;
    const int through = running_sum(__popc(hits), lane);
    const int total = __shfl_sync(kAllLanes, through, 31);
    if (total == 0) continue;
    any = true;
    for (int i = through - __popc(hits); hits != 0; hits &= hits - 1) {
      stage->near[i++] = static_cast<uint16_t>(lane * 32 + __ffs(hits) - 1);
    }
    __syncwarp();
    for (int from = 0; from < total; from += 32) {
      const int64_t slot = from + lane < total ? first + stage->near[from + lane] : -1;
      add_rois<T, kPlain>(p, lists, tile, channels, slot, lane, stage, sums);
    }
    __syncwarp();  // `near` is used up
  }
  return any;
}

template <typename T>
__global__ void __launch_bounds__(32 * kWarps, kBlocks)
    gather_products(RoiAlign p, Lists<float> lists, unsigned chunks) {
  __shared__ Stage<T> stages[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Tile tile = find_tile<kBlockRows, kBlockColumns>(p, chunks);
  tile.top += warp / kWarpsAcross * kSide;
  tile.left += warp % kWarpsAcross * kSide;
  if (tile.top >= tile.height || tile.left >= tile.width) return;
  const int64_t left_over = p.channels - first_channel(tile);
  const int channels = left_over < kGroups * kGroup ? static_cast<int>(left_over) : kGroups * kGroup;

  Sums sums = {};
  if (add_tile<T, false>(p, lists, tile, channels, lane, &stages[warp], sums)) {
    float zero = 0;
#pragma unroll
    for (int i = 0; i < kGroups * 8 * 4; ++i) {
      zero = fmaf(sums[i / 32][i / 4 % 8][i % 4], 0.f, zero);
    }
    if (__any_sync(kAllLanes, zero != 0.f)) {  // NaN
#pragma unroll
      for (int i = 0; i < kGroups * 8 * 4; ++i) sums[i / 32][i / 4 % 8][i % 4] = 0;
      add_tile<T, true>(p, lists, tile, channels, lane, &stages[warp], sums);
    }
  }

  T* const map = static_cast<T*>(p.maps[tile.level]) +
      tile.image * p.channels * tile.height * tile.width + first_channel(tile);
  const int x = tile.left + lane / 4 % kSide;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int y = tile.top + lane / 4 / kSide + half * 2;
    if (y >= tile.height || x >= tile.width) continue;
    T* const pixel = map + (static_cast<int64_t>(y) * tile.width + x) * p.channels;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const int channel = j * kGroup + stored_vector(lane, which) * 8;
        if (channel >= channels) continue;
        float result[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) result[e] = sums[j][e][half * 2 + which] * (1.f / kScale<T>);
        Packed<T, 8> packed;
        packed.pack(result);
        packed.store(pixel + channel);
      }
    }
  }
}

template <typename T>
bool launch(const RoiAlign& p, const Lists<float>& lists, cudaStream_t stream) {
  cudaFuncAttributes code{};
  if (cudaFuncGetAttributes(&code, gather_products<T>) != cudaSuccess || code.ptxVersion < 80) {
    return false;
  }
  const int64_t chunks = (p.channels + kGroups * kGroup - 1) / (kGroups * kGroup);
  const int64_t blocks = count_tiles<kBlockRows, kBlockColumns>(p, chunks);
  if (blocks == 0) return true;
  if (p.rois > 0) {
    const dim3 grid(static_cast<unsigned>(p.levels * p.images), kMarking);
    mark_rois<<<grid, kThreads, 0, stream>>>(p, lists);
  }
  gather_products<T><<<static_cast<unsigned>(blocks), 32 * kWarps, 0, stream>>>(
      p, lists, static_cast<unsigned>(chunks));
  return true;
}

}  // namespace

int64_t roi_align_marks(const RoiAlign& p) {
  if (!p.channels_last || (p.dtype != DType::f16 && p.dtype != DType::bf16)) return 0;
  int64_t most = 0;
  for (int l = 0; l < p.levels; ++l) {
    const int64_t both = tiles_along(p.heights[l]) + tiles_along(p.widths[l]);
    most = both > most ? both : most;
  }
  return most * (count_slots(p) / 32);
}

bool roi_align_products(const RoiAlign& p, const Lists<float>& lists, cudaStream_t stream) {
  return p.dtype == DType::f16 ? launch<__half>(p, lists, stream)
                               : launch<__nv_bfloat16>(p, lists, stream);
}

}  // namespace detectron::kernels
