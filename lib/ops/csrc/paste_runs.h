// Runs of pasted masks to COCO's compressed run lengths, on the host.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>

namespace detectron {

struct Run {
  int32_t begin, end;  // positions in column-major order, end exclusive
};

// Text (uint8) of all masks back to back and where each begins, (masks + 1,) int64. The runs of mask i are
// runs[ends[i - 1]] up to runs[ends[i]], ascending; touching ones are joined. `area` is the image's.
std::tuple<at::Tensor, at::Tensor> encode_runs(
    const Run* runs, const int64_t* ends, int64_t masks, int64_t area);

}  // namespace detectron
