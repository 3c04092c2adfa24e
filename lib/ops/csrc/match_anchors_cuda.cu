// The best ground truth of each anchor and which anchors are foreground, in two passes over the anchors
// without a matrix of overlaps: the second finds ties with a ground truth's best by computing the same
// overlaps again. Neighbours in the list of anchors are neighbours in the image, so that a block looks
// only at the ground truths that meet the smallest box around its anchors.
#include "anchors_kernels.h"

namespace detectron::kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

struct Tile {
  float4 box[kThreads];
  int index[kThreads];
  unsigned best[kThreads];
};

struct Anchor {
  float box[4];
  int64_t place;  // in the (images, count) outputs
  bool exists, inside;
};

__device__ Anchor load_anchor(const MatchAnchors& p) {
  Anchor anchor{};
  const int64_t image = blockIdx.y;
  const int64_t a = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  anchor.place = image * p.count + a;
  anchor.exists = a < p.count;
  if (!anchor.exists) return anchor;
  const float4 box = reinterpret_cast<const float4*>(p.anchors)[image * p.image_stride + a];
  anchor.box[0] = box.x;
  anchor.box[1] = box.y;
  anchor.box[2] = box.z;
  anchor.box[3] = box.w;
  const float* size = p.im_info ? p.im_info + 3 * image : nullptr;
  anchor.inside = !size || p.rule.holds(anchor.box, size[0], size[1]);
  return anchor;
}

__device__ unsigned warp_max(unsigned value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kAll, value);
#else
  for (int step = 16; step > 0; step /= 2) {
    const unsigned other = __shfl_xor_sync(kAll, value, step);
    value = other > value ? other : value;
  }
  return value;
#endif
}

// The smallest box around the block's anchors that lie inside; upside down where none does.
__device__ void block_bounds(const Anchor& anchor, float* bounds) {
  __shared__ float parts[kWarps][4];
  for (int k = 0; k < 4; ++k) {
    const float sign = k < 2 ? 1.f : -1.f;
    float least = anchor.inside ? sign * anchor.box[k] : INFINITY;
    for (int step = 16; step > 0; step /= 2) {
      least = fminf(least, __shfl_xor_sync(kAll, least, step));
    }
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32][k] = least;
  }
  __syncthreads();
  for (int k = 0; k < 4; ++k) {
    float least = parts[0][k];
    for (int w = 1; w < kWarps; ++w) least = fminf(least, parts[w][k]);
    bounds[k] = k < 2 ? least : -least;
  }
}

struct Gathered {
  int count;        // in the tile, by ascending index
  int first_valid;  // index of the first valid one, near or not; -1 without any
};

// Fills the tile with those of the slots from `start` that are valid and near. Their best so far is that
// of the whole image if kKnown, and those that nothing overlaps stay out; else 0.
template <bool kKnown>
__device__ Gathered gather(const MatchAnchors& p, int start, const float* bounds, Tile& tile) {
  __shared__ int counts[kWarps], firsts[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t slot = static_cast<int64_t>(start) + threadIdx.x;
  const int64_t place = static_cast<int64_t>(blockIdx.y) * p.slots + slot;
  const bool valid = slot < p.slots && p.gt_valid[place];
  float4 box{};
  unsigned best = 0;
  bool near = false;
  if (valid) {
    box = reinterpret_cast<const float4*>(p.gt_boxes)[place];
    if (kKnown) best = p.best[place];
    const float corners[4] = {box.x, box.y, box.z, box.w};
    near = may_overlap(bounds, corners) && (!kKnown || best != 0);
  }
  const unsigned near_bits = __ballot_sync(kAll, near), valid_bits = __ballot_sync(kAll, valid);
  if (lane == 0) {
    counts[warp] = __popc(near_bits);
    firsts[warp] = valid_bits == 0 ? -1 : static_cast<int>(slot) + __ffs(valid_bits) - 1;
  }
  __syncthreads();
  Gathered found{0, -1};
  int before = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += counts[w];
    found.count += counts[w];
    if (found.first_valid < 0) found.first_valid = firsts[w];
  }
  if (near) {
    const int k = before + __popc(near_bits & ((1u << lane) - 1));
    tile.box[k] = box;
    tile.index[k] = static_cast<int>(slot);
    tile.best[k] = best;
  }
  __syncthreads();
  return found;
}

