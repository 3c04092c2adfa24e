// The boundary of a rasterised polygon as COCO's masks define it (pycocotools), edge by edge.
//
// Definition, in facts: vertices are put on a grid five times finer, (int)(5 * v + 0.5). Each edge is
// walked along its longer axis from its smaller end, the other coordinate being (int)(a + slope * t +
// 0.5). Wherever the walk goes between grid columns 5x + 2 and 5x + 3 the boundary crosses pixel column
// x, at row ceil of the smaller of the two grid rows' pixel coordinate, clamped to [0, size]. In
// column-major order every crossing toggles all pixels from that position on. (COCO sorts the crossings
// into run lengths; a prefix parity gives the same mask and needs no order.) Only columns inside the mask
// are looked at, so an edge far longer than the mask costs no more than a short one.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace detectron {

// Grid coordinate of a polygon coordinate. Far outside (or not a number) is clamped: the int would
// overflow, and the mask is not affected by how far outside a vertex lies in practice.
HOST_DEVICE int fine_grid(float v) {
  double c = 5.0 * static_cast<double>(v) + 0.5;
  if (!(c > -5e8)) c = -5e8;
  if (c > 5e8) c = 5e8;
  return static_cast<int>(c);
}

// (p - origin) * size / extent in float32, in this order: part of the definition.
HOST_DEVICE int roi_grid(float p, float origin, float extent, int size) {
  return fine_grid((p - origin) * static_cast<float>(size) / extent);
}

HOST_DEVICE int crossing_row(int fine_row, int size) {
  double y = (static_cast<double>(fine_row) + 0.5) / 5.0 - 0.5;
  if (y < 0) y = 0;
  if (y > size) y = size;
  return static_cast<int>(std::ceil(y));
}

// The coordinate across the walk after t steps.
HOST_DEVICE int across(int from, double slope, int t) {
  return static_cast<int>(static_cast<double>(from) + slope * static_cast<double>(t) + 0.5);
}

// Calls toggle(position) for each crossing of the edge; position = x * size + y <= size * size.
template <typename Toggle>
HOST_DEVICE void for_each_crossing(int x0, int y0, int x1, int y1, int size, Toggle toggle) {
  const int dx = x1 > x0 ? x1 - x0 : x0 - x1, dy = y1 > y0 ? y1 - y0 : y0 - y1;
  if (dx == 0) return;
  const bool wide = dx >= dy;
  if (wide ? x0 > x1 : y0 > y1) {
    const int x = x0, y = y0;
    x0 = x1;
    y0 = y1;
    x1 = x;
    y1 = y;
  }
  const int low = x0 < x1 ? x0 : x1, high = x0 < x1 ? x1 : x0;
  // columns x with low <= 5x + 2 and 5x + 3 <= high, inside the mask
  const int first = low <= 2 ? 0 : (low + 2) / 5;
  const int last = high < 3 ? -1 : ((high - 3) / 5 < size - 1 ? (high - 3) / 5 : size - 1);
  const double slope = wide ? static_cast<double>(y1 - y0) / dx : static_cast<double>(x1 - x0) / dy;
  for (int x = first; x <= last; ++x) {
    int row;
    if (wide) {
      const int t = 5 * x + 2 - x0, a = across(y0, slope, t), b = across(y0, slope, t + 1);
      row = a < b ? a : b;
    } else {
      // the last step before the walk passes between 5x + 2 and 5x + 3 (monotonic in t)
      int before = 0, after = dy;
      const bool rising = x1 > x0;
      while (after - before > 1) {
        const int middle = before + (after - before) / 2;
        const bool passed = (across(x0, slope, middle) > 5 * x + 2) == rising;
        if (passed) {
          after = middle;
        } else {
          before = middle;
        }
      }
      row = y0 + before;
    }
    toggle(x * size + crossing_row(row, size));
  }
}

}  // namespace detectron
