// What the operators on detections share between CPU and CUDA: the arithmetic, one box pair or pixel at a
// time, so that both give the same results.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace detectron {

HOST_DEVICE float smaller(float a, float b) { return b < a ? b : a; }
HOST_DEVICE float larger(float a, float b) { return b > a ? b : a; }

// IoU with Detectron's +1 widths; 0 for boxes that do not intersect (or are not numbers).
HOST_DEVICE float box_iou(const float* a, const float* b) {
  const float w = smaller(a[2], b[2]) - larger(a[0], b[0]) + 1.f;
  const float h = smaller(a[3], b[3]) - larger(a[1], b[1]) + 1.f;
  if (!(w > 0.f && h > 0.f)) return 0.f;
  const float inter = w * h;
  const float area_a = (a[2] - a[0] + 1.f) * (a[3] - a[1] + 1.f);
  const float area_b = (b[2] - b[0] + 1.f) * (b[3] - b[1] + 1.f);
  const float iou = inter / (area_a + area_b - inter);
  return iou == iou ? iou : 0.f;
}

// ---- soft-NMS ----

enum class Decay : int { hard, linear, gaussian };

struct SoftNmsRule {
  Decay method;
  float sigma, overlap_thresh, score_thresh;

  // What a box's score is multiplied by when a better box overlaps it that much.
  HOST_DEVICE float weight(float iou) const {
    if (method == Decay::gaussian) {
      return static_cast<float>(exp(-static_cast<double>(iou * iou) / static_cast<double>(sigma)));
    }
    if (!(iou > overlap_thresh)) return 1.f;
    return method == Decay::linear ? 1.f - iou : 0.f;
  }
};

// ---- box voting ----

enum class VoteScore : int { id, temp_avg, avg, iou_avg, generalized_avg, quasi_sum };

struct VoteRule {
  VoteScore method;
  float thresh;
  double beta;
};

// Sums over the voters of one box.
struct Votes {
  double count = 0, score = 0, iou = 0, special = 0;
  double box[4] = {0, 0, 0, 0};

  HOST_DEVICE void add(const VoteRule& rule, float overlap, const float* det) {
    const double s = det[4];
    count += 1;
    score += s;
    iou += overlap;
    for (int k = 0; k < 4; ++k) box[k] += s * det[k];
    if (rule.method == VoteScore::iou_avg) {
      special += s * overlap;
    } else if (rule.method == VoteScore::generalized_avg) {
      special += pow(s, rule.beta);
    } else if (rule.method == VoteScore::temp_avg) {
      const double yes = pow(s, 1 / rule.beta), no = pow(1 - s, 1 / rule.beta);
      special += yes / (yes + no);
    }
  }

  // The voted (x1, y1, x2, y2, score); `det` itself where nothing voted.
  HOST_DEVICE void result(const VoteRule& rule, const float* det, float* out) const {
    for (int k = 0; k < 5; ++k) out[k] = det[k];
    if (count == 0) return;
    if (score != 0) {
      for (int k = 0; k < 4; ++k) out[k] = static_cast<float>(box[k] / score);
    }
    switch (rule.method) {
      case VoteScore::id: break;
      case VoteScore::temp_avg: out[4] = static_cast<float>(special / count); break;
      case VoteScore::avg: out[4] = static_cast<float>(score / count); break;
      case VoteScore::iou_avg:
        if (iou > 0) out[4] = static_cast<float>(special / iou);
        break;
      case VoteScore::generalized_avg:
        out[4] = static_cast<float>(pow(special / count, 1 / rule.beta));
        break;
      case VoteScore::quasi_sum: out[4] = static_cast<float>(score / pow(count, rule.beta)); break;
    }
  }
};

}  // namespace detectron