__device__ float overlap_with(const Tile& tile, int k, const float* anchor) {
  const float4 box = tile.box[k];
  const float corners[4] = {box.x, box.y, box.z, box.w};
  return box_iou(anchor, corners);
}

__global__ void __launch_bounds__(kThreads) find_best(MatchAnchors p) {
  __shared__ Tile tile;
  const Anchor anchor = load_anchor(p);
  float overlap = -1.f;
  int index = 0;
  if (__syncthreads_or(anchor.inside)) {
    float bounds[4];
    block_bounds(anchor, bounds);
    unsigned* best = p.best + static_cast<int64_t>(blockIdx.y) * p.slots;
    for (int start = 0; start < p.slots; start += kThreads) {
      const Gathered found = gather<false>(p, start, bounds, tile);
      if (anchor.inside && overlap < 0.f && found.first_valid >= 0) {
        overlap = 0.f;
        index = found.first_valid;
      }
      for (int k = 0; k < found.count; ++k) {
        const float iou = anchor.inside ? overlap_with(tile, k, anchor.box) : 0.f;
        if (anchor.inside && iou > overlap) {
          overlap = iou;
          index = tile.index[k];
        }
        // IoUs are not negative: their bits have their order.
        const unsigned most = warp_max(__float_as_uint(iou));
        if (most != 0 && threadIdx.x % 32 == 0) atomicMax(&tile.best[k], most);
      }
      __syncthreads();
      if (threadIdx.x < found.count && tile.best[threadIdx.x] != 0) {
        atomicMax(best + tile.index[threadIdx.x], tile.best[threadIdx.x]);
      }
      __syncthreads();  // the next round fills the tile anew
    }
  }
  if (!anchor.exists) return;
  p.inside[anchor.place] = anchor.inside;
  p.max_overlap[anchor.place] = overlap;
  p.gt_index[anchor.place] = index;
}

// Whether some valid ground truth of the block's image has no anchor that overlaps it; as all others
// wait, it asks once for all slots.
__device__ bool one_is_alone(const MatchAnchors& p) {
  bool alone = false;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * p.slots;
  for (int64_t slot = threadIdx.x; slot < p.slots; slot += kThreads) {
    alone = alone || (p.gt_valid[first + slot] && p.best[first + slot] == 0);
  }
  return __syncthreads_or(alone);
}

__global__ void __launch_bounds__(kThreads) find_foreground(MatchAnchors p) {
  __shared__ Tile tile;
  const Anchor anchor = load_anchor(p);
  bool foreground = false, open = false;
  float overlap = 0.f;
  if (anchor.inside) {
    overlap = p.max_overlap[anchor.place];
    foreground = overlap >= p.positive;
    open = !foreground && overlap > 0.f;
  }
  // A ground truth that no anchor overlaps is tied by all of them.
  if (one_is_alone(p)) {
    foreground = anchor.inside;
  } else if (__syncthreads_or(open)) {
    float bounds[4];
    block_bounds(anchor, bounds);
    const unsigned bits = __float_as_uint(overlap);
    for (int start = 0; start < p.slots; start += kThreads) {
      const Gathered found = gather<true>(p, start, bounds, tile);
      for (int k = 0; k < found.count; ++k) {
        // It cannot tie with more than it has.
        if (open && tile.best[k] <= bits &&
            __float_as_uint(overlap_with(tile, k, anchor.box)) == tile.best[k]) {
          foreground = true;
          open = false;
        }
      }
      __syncthreads();  // the next round fills the tile anew
    }
  }
  if (anchor.exists) p.foreground[anchor.place] = foreground;
}

}  // namespace

void match_anchors(const MatchAnchors& p, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((p.count + kThreads - 1) / kThreads);
  const dim3 grid(blocks, static_cast<unsigned>(p.images));
  find_best<<<grid, kThreads, 0, stream>>>(p);
  find_foreground<<<grid, kThreads, 0, stream>>>(p);
}

}  // namespace detectron::kernels
