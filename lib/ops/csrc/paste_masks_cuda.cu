// Soft masks in their image. Planes: one thread a pixel. Runs: one warp a column of a mask; the column of
// the map is interpolated along x once, then 32 pixels at a time are compared and become bits, whose edges
// are the runs.
#include "detections_kernels.h"
#include "paste_geometry.h"

namespace detectron::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__global__ void __launch_bounds__(kThreads) paint(PasteMasks p, uint8_t* planes) {
  const int64_t instance = blockIdx.z;
  const int x = blockIdx.x * kThreads + threadIdx.x, y = blockIdx.y;
  if (x >= p.width) return;
  const float* box = p.boxes + 4 * instance;
  const float scale = paste_scale(p.resolution);
  const PasteAxis xs(box[0], box[2], scale, p.width), ys(box[1], box[3], scale, p.height);
  bool inside = false;
  if (x >= xs.begin && x < xs.end && y >= ys.begin && y < ys.end) {
    const float* map = p.masks + instance * p.resolution * p.resolution;
    const int side = p.resolution + 2;
    const PasteSample across(xs, x, side), down(ys, y, side);
    const float upper = across.mix(
        bordered(map, p.resolution, down.low, across.low),
        bordered(map, p.resolution, down.low, across.high));
    const float lower = across.mix(
        bordered(map, p.resolution, down.high, across.low),
        bordered(map, p.resolution, down.high, across.high));
    inside = down.mix(upper, lower) > p.thresh;
  }
  planes[(instance * p.height + y) * p.width + x] = inside;
}

// counts[instance][x]: runs in that column; or, where they are known, the runs themselves.
template <bool kWrite>
__global__ void __launch_bounds__(kThreads)
    trace(PasteMasks p, int* counts, const int64_t* run_ends, int2* runs) {
  extern __shared__ float columns[];
  const int64_t instance = blockIdx.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int x = blockIdx.x * kWarps + warp;
  if (x >= p.width) return;  // whole warps; none waits for another
  const int64_t cell = instance * p.width + x;
  const float* box = p.boxes + 4 * instance;
  const float scale = paste_scale(p.resolution);
  const PasteAxis xs(box[0], box[2], scale, p.width), ys(box[1], box[3], scale, p.height);
  if (x < xs.begin || x >= xs.end) {
    if (!kWrite && lane == 0) counts[cell] = 0;
    return;
  }
  const int side = p.resolution + 2;
  const float* map = p.masks + instance * p.resolution * p.resolution;
  const PasteSample across(xs, x, side);
  float* column = columns + warp * side;
  for (int row = lane; row < side; row += 32) {
    column[row] = across.mix(
        bordered(map, p.resolution, row, across.low), bordered(map, p.resolution, row, across.high));
  }
  __syncwarp();

  // Where this column's runs go: begins and ends are numbered separately, in ascending order.
  int64_t begun = 0, ended = 0;
  if (kWrite) begun = ended = cell == 0 ? 0 : run_ends[cell - 1];
  const int64_t origin = begun;
  unsigned before = 0;  // whether the pixel above is inside
  const int base = x * p.height;
  for (int first = ys.begin; first < ys.end; first += 32) {
    const int y = first + lane;
    bool inside = false;
    if (y < ys.end) {
      const PasteSample down(ys, y, side);
      inside = down.mix(column[down.low], column[down.high]) > p.thresh;
    }
    const unsigned bits = __ballot_sync(kAllLanes, inside);
    const unsigned shifted = bits << 1 | before;
    const unsigned begins = bits & ~shifted, ends = shifted & ~bits;
    if (kWrite) {
      const unsigned lower_lanes = (1u << lane) - 1;
      if (begins >> lane & 1) runs[begun + __popc(begins & lower_lanes)].x = base + y;
      if (ends >> lane & 1) runs[ended + __popc(ends & lower_lanes)].y = base + y;
      ended += __popc(ends);
    }
    begun += __popc(begins);
    before = bits >> 31;
  }
  if (lane != 0) return;
  if (kWrite) {
    // the last pixels were the last lane's: no lane saw the end
    if (before) runs[ended].y = base + ys.end;
  } else {
    counts[cell] = static_cast<int>(begun - origin);
  }
}

dim3 trace_grid(const PasteMasks& p) {
  return dim3(
      static_cast<unsigned>((p.width + kWarps - 1) / kWarps), static_cast<unsigned>(p.instances));
}

size_t trace_bytes(const PasteMasks& p) { return sizeof(float) * kWarps * (p.resolution + 2); }

}  // namespace

void paste_masks(const PasteMasks& p, uint8_t* planes, cudaStream_t stream) {
  const dim3 grid(
      static_cast<unsigned>((p.width + kThreads - 1) / kThreads), static_cast<unsigned>(p.height),
      static_cast<unsigned>(p.instances));
  paint<<<grid, kThreads, 0, stream>>>(p, planes);
}

void count_runs(const PasteMasks& p, int* counts, cudaStream_t stream) {
  trace<false><<<trace_grid(p), kThreads, trace_bytes(p), stream>>>(p, counts, nullptr, nullptr);
}

void write_runs(const PasteMasks& p, const int64_t* run_ends, int2* runs, cudaStream_t stream) {
  trace<true><<<trace_grid(p), kThreads, trace_bytes(p), stream>>>(p, nullptr, run_ends, runs);
}

}  // namespace detectron::kernels
