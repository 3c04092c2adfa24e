// The kernels of roi_pool, roi_crop and ps_roi_pool, and their dispatch by type and layout. Included by .cu
// files only.
//
// A block works on one RoI (several blocks where there are few). The values of an RoI lie in rows: in NCHW
// of the cells of a channel, channels last of the channels of a cell. Neighbouring threads take neighbours
// of a row, a block as many rows at once as it has threads for, and a thread goes from row to row at its
// place: it divides in the beginning only, and in NCHW finds the pixels of its cell once.
//
// Pool<A>, a way of pooling, is made of one cell of an RoI, Pool(p, found, cell), and has
//   Rule: the axis rule of roi_cells.h;
//   Index, kNone, saved(p): what forward saves for backward, what for a cell without pixels, and where
//   (null: nothing);
//   kHeld: rows that a thread of forward works on at once in NCHW, so that it has loads in flight;
//   kOnePixel: whether the gradient of a value goes to one pixel, which is its index;
//   kVectors: whether neighbouring pooled channels read neighbouring channels of the maps;
//   channels(p), steps_h(p), steps_w(p): pooled channels, and what find_roi() takes;
//   map_channel(channel): the channel of the maps that a pooled channel reads;
//   gather<T, V>(source, pixel, value, index): pools V channels from each of source, which are kHeld or 1;
//   `pixel` is the step between pixels. value comes as zeros, index as kNone;
//   spread(value, index, map, pixel, add): adds the gradient of one value to its pixels of a map of its
//   channel, by calls add(address, value).
#pragma once

#include "roi_cells.h"
#include "roi_device.h"

namespace detectron::kernels {

constexpr int kOwners = 64;
constexpr int kSpread = 4;  // rows that a thread of backward works on at once

// Where a thread stands among the rows of an RoI.
template <bool kChannelsLast>
struct Rows {
  int64_t length, count;  // values of a row; rows
  int64_t begin, stride;  // the block's first row; from one of a thread's rows to its next
  int width, row, place;  // threads of a row; this thread's row from `begin` on, and its place in it
  bool idle;              // the thread has none

