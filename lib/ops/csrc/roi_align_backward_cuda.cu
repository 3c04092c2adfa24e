// The gradient of RoIAlign: gathered by pixel, in a fixed order, without atomics.
//
// The RoIs are listed by map (an image of a level), in their order. Then a block owns a tile of one map and
// 32 * V of its channels: it goes through the RoIs of its map, works out with which weights the rows and
// columns of cells of those that reach the tile read its rows and columns of pixels (the mean is
// separable), and adds up the cells' gradients, a warp a row of pixels, in registers. Every pixel is
// written once, also where it is zero. The pooled gradient is read channels last whatever the maps'
// layout. Half precision, channels last, is the work of roi_align_products_cuda.cu.
#include "kernels.h"
#include "roi_align_lists.h"

namespace detectron::kernels {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kRows = kWarps, kColumns = 4;  // of pixels, of a tile
constexpr int kBatch = 16;                   // RoIs weighed at a time

// ---- listing ------------------------------------------------------------------------------------

constexpr int kListThreads = 1024;

int64_t fours(const RoiAlign& p) { return (p.rois + 3) / 4; }

template <typename A>
Lists<A> lists_in(const RoiAlign& p, int64_t* scratch) {
  const int64_t slots = count_slots(p);
  auto* const ranges = reinterpret_cast<ListRange*>(scratch);
  auto* const boxes = reinterpret_cast<PixelBox*>(ranges + p.levels * p.images);
  auto* const listed = reinterpret_cast<ListedRoi<A>*>(boxes + slots);
  auto* const map_of = reinterpret_cast<int*>(listed + slots);
  auto* const marks = reinterpret_cast<unsigned*>(map_of + fours(p) * 4);
  return {ranges, boxes, listed, map_of, marks, slots};
}

// Pixels that the samples of an RoI may read on an axis: samples lie in the order of their numbers, or
// against it where the RoI is inverted.
template <typename A>
__device__ __forceinline__ PixelRange pixels_read(
    A start, A bin, A step, int grid, int cells, int size) {
  const A first = start + A(0.5) * step;
  const A last = (start + static_cast<A>(cells - 1) * bin) + (static_cast<A>(grid - 1) + A(0.5)) * step;
  const A low = first < last ? first : last, high = first < last ? last : first;
  if (grid <= 0 || size <= 0 || !(high >= A(-1)) || !(low <= static_cast<A>(size))) return {0, -1};
  const A end = static_cast<A>(size - 1);
  return {
      low > A(0) ? static_cast<int>(low < end ? low : end) : 0,
      high < end ? static_cast<int>(high > A(0) ? high : A(0)) + 1 : size - 1};
}

template <typename T>
__global__ void __launch_bounds__(kThreads) map_rois(RoiAlign p, int* map_of, int64_t count) {
  const int64_t roi = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (roi >= count) return;
  int64_t map = -1;
  if (roi < p.rois) {
    const Target<T> t = find_target<T>(p, roi);
    if (t.valid) map = t.level * p.images + t.g.image;
  }
  map_of[roi] = static_cast<int>(map);
}

template <typename T>
__device__ __forceinline__ void list_roi(
    const RoiAlign& p, const Lists<Acc<T>>& lists, int64_t roi, int64_t slot) {
  using A = Acc<T>;
  const Target<T> t = find_target<T>(p, roi);
  const RoiGeometry<A>& g = t.g;
  lists.listed[slot] = {roi,     g.start_h, g.bin_h,  g.step_h, g.start_w,
                        g.bin_w, g.step_w,  g.weight, g.grid_h, g.grid_w};
  lists.boxes[slot] = {
      pixels_read<A>(g.start_h, g.bin_h, g.step_h, g.grid_h, p.pooled_h, t.height),
      pixels_read<A>(g.start_w, g.bin_w, g.step_w, g.grid_w, p.pooled_w, t.width)};
}

// A block a map: its RoIs in their order. A thread looks at four RoIs at a time.
template <typename T>
__global__ void __launch_bounds__(kListThreads)
    list_rois(RoiAlign p, Lists<Acc<T>> lists, int64_t fours) {
  static_assert(kListThreads == 32 * 32);  // a warp adds up what all warps found
  __shared__ unsigned long long below;     // RoIs on maps before this one
  __shared__ int in_warp[2][32];
  const unsigned map = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto* const maps = reinterpret_cast<const int4*>(lists.map_of);
  if (threadIdx.x == 0) below = 0;
  __syncthreads();
  unsigned long long before = 0;
  for (int64_t i = threadIdx.x; i < fours; i += kListThreads) {
    const int4 m = maps[i];  // -1 is beyond all maps
    before += (static_cast<unsigned>(m.x) < map) + (static_cast<unsigned>(m.y) < map) +
        (static_cast<unsigned>(m.z) < map) + (static_cast<unsigned>(m.w) < map);
  }
  if (before > 0) atomicAdd(&below, before);
  __syncthreads();
  const int64_t begin = first_slot(map, static_cast<int64_t>(below));
  int64_t next = begin;
  int turn = 0;
  for (int64_t window = 0; window < fours; window += kListThreads, turn ^= 1) {
    const int64_t i = window + threadIdx.x;
    const int4 m = i < fours ? maps[i] : make_int4(-1, -1, -1, -1);
    const int map_of[4] = {m.x, m.y, m.z, m.w};
    int mine = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) mine += static_cast<unsigned>(map_of[k]) == map;
    const int through = running_sum(mine, lane);
    if (lane == 31) in_warp[turn][warp] = through;
    __syncthreads();  // once a turn: the next one writes the other half
    const int through_warps = running_sum(in_warp[turn][lane], lane);
    const int before_warp = __shfl_sync(kAllLanes, through_warps, warp) - in_warp[turn][warp];
    int64_t slot = next + before_warp + through - mine;
    next += __shfl_sync(kAllLanes, through_warps, 31);
    for (int k = 0; k < 4; ++k) {
      if (static_cast<unsigned>(map_of[k]) == map) list_roi<T>(p, lists, i * 4 + k, slot++);
    }
  }
  if (threadIdx.x == 0) lists.ranges[map] = {begin, next};
}

