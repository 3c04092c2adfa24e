// Launchers of the CUDA kernels. Plain pointers and a stream: the .cu files include no torch at all,
// which is what keeps nvcc at seconds a file. All pointers are device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace detectron::kernels {

enum class DType { f32, f64, f16, bf16 };

// Boxes of one NMS call are worked through in chunks of this many, so that the bit matrix stays small.
constexpr int kNmsChunk = 4096;

struct NmsProblems {
  const float* boxes;  // (problems, count, 4), 16-byte aligned, by descending score
  const bool* valid;   // (problems, count) or null
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

struct RoiAlign {
  static constexpr int kMaxLevels = 8;
  DType dtype;
  bool channels_last;
  void* maps[kMaxLevels];  // (images, channels, height, width) in the given layout; written by backward
  int heights[kMaxLevels], widths[kMaxLevels];
  double scales[kMaxLevels];
  int levels;
  int64_t images, channels, rois;
  int pooled_h, pooled_w, sampling_ratio;
  bool aligned;
  const void* boxes;          // (rois, 5), float, or double where dtype is f64
  const int64_t* roi_levels;  // (rois,) or null: all on level 0
  void* pooled;               // (rois, channels, pooled_h, pooled_w); read by backward
  int multiprocessors;
};

void roi_align_forward(const RoiAlign& p, cudaStream_t stream);
// Adds to maps, which must be zero filled.
void roi_align_backward(const RoiAlign& p, bool deterministic, cudaStream_t stream);

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