  // A row has `groups` values, or there are so many rows.
  __device__ __forceinline__ Rows(const RoiMaps& p, int64_t groups) {
    const int64_t cells = p.pooled_h * p.pooled_w;
    length = kChannelsLast ? groups : cells;
    count = kChannelsLast ? cells : groups;
    width = length < kThreads ? static_cast<int>(length) : kThreads;
    const int at_once = kThreads / width;
    row = static_cast<int>(threadIdx.x) / width;
    place = static_cast<int>(threadIdx.x) - row * width;
    idle = row >= at_once;
    begin = static_cast<int64_t>(blockIdx.y) * at_once;
    stride = static_cast<int64_t>(gridDim.y) * at_once;
  }
};

// ---- forward ------------------------------------------------------------------------------------

template <typename T, int V, bool kChannelsLast, template <typename> class Pool, typename P>
__global__ void __launch_bounds__(kThreads) pool_rois(P p) {
  using A = Acc<T>;
  using Index = typename Pool<A>::Index;
  constexpr int kHeld = kChannelsLast ? 1 : Pool<A>::kHeld;
  const int64_t roi = blockIdx.x;
  const auto found =
      find_roi<typename Pool<A>::Rule, A>(p, roi, Pool<A>::steps_h(p), Pool<A>::steps_w(p));
  const Rows<kChannelsLast> rows(p, Pool<A>::channels(p) / V);
  if (rows.idle) return;
  const MapLayout step = map_layout(p, found.level);
  const int64_t pixel = kChannelsLast ? p.channels : 1;
  const T* const map = static_cast<const T*>(p.maps[found.level]) +
      image_offset(p, found.level, found.image);
  auto* const pooled =
      reinterpret_cast<Vector<T, V>*>(p.pooled) + roi * rows.count * rows.length;
  auto* const saved = reinterpret_cast<Vector<Index, V>*>(Pool<A>::saved(p));
  for (int64_t place = rows.place; place < rows.length; place += rows.width) {
    Pool<A> pool;
    if (!kChannelsLast) pool = Pool<A>(p, found, static_cast<int>(place));
    for (int64_t row = rows.begin + rows.row; row < rows.count; row += kHeld * rows.stride) {
      if (kChannelsLast) pool = Pool<A>(p, found, static_cast<int>(row));
      const T* source[kHeld];
      A value[kHeld][V] = {};
      Vector<Index, V> index[kHeld];
#pragma unroll
      for (int u = 0; u < kHeld; ++u) {
        const int64_t mine = row + u * rows.stride;  // a row beyond the last is the last once more
        const int64_t channel =
            kChannelsLast ? place * V : (mine < rows.count ? mine : rows.count - 1);
        source[u] = map + pool.map_channel(channel) * step.channel;
#pragma unroll
        for (int k = 0; k < V; ++k) index[u].v[k] = Pool<A>::kNone;
      }
      if (found.valid) pool.template gather<T, V>(source, pixel, value, index);
#pragma unroll
      for (int u = 0; u < kHeld; ++u) {
        const int64_t mine = row + u * rows.stride;
        if (mine >= rows.count) break;
        Vector<T, V> result;
#pragma unroll
        for (int k = 0; k < V; ++k) result.v[k] = from_acc<T>(value[u][k]);
        pooled[mine * rows.length + place] = result;
        if (saved != nullptr) {
          saved[(roi * rows.count + mine) * rows.length + place] = index[u];
        }
      }
    }
  }
}

template <template <typename> class Pool, typename P>
void launch_pool(const P& p, cudaStream_t stream) {
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Acc<T>;
    using Index = typename Pool<A>::Index;
    constexpr int kVector = Pool<A>::kVectors ? 16 / sizeof(T) : 1;
    const int64_t items = Pool<A>::channels(p) * p.pooled_h * p.pooled_w;
    if (kVector > 1 && vectors_fit(p, kVector) &&
        aligned_to(Pool<A>::saved(p), sizeof(Index) * kVector)) {
      pool_rois<T, kVector, true, Pool>
          <<<grid_of(p, items / kVector), kThreads, 0, stream>>>(p);
    } else if (p.channels_last) {
      pool_rois<T, 1, true, Pool><<<grid_of(p, items), kThreads, 0, stream>>>(p);
    } else {
      pool_rois<T, 1, false, Pool><<<grid_of(p, items), kThreads, 0, stream>>>(p);
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------

// Neighbouring lanes of eight whose values go to one pixel of one channel: the first of them gets their
// sum, the others kNone. By all lanes of a warp.
template <typename A, typename Index>
__device__ __forceinline__ void add_up_runs(bool first_of_row, Index none, A& value, Index& index) {
  constexpr unsigned kAllLanes = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Index before = __shfl_up_sync(kAllLanes, index, 1);
  const bool head = first_of_row || lane % 8 == 0 || before != index;
  const unsigned later = __ballot_sync(kAllLanes, head) >> lane >> 1;
  const int left = later != 0 ? __ffs(static_cast<int>(later)) : 32 - lane;  // lanes to the run's end
#pragma unroll
  for (int d = 1; d < 8; d *= 2) {
    const A other = __shfl_down_sync(kAllLanes, value, d);
    if (d < left) value += other;
  }
  if (!head) index = none;
}

// Cells that overlap often have one largest value, so many a gradient is added to its neighbour's before it
// goes to memory, where adding takes longest.
template <typename T, bool kChannelsLast, template <typename> class Pool, typename P>
__global__ void __launch_bounds__(kThreads) scatter(P p) {
  using A = Acc<T>;
  using Index = typename Pool<A>::Index;
  const int64_t roi = blockIdx.x;
  const auto found =
      find_roi<typename Pool<A>::Rule, A>(p, roi, Pool<A>::steps_h(p), Pool<A>::steps_w(p));
  if (!found.valid) return;
  const Rows<kChannelsLast> rows(p, Pool<A>::channels(p));
  const MapLayout step = map_layout(p, found.level);
  const int64_t pixel = kChannelsLast ? p.channels : 1;
  A* const map = static_cast<A*>(p.maps[found.level]) + image_offset(p, found.level, found.image);
  const T* const pooled = static_cast<const T*>(p.pooled);
  const Index* const saved = Pool<A>::saved(p);
  const auto add = [](A* address, A value) { atomicAdd(address, value); };
  // All threads of the block go through the loops alike: add_up_runs() is for whole warps.
  for (int64_t from = 0; from < rows.length; from += rows.width) {
    const int64_t place = from + rows.place;
    const bool busy = !rows.idle && place < rows.length;
    Pool<A> pool;
    if (!kChannelsLast) pool = Pool<A>(p, found, static_cast<int>(place));
    for (int64_t first = rows.begin; first < rows.count; first += kSpread * rows.stride) {
      A value[kSpread];
      Index index[kSpread];
      bool here[kSpread];
#pragma unroll
      for (int u = 0; u < kSpread; ++u) {
        const int64_t row = first + rows.row + u * rows.stride;
        const int64_t in = (roi * rows.count + row) * rows.length + place;
        here[u] = busy && row < rows.count;
        value[u] = here[u] ? to_acc(pooled[in]) : A(0);
        index[u] = here[u] && saved != nullptr ? saved[in] : Pool<A>::kNone;
      }
      if constexpr (Pool<A>::kOnePixel) {
#pragma unroll
        for (int u = 0; u < kSpread; ++u) {
          if constexpr (!kChannelsLast) {
            add_up_runs(rows.place == 0, Pool<A>::kNone, value[u], index[u]);
          } else if (u + 1 < kSpread && index[u] == index[u + 1]) {  // of one channel, too
            value[u + 1] += value[u];
            index[u] = Pool<A>::kNone;
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kSpread; ++u) {
        if (!here[u]) continue;
        const int64_t row = first + rows.row + u * rows.stride;
        if (kChannelsLast) pool = Pool<A>(p, found, static_cast<int>(row));
        const int64_t channel = pool.map_channel(kChannelsLast ? place : row);
        pool.spread(value[u], index[u], map + channel * step.channel, pixel, add);
      }
    }
  }
}

// In a fixed order: a thread owns a channel of one image on one level and walks through the RoIs.
template <typename T, template <typename> class Pool, typename P>
__global__ void __launch_bounds__(kOwners) scatter_in_order(P p) {
  using A = Acc<T>;
  const int64_t channels = Pool<A>::channels(p);
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kOwners + threadIdx.x;
  if (channel >= channels) return;
  const int cells = p.pooled_h * p.pooled_w, level = static_cast<int>(blockIdx.z);
  const MapLayout step = map_layout(p, level);
  const auto add = [](A* address, A value) { *address += value; };
  for (int64_t image = blockIdx.y; image < p.images; image += gridDim.y) {
    A* const map = static_cast<A*>(p.maps[level]) + image_offset(p, level, image);
    for (int64_t roi = 0; roi < p.rois; ++roi) {
      const auto found =
          find_roi<typename Pool<A>::Rule, A>(p, roi, Pool<A>::steps_h(p), Pool<A>::steps_w(p));
      if (!found.valid || found.level != level || found.image != image) continue;
      for (int cell = 0; cell < cells; ++cell) {
        const int64_t in = pooled_offset(p, roi, channels, channel, cell);
        const Pool<A> pool(p, found, cell);
        pool.spread(
            to_acc(static_cast<const T*>(p.pooled)[in]),
            Pool<A>::saved(p) != nullptr ? Pool<A>::saved(p)[in] : Pool<A>::kNone,
            map + pool.map_channel(channel) * step.channel, step.pixel, add);
      }
    }
  }
}

template <template <typename> class Pool, typename P>
void launch_scatter(const P& p, bool deterministic, cudaStream_t stream) {
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t channels = Pool<Acc<T>>::channels(p);
    if (p.rois == 0 || channels == 0 || p.images == 0) return;
    if (deterministic) {
      const dim3 grid(
          static_cast<unsigned>((channels + kOwners - 1) / kOwners),
          static_cast<unsigned>(p.images < 65535 ? p.images : 65535),
          static_cast<unsigned>(p.levels));
      scatter_in_order<T, Pool><<<grid, kOwners, 0, stream>>>(p);
      return;
    }
    const dim3 grid = grid_of(p, channels * p.pooled_h * p.pooled_w);
    if (p.channels_last) {
      scatter<T, true, Pool><<<grid, kThreads, 0, stream>>>(p);
    } else {
      scatter<T, false, Pool><<<grid, kThreads, 0, stream>>>(p);
    }
  });
}

}  // namespace detectron::kernels