// ---- gathering ----------------------------------------------------------------------------------

// Cells [first, last).
struct Cells {
  int first, last;
};

// How the cells of an RoI read a tile.
struct Reach {
  int64_t roi;
  Cells rows[kRows];  // the rows of cells that read each row of pixels
  Cells columns;      // the columns of cells that read any of its columns of pixels
};

// In shared memory, of one RoI: the weights of its rows of cells on each row of pixels, likewise of its
// columns, and for each column of cells the columns of pixels that it reads, a bit each.
template <typename A>
struct Weights {
  A* rows;
  A* columns;
  unsigned* masks;

  static __host__ __device__ size_t bytes(int pooled_h, int pooled_w) {
    return sizeof(A) *
        (static_cast<size_t>(pooled_h) * kRows + static_cast<size_t>(pooled_w) * (kColumns + 1));
  }
  __device__ Weights(unsigned char* shared, int n, int pooled_h, int pooled_w) {
    rows = reinterpret_cast<A*>(shared + n * bytes(pooled_h, pooled_w));
    columns = rows + pooled_h * kRows;
    masks = reinterpret_cast<unsigned*>(columns + pooled_w * kColumns);
  }
};

// Sum of the weights with which the samples of cell `cell` read pixel `i` of an axis of `size` pixels.
template <typename A>
__device__ __forceinline__ A axis_weight(A start, A bin, A step, int grid, int cell, int i, int size) {
  A weight[1] = {};
  add_weights<A, 1>(start, bin, step, grid, cell, i, size, weight);
  return weight[0];
}

__device__ __forceinline__ void widen(Cells* cells, int from, unsigned lanes) {
  if (lanes == 0) return;
  if (cells->last == 0) cells->first = from + __ffs(lanes) - 1;
  cells->last = from + 32 - __clz(lanes);
}

// By a warp: the weights (cells, pixels) of both axes of an RoI on a tile, and the cells that have one.
template <typename A>
__device__ __forceinline__ void weigh(
    const RoiAlign& p, const ListedRoi<A>& r, int top, int left, int height, int width,
    Weights<A> weights, Reach* reach) {
  A *const rows = weights.rows, *const columns = weights.columns;
  const int lane = threadIdx.x % 32;
  for (int i = lane; i < p.pooled_h * kRows; i += 32) {
    const A weight = axis_weight<A>(
        r.start_h, r.bin_h, r.step_h, r.grid_h, i / kRows, top + i % kRows, height);
    rows[i] = r.weight * weight;
  }
  for (int i = lane; i < p.pooled_w * kColumns; i += 32) {
    columns[i] = axis_weight<A>(
        r.start_w, r.bin_w, r.step_w, r.grid_w, i / kColumns, left + i % kColumns, width);
  }
  __syncwarp();
  Cells mine{0, 0}, across{0, 0};
  for (int from = 0; from < p.pooled_h; from += 32) {
    const bool inside = from + lane < p.pooled_h;
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const bool reads = inside && rows[(from + lane) * kRows + k] != A(0);
      const unsigned lanes = __ballot_sync(kAllLanes, reads);
      if (lane == k) widen(&mine, from, lanes);
    }
  }
  for (int from = 0; from < p.pooled_w; from += 32) {
    unsigned mask = 0;
    if (from + lane < p.pooled_w) {
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        mask |= static_cast<unsigned>(columns[(from + lane) * kColumns + k] != A(0)) << k;
      }
      weights.masks[from + lane] = mask;
    }
    widen(&across, from, __ballot_sync(kAllLanes, mask != 0));
  }
  if (lane < kRows) reach->rows[lane] = mine;
  if (lane == 0) {
    reach->roi = r.roi;
    reach->columns = across;
  }
}

