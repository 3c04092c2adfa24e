// Soft-NMS: one block a problem. Each thread owns every kThreads-th box; a round decays the owned scores
// by the box picked last and finds the best of them on the way, one block-wide reduction picks the next.
#include "detections_kernels.h"

namespace detectron::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Order of picking as one number: the score first, of equal scores the lower index. 0: nothing left.
using Key = unsigned long long;

__device__ __forceinline__ Key make_key(float score, int64_t index) {
  const unsigned bits = __float_as_uint(score);
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<Key>(ordered) << 32 | (0xffffffffu - static_cast<unsigned>(index));
}

__device__ __forceinline__ int64_t key_index(Key key) {
  return 0xffffffffu - static_cast<unsigned>(key);
}

__device__ __forceinline__ float key_score(Key key) {
  const unsigned ordered = static_cast<unsigned>(key >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

__device__ __forceinline__ Key warp_best(Key key) {
  for (int step = 16; step > 0; step /= 2) {
    const Key other = __shfl_xor_sync(0xffffffffu, key, step);
    key = other > key ? other : key;
  }
  return key;
}

__global__ void __launch_bounds__(kThreads) decay(SoftNms p) {
  // By turns, so that one barrier a round is enough.
  __shared__ Key warp_keys[2][kWarps];
  const int64_t problem = blockIdx.x;
  const float4* boxes = reinterpret_cast<const float4*>(p.boxes) + problem * p.count;
  float* scores = p.scores + problem * p.count;
  int64_t* keep = p.keep + problem * p.count;
  float* decayed = p.decayed + problem * p.count;

  Key best = 0;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads) {
    if (!(scores[i] >= p.rule.score_thresh)) {
      scores[i] = nanf("");
      continue;
    }
    const Key key = make_key(scores[i], i);
    best = key > best ? key : best;
  }
  int64_t kept = 0;
  for (; kept < p.count; ++kept) {
    Key* keys = warp_keys[kept % 2];
    best = warp_best(best);
    if (threadIdx.x % 32 == 0) keys[threadIdx.x / 32] = best;
    __syncthreads();
    best = warp_best(threadIdx.x % 32 < kWarps ? keys[threadIdx.x % 32] : 0);
    if (best == 0) break;
    const int64_t chosen = key_index(best);
    if (threadIdx.x == 0) {
      keep[kept] = chosen;
      decayed[kept] = key_score(best);
    }
    const float4 c = boxes[chosen];
    const float chosen_box[4] = {c.x, c.y, c.z, c.w};
    best = 0;
    for (int64_t i = threadIdx.x; i < p.count; i += kThreads) {
      float score = scores[i];
      if (score != score) continue;  // picked or dropped
      if (i == chosen) {
        scores[i] = nanf("");
        continue;
      }
      const float4 o = boxes[i];
      const float other[4] = {o.x, o.y, o.z, o.w};
      const float iou = box_iou(chosen_box, other);
      if (iou > 0.f) {
        score *= p.rule.weight(iou);
        if (!(score >= p.rule.score_thresh)) score = nanf("");
        scores[i] = score;
        if (score != score) continue;
      }
      const Key key = make_key(score, i);
      best = key > best ? key : best;
    }
  }
  if (threadIdx.x == 0) p.kept[problem] = kept;
}

}  // namespace

void soft_nms(const SoftNms& p, cudaStream_t stream) {
  decay<<<static_cast<unsigned>(p.problems), kThreads, 0, stream>>>(p);
}

}  // namespace detectron::kernels
