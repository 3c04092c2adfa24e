// Where a soft mask lies in its image and what it is worth at a pixel, as Detectron's segm_results has it
// with cv2.resize; shared by the CPU and the CUDA kernels, so that both paste the same pixels.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace detectron {

// One axis of the rectangle that a map of `side` samples (with its border) is resized to.
struct PasteAxis {
  int64_t origin, size;  // pixels; the map's first sample belongs to `origin`
  int begin, end;        // the part inside the image, end exclusive

  HOST_DEVICE PasteAxis(float low, float high, float scale, int extent) {
    // expanded about the centre, half-sides without the +1; truncated towards zero
    const float half = (high - low) * 0.5f * scale, centre = (high + low) * 0.5f;
    origin = truncated(centre - half);
    size = truncated(centre + half) - origin + 1;
    if (size < 1) size = 1;
    begin = clamped(origin, extent);
    end = clamped(origin + size, extent);
    if (!(half == half && centre == centre)) begin = end = 0;  // not a number: nothing is pasted
  }

 private:
  static HOST_DEVICE int64_t truncated(float v) {
    if (!(v > -1e9f)) return -1000000000;
    return v < 1e9f ? static_cast<int64_t>(v) : 1000000000;
  }
  static HOST_DEVICE int clamped(int64_t v, int extent) {
    return static_cast<int>(v < 0 ? 0 : v > extent ? extent : v);
  }
};

// The two samples of the bordered map between which a pixel lies, and the weight of the second.
struct PasteSample {
  int low, high;
  float weight;

  HOST_DEVICE PasteSample() {}
  HOST_DEVICE PasteSample(const PasteAxis& axis, int pixel, int side) {
    const double step = side / static_cast<double>(axis.size);
    const double source = (static_cast<double>(pixel - axis.origin) + 0.5) * step - 0.5;
    const double whole = floor(source);
    low = static_cast<int>(whole);
    weight = low < 0 || low >= side - 1 ? 0.f : static_cast<float>(source - whole);
    low = low < 0 ? 0 : low > side - 1 ? side - 1 : low;
    high = low + 1 < side ? low + 1 : side - 1;
  }

  HOST_DEVICE float mix(float a, float b) const { return a * (1.f - weight) + b * weight; }
};

// Sample of the map with its border of zeros.
HOST_DEVICE float bordered(const float* map, int resolution, int row, int column) {
  const bool inside = row > 0 && row <= resolution && column > 0 && column <= resolution;
  return inside ? map[(row - 1) * resolution + column - 1] : 0.f;
}

HOST_DEVICE float paste_scale(int resolution) {
  return static_cast<float>((resolution + 2.0) / resolution);
}

}  // namespace detectron