template <typename T, int V, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 4)
    gather(RoiAlign p, Lists<Acc<T>> lists, unsigned chunks, int batch) {
  using A = Acc<T>;
  constexpr int kAhead = 2;  // loads in flight of a thread
  extern __shared__ __align__(32) unsigned char shared[];
  __shared__ int64_t near[kThreads];  // positions of the listed RoIs that may reach the tile
  __shared__ Reach reaches[kBatch];
  __shared__ int in_warp[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const Tile tile = find_tile<kRows, kColumns>(p, chunks);
  const int level = tile.level, top = tile.top, left = tile.left;
  const int height = tile.height, width = tile.width;
  const int64_t image = tile.image;
  const int64_t channel = (static_cast<int64_t>(tile.chunk) * 32 + lane) * V;
  const bool active = channel < p.channels;
  const T* const pooled = static_cast<const T*>(p.pooled) + (active ? channel : 0);

  A sum[kColumns][V] = {};
  const ListRange range = lists.ranges[level * p.images + image];
  for (int64_t window = range.begin; window < range.end; window += kThreads) {
    const int64_t i = window + threadIdx.x;
    const bool hit = i < range.end && lists.boxes[i].meets(top, left, kRows, kColumns);
    const unsigned hits = __ballot_sync(kAllLanes, hit);
    if (lane == 0) in_warp[warp] = __popc(hits);
    __syncthreads();
    int count = 0, place = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) place = count;
      count += in_warp[w];
    }
    if (hit) near[place + __popc(hits & ((1u << lane) - 1))] = i;
    __syncthreads();

    for (int from = 0; from < count; from += batch) {
      const int now = count - from < batch ? count - from : batch;
      for (int n = warp; n < now; n += kWarps) {
        weigh<A>(
            p, lists.listed[near[from + n]], top, left, height, width,
            Weights<A>(shared, n, p.pooled_h, p.pooled_w), &reaches[n]);
      }
      __syncthreads();
      for (int n = 0; n < now; ++n) {
        const Cells ys = reaches[n].rows[warp], xs = reaches[n].columns;
        const Weights<A> weights(shared, n, p.pooled_h, p.pooled_w);
        const T* line = pooled +
            ((reaches[n].roi * p.pooled_h + ys.first) * p.pooled_w + xs.first) * p.channels;
        for (int y = ys.first; y < ys.last; ++y, line += p.pooled_w * p.channels) {
          const A row_weight = weights.rows[y * kRows + warp];
          const T* cell = line;
          for (int x = xs.first; x < xs.last; x += kAhead) {
            Packed<T, V> value[kAhead];
#pragma unroll
            for (int u = 0; u < kAhead; ++u, cell += p.channels) {
              if (x + u < xs.last) value[u].load(cell);
            }
#pragma unroll
            for (int u = 0; u < kAhead; ++u) {
              if (x + u >= xs.last) break;
              const unsigned mask = weights.masks[x + u];
              const A* const column = weights.columns + (x + u) * kColumns;
              A part[V];
              value[u].expand(part);
#pragma unroll
              for (int c = 0; c < kColumns; ++c) {
                if (!(mask >> c & 1)) continue;
                const A weight = row_weight * column[c];
#pragma unroll
                for (int k = 0; k < V; ++k) sum[c][k] = fma(weight, part[k], sum[c][k]);
              }
            }
          }
        }
      }
      __syncthreads();  // the weights, and in the end `near`, are used up
    }
  }

  const int y = top + warp;
  T* const out = static_cast<T*>(p.maps[level]) + image * p.channels * height * width;
  if (kChannelsLast) {
    if (y >= height || !active) return;
    T* pixel = out + (static_cast<int64_t>(y) * width + left) * p.channels + channel;
#pragma unroll
    for (int c = 0; c < kColumns; ++c, pixel += p.channels) {
      if (left + c >= width) break;
      Vector<T, V> result;
#pragma unroll
      for (int k = 0; k < V; ++k) result.v[k] = from_acc<T>(sum[c][k]);
      *reinterpret_cast<Vector<T, V>*>(pixel) = result;
    }
    return;
  }
  // NCHW: turned around in shared memory, so that neighbouring lanes write neighbouring pixels.
  T* const turned = reinterpret_cast<T*>(shared) + warp * 32 * V * kColumns;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int k = 0; k < V; ++k) turned[(lane * V + k) * kColumns + c] = from_acc<T>(sum[c][k]);
  }
  __syncwarp();
  const int x = left + lane % kColumns;
  if (y >= height || x >= width) return;
  const int64_t first = channel - lane * V;
  for (int k = lane / kColumns; k < 32 * V && first + k < p.channels; k += 32 / kColumns) {
    out[((first + k) * height + y) * width + x] = turned[k * kColumns + lane % kColumns];
  }
}

