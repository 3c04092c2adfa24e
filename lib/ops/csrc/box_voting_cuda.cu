// Box voting: one warp a detection; its lanes share out the voters.
#include "detections_kernels.h"

namespace detectron::kernels {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ double warp_sum(double v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

__global__ void __launch_bounds__(kThreads) vote(BoxVoting p) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (i >= p.num_top) return;  // whole warps
  const int lane = threadIdx.x % 32;
  const float* det = p.top + 5 * i;
  const int64_t group = p.top_group[i];
  Votes votes;
  if (group >= 0 && group < p.groups) {
    const int64_t begin = p.offsets[group], end = p.offsets[group + 1];
    if (begin >= 0 && end <= p.num_all) {  // malformed offsets: nothing is read
      for (int64_t k = begin + lane; k < end; k += 32) {
        const float iou = box_iou(det, p.all + 5 * k);
        if (iou >= p.rule.thresh) votes.add(p.rule, iou, p.all + 5 * k);
      }
    }
  }
  votes.count = warp_sum(votes.count);
  votes.score = warp_sum(votes.score);
  votes.iou = warp_sum(votes.iou);
  votes.special = warp_sum(votes.special);
  for (int k = 0; k < 4; ++k) votes.box[k] = warp_sum(votes.box[k]);
  if (lane == 0) votes.result(p.rule, det, p.out + 5 * i);
}

}  // namespace

void box_voting(const BoxVoting& p, cudaStream_t stream) {
  constexpr int kPerBlock = kThreads / 32;
  const unsigned blocks = static_cast<unsigned>((p.num_top + kPerBlock - 1) / kPerBlock);
  vote<<<blocks, kThreads, 0, stream>>>(p);
}

}  // namespace detectron::kernels
