// The 3x3 windows around the cells of anchors: what both devices read and write, as plain pointers, and which
// cell an anchor belongs to.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "host_device.h"

namespace detectron {

constexpr int kWindow = 3, kTaps = kWindow * kWindow;

struct AnchorWindows {
  static constexpr int kMaxLevels = 8;
  static constexpr int kMaxSlots = 2048;  // their cells lie in a block's memory
  DType dtype;
  bool channels_last;
  void* maps[kMaxLevels];  // (images, channels, height, width) in the given layout; backward writes into zeros
  int heights[kMaxLevels], widths[kMaxLevels];
  int levels, num_anchors;
  int64_t images, channels;
  int slots;             // anchors of an image
  const int64_t* index;  // (images, slots)
  void* windows;         // (images, slots, kTaps, channels); read by backward
};

struct AnchorCell {
  int level, y, x;  // level -1: no anchor has this index
};

HOST_DEVICE AnchorCell cell_of(const AnchorWindows& p, int64_t anchor) {
  if (anchor < 0) return {-1, 0, 0};
  for (int l = 0; l < p.levels; ++l) {
    const int64_t count = static_cast<int64_t>(p.heights[l]) * p.widths[l] * p.num_anchors;
    if (anchor < count) {
      const int64_t cell = anchor / p.num_anchors;
      return {l, static_cast<int>(cell / p.widths[l]), static_cast<int>(cell % p.widths[l])};
    }
    anchor -= count;
  }
  return {-1, 0, 0};
}

// Where tap 3 * dy + dx of a cell's window lies; on a border it may lie outside of the map.
HOST_DEVICE AnchorCell tap_of(const AnchorCell& cell, int tap) {
  return {cell.level, cell.y + tap / kWindow - 1, cell.x + tap % kWindow - 1};
}

HOST_DEVICE bool on_map(const AnchorWindows& p, const AnchorCell& at) {
  return at.level >= 0 && at.y >= 0 && at.x >= 0 && at.y < p.heights[at.level] &&
      at.x < p.widths[at.level];
}

// The tap of a cell's window that lies at `at`, or -1.
HOST_DEVICE int tap_at(const AnchorCell& cell, const AnchorCell& at) {
  const int dy = at.y - cell.y + 1, dx = at.x - cell.x + 1;
  const bool inside = dy >= 0 && dy < kWindow && dx >= 0 && dx < kWindow;
  return inside && cell.level == at.level ? kWindow * dy + dx : -1;
}

// The first channel of a map's pixel, and the step to the next one.
struct PixelLayout {
  int64_t offset, channel;
};

HOST_DEVICE PixelLayout pixel_of(const AnchorWindows& p, int64_t image, const AnchorCell& at) {
  const int64_t width = p.widths[at.level], area = p.heights[at.level] * width;
  const int64_t pixel = at.y * width + at.x;
  if (p.channels_last) return {(image * area + pixel) * p.channels, 1};
  return {image * p.channels * area + pixel, area};
}

}  // namespace detectron