// ---- launching ----------------------------------------------------------------------------------

constexpr size_t kSharedBytes = 40 << 10;

template <typename T, int V, bool kChannelsLast>
void launch_gather(const RoiAlign& p, const Lists<Acc<T>>& lists, cudaStream_t stream) {
  const int64_t chunks = (p.channels + 32 * V - 1) / (32 * V);
  const int64_t blocks = count_tiles<kRows, kColumns>(p, chunks);
  if (blocks == 0) return;
  const size_t each = Weights<Acc<T>>::bytes(p.pooled_h, p.pooled_w);
  const size_t fit = kSharedBytes / each;
  const int batch = static_cast<int>(fit < kBatch ? fit : kBatch);
  const size_t turned = kChannelsLast ? 0 : sizeof(T) * kThreads * V * kColumns;
  const size_t bytes = batch * each > turned ? batch * each : turned;
  gather<T, V, kChannelsLast>
      <<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(
          p, lists, static_cast<unsigned>(chunks), batch);
}

template <typename T>
void launch(const RoiAlign& p, int64_t* scratch, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const Lists<Acc<T>> lists = lists_in<Acc<T>>(p, scratch);
  const int64_t maps = p.levels * p.images;
  if (maps == 0) return;
  if (p.rois > 0) {
    const int64_t count = fours(p) * 4;
    const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
    map_rois<T><<<blocks, kThreads, 0, stream>>>(p, lists.map_of, count);
  }
  list_rois<T><<<static_cast<unsigned>(maps), kListThreads, 0, stream>>>(p, lists, fours(p));
  bool fit = p.channels % kVector == 0 && aligned_to(p.pooled, 16);
  for (int l = 0; l < p.levels && p.channels_last; ++l) fit = fit && aligned_to(p.maps[l], 16);
  if constexpr (sizeof(T) == 2) {
    if (p.channels_last && fit && roi_align_products(p, lists, stream)) return;
  }
  if (p.channels_last) {
    fit ? launch_gather<T, kVector, true>(p, lists, stream)
        : launch_gather<T, 1, true>(p, lists, stream);
  } else {
    fit ? launch_gather<T, kVector, false>(p, lists, stream)
        : launch_gather<T, 1, false>(p, lists, stream);
  }
}

}  // namespace

int64_t roi_align_scratch(const RoiAlign& p) {
  constexpr int64_t kLong = sizeof(int64_t);
  constexpr int64_t kMap = sizeof(ListRange) / kLong;
  constexpr int64_t kSlot = (sizeof(PixelBox) + sizeof(ListedRoi<double>)) / kLong;
  return kMap * p.levels * p.images + kSlot * count_slots(p) + fours(p) * 2 +
      (roi_align_marks(p) + 1) / 2;
}

bool roi_align_fits(const RoiAlign& p) {
  return Weights<double>::bytes(p.pooled_h, p.pooled_w) <= kSharedBytes;
}

void roi_align_backward(const RoiAlign& p, int64_t* scratch, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::f32: return launch<float>(p, scratch, stream);
    case DType::f64: return launch<double>(p, scratch, stream);
    case DType::f16: return launch<__half>(p, scratch, stream);
    case DType::bf16: return launch<__nv_bfloat16>(p, scratch, stream);
  }
}

}  // namespace detectron::kernels
