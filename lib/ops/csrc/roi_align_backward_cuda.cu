// The gradient of RoIAlign: gathered by pixel, in a fixed order, without atomics.
//
// The RoIs are listed by map (an image of a level), in their order. Then a block owns a tile of one map and
// 32 * V of its channels: it goes through the RoIs of its map, works out with which weights the rows and
// columns of cells of those that reach the tile read its rows and columns of pixels (the mean is
// separable), and adds up the cells' gradients, a warp a row of pixels, in registers. Every pixel is
// written once, also where it is zero. The pooled gradient is read channels last whatever the maps'
// layout.
#include "kernels.h"
#include "roi_align_device.h"

namespace detectron::kernels {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kRows = kWarps, kColumns = 4;  // of pixels, of a tile
constexpr int kBatch = 16;                   // RoIs weighed at a time
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- listing ------------------------------------------------------------------------------------

template <typename A>
struct ListedRoi {
  int64_t roi;
  A start_h, bin_h, step_h, start_w, bin_w, step_w, weight;  // as in RoiGeometry
  int grid_h, grid_w;
  float top, bottom, left, right;  // feature pixels that its samples may read: generous
};

// What lies in the scratch, in this order.
template <typename A>
struct Lists {
  int64_t* counts;  // (levels * images,): RoIs of a map
  int64_t* begins;  // (levels * images,): where its RoIs begin
  int64_t* map_of;  // (rois,): -1 for an RoI without gradient
  ListedRoi<A>* listed;
};

template <typename A>
Lists<A> lists_in(const RoiAlign& p, int64_t* scratch) {
  const int64_t maps = p.levels * p.images;
  int64_t* const map_of = scratch + 2 * maps;
  return {scratch, scratch + maps, map_of, reinterpret_cast<ListedRoi<A>*>(map_of + p.rois)};
}

template <typename T>
__global__ void __launch_bounds__(kThreads) count_rois(RoiAlign p, Lists<Acc<T>> lists) {
  const int64_t roi = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (roi >= p.rois) return;
  const Target<T> t = find_target<T>(p, roi);
  const int64_t level = p.roi_levels ? p.roi_levels[roi] : 0;
  const int64_t map = t.valid ? level * p.images + t.g.image : -1;
  lists.map_of[roi] = map;
  if (map >= 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(lists.counts + map), 1ull);
  }
}

template <typename A>
__device__ __forceinline__ void extent(A start, A size, float* low, float* high) {
  const A end = start + size;
  *low = static_cast<float>(start < end ? start : end) - 2.f;
  *high = static_cast<float>(start < end ? end : start) + 2.f;
}

template <typename T>
__device__ __forceinline__ ListedRoi<Acc<T>> entry_of(const RoiAlign& p, int64_t roi) {
  using A = Acc<T>;
  const RoiGeometry<A> g = find_target<T>(p, roi).g;
  ListedRoi<A> r{roi,      g.start_h, g.bin_h,  g.step_h, g.start_w,
                 g.bin_w,  g.step_w,  g.weight, g.grid_h, g.grid_w};
  extent<A>(g.start_h, g.bin_h * static_cast<A>(p.pooled_h), &r.top, &r.bottom);
  extent<A>(g.start_w, g.bin_w * static_cast<A>(p.pooled_w), &r.left, &r.right);
  return r;
}

// A block a map: its RoIs in their order.
template <typename T>
__global__ void __launch_bounds__(kThreads) list_rois(RoiAlign p, Lists<Acc<T>> lists) {
  __shared__ unsigned long long begin;
  __shared__ int in_warp[kWarps];
  const int64_t map = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) begin = 0;
  __syncthreads();
  int64_t before = 0;
  for (int64_t m = threadIdx.x; m < map; m += kThreads) before += lists.counts[m];
  if (before > 0) atomicAdd(&begin, static_cast<unsigned long long>(before));
  __syncthreads();
  int64_t next = static_cast<int64_t>(begin);
  const int64_t end = next + lists.counts[map];
  if (threadIdx.x == 0) lists.begins[map] = next;
  for (int64_t window = 0; window < p.rois && next < end; window += kThreads) {
    const int64_t roi = window + threadIdx.x;
    const bool mine = roi < p.rois && lists.map_of[roi] == map;
    const unsigned lanes = __ballot_sync(kAllLanes, mine);
    if (lane == 0) in_warp[warp] = __popc(lanes);
    __syncthreads();
    int64_t place = next;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) place += in_warp[w];
      next += in_warp[w];
    }
    if (mine) lists.listed[place + __popc(lanes & ((1u << lane) - 1))] = entry_of<T>(p, roi);
    __syncthreads();  // in_warp is read
  }
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

