// Launchers of the CUDA kernels. Plain pointers and a stream: the .cu files include no torch at all,
// which is what keeps nvcc at seconds a file. All pointers are device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "roi_maps.h"

namespace detectron::kernels {

// Boxes of one NMS call are worked through in chunks of this many, so that the bit matrix stays small.
constexpr int kNmsChunk = 4096;

struct NmsProblems {
  const float* boxes;  // (problems, count, 4), 16-byte aligned, by descending score
  const bool* valid;   // (problems, count) or null
  const int* groups;   // (problems, count) or null: boxes of different groups do not meet
  int problems;
  int64_t count;
  int64_t max_out;
  float thresh;
  bool plus_one;
  unsigned long long* matrix;   // (problems, min(count, chunk), words): scratch
  unsigned long long* removed;  // (problems, words): scratch; words = ceil(min(count, chunk) / 64)
  int64_t* keep;                // (problems, max_out), -1 filled
  int64_t* kept;                // (problems,), zero filled
};

void nms(const NmsProblems& p, cudaStream_t stream);

// flags[order[keep[i]]] = true for i < *kept.
void nms_mark(
    const int64_t* keep, const int64_t* kept, const int64_t* order, int64_t count, bool* flags,
    cudaStream_t stream);

void roi_align_forward(const RoiAlign& p, cudaStream_t stream);
// Writes every element of maps; pooled is channels last in any case. The scratch holds
// roi_align_scratch() elements. Repeats bit for bit.
void roi_align_backward(const RoiAlign& p, int64_t* scratch, cudaStream_t stream);
int64_t roi_align_scratch(const RoiAlign& p);
// Whether the weights of so many cells fit into a block's memory.
bool roi_align_fits(const RoiAlign& p);

void roi_pool_forward(const RoiPool& p, cudaStream_t stream);
void roi_pool_backward(const RoiPool& p, bool deterministic, cudaStream_t stream);
void roi_crop_forward(const RoiCrop& p, cudaStream_t stream);
void roi_crop_backward(const RoiCrop& p, bool deterministic, cudaStream_t stream);
void ps_roi_pool_forward(const PsRoiPool& p, cudaStream_t stream);
void ps_roi_pool_backward(const PsRoiPool& p, bool deterministic, cudaStream_t stream);

struct ImageBatch {
  const uint8_t* pixels;
  int64_t num_bytes;
  const double* meta;   // (images, 9)
  const double* means;  // (3,)
  int images;
  int64_t height, width;
  float* out;  // (images, 3, height, width); every element is written
};

void image_batch(const ImageBatch& p, cudaStream_t stream);

struct Polygons {
  const float* coords;
  const int64_t* poly_offsets;
  const int64_t* object_offsets;
  const float* rois;
  const int64_t* object_index;
  int64_t points, polygons, objects, num_rois;
  int resolution;
  uint8_t* masks;  // (rois, resolution, resolution); every element is written
};

void polygons_to_masks(const Polygons& p, cudaStream_t stream);

}  // namespace detectron::kernels
