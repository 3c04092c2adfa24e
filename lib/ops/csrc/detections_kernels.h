// Launchers of the CUDA kernels on detections; as in kernels.h, plain device pointers and a stream.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include "detections.h"

namespace detectron::kernels {

struct SoftNms {
  const float* boxes;  // (problems, count, 4), 16-byte aligned
  float* scores;       // (problems, count): scratch, holding the scores; those of invalid boxes are NaN
  int problems;
  int64_t count;
  SoftNmsRule rule;
  int64_t* keep;   // (problems, count), -1 filled
  float* decayed;  // (problems, count), zero filled
  int64_t* kept;   // (problems,)
};

void soft_nms(const SoftNms& p, cudaStream_t stream);

struct BoxVoting {
  const float* top;          // (num_top, 5)
  const float* all;          // (num_all, 5)
  const int64_t* top_group;  // (num_top,)
  const int64_t* offsets;    // (groups + 1,) ranges of `all`
  int64_t num_top, num_all, groups;
  VoteRule rule;
  float* out;  // (num_top, 5)
};

void box_voting(const BoxVoting& p, cudaStream_t stream);

struct PasteMasks {
  const float* masks;  // (instances, resolution, resolution)
  const float* boxes;  // (instances, 4)
  int64_t instances;
  int resolution, height, width;
  float thresh;
};

// planes: (instances, height, width); every element is written.
void paste_masks(const PasteMasks& p, uint8_t* planes, cudaStream_t stream);

// Vertical runs. counts: (instances, width), how many each column of each mask has. run_ends: their
// running sums. runs: (begin, end) of each, positions in column-major order.
void count_runs(const PasteMasks& p, int* counts, cudaStream_t stream);
void write_runs(const PasteMasks& p, const int64_t* run_ends, int2* runs, cudaStream_t stream);

}  // namespace detectron::kernels