// Sum of the weights with which the samples of cell `cell` read index `i` of an axis of `size` pixels.
template <typename A>
__device__ __forceinline__ A axis_weight(A start, A bin, A step, int grid, int cell, int i, int size) {
  const A origin = start + static_cast<A>(cell) * bin;
  int first, last;
  sample_range<A>(
      origin, step, grid, static_cast<A>(i - 1), static_cast<A>(i + 1), &first, &last);
  A weight = 0;
  for (int k = first; k < last; ++k) {
    const auto s = axis_sample<A>(origin + (static_cast<A>(k) + A(0.5)) * step, size);
    if (!s.inside) continue;
    if (s.low == i) weight += s.weight_low;
    if (s.high == i && s.high != s.low) weight += s.weight_high;
  }
  return weight;
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

  // The coarsest level comes first: its tiles have the most RoIs.
  unsigned block = blockIdx.x, tiles = 0, tiles_x = 1;
  const unsigned stack = static_cast<unsigned>(p.images) * chunks;
  int level = p.levels;
  while (level-- > 0) {
    tiles_x = (p.widths[level] + kColumns - 1) / kColumns;
    tiles = (p.heights[level] + kRows - 1) / kRows * tiles_x;
    if (block < tiles * stack) break;
    block -= tiles * stack;
  }
  const unsigned chunk = block % chunks;
  block /= chunks;
  const int64_t image = block / tiles;
  const unsigned tile = block % tiles;
  const int top = tile / tiles_x * kRows, left = tile % tiles_x * kColumns;
  const int height = p.heights[level], width = p.widths[level];
  const int64_t channel = (static_cast<int64_t>(chunk) * 32 + lane) * V;
  const bool active = channel < p.channels;
  const T* const pooled = static_cast<const T*>(p.pooled) + (active ? channel : 0);

  A sum[kColumns][V] = {};
  const int64_t map = level * p.images + image;
  const int64_t begin = lists.begins[map], end = begin + lists.counts[map];
  for (int64_t window = begin; window < end; window += kThreads) {
    const int64_t i = window + threadIdx.x;
    bool hit = false;
    if (i < end) {
      const ListedRoi<A>& r = lists.listed[i];
      hit = r.bottom >= static_cast<float>(top) && r.top <= static_cast<float>(top + kRows) &&
          r.right >= static_cast<float>(left) && r.left <= static_cast<float>(left + kColumns);
    }
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
  int64_t blocks = 0;
  for (int l = 0; l < p.levels; ++l) {
    const int64_t tiles_y = (p.heights[l] + kRows - 1) / kRows;
    blocks += tiles_y * ((p.widths[l] + kColumns - 1) / kColumns) * p.images * chunks;
  }
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
  cudaMemsetAsync(lists.counts, 0, sizeof(int64_t) * maps, stream);
  if (p.rois > 0) {
    const auto blocks = static_cast<unsigned>((p.rois + kThreads - 1) / kThreads);
    count_rois<T><<<blocks, kThreads, 0, stream>>>(p, lists);
  }
  list_rois<T><<<static_cast<unsigned>(maps), kThreads, 0, stream>>>(p, lists);
  bool fit = p.channels % kVector == 0 && aligned_to(p.pooled, 16);
  for (int l = 0; l < p.levels && p.channels_last; ++l) fit = fit && aligned_to(p.maps[l], 16);
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
  return 2 * p.levels * p.images + p.rois + p.rois * sizeof(ListedRoi<double>) / sizeof(int64_t);
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
