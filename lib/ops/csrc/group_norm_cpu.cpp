// Group normalisation with an addition and a ReLU. Maps are read as (images, pixels, channels), in blocks of
// pixels that the cache holds: the first pass over a block gives sums of each channel, the second the result.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "group_norm_checks.h"
#include "ops.h"

// The loops below are compiled for wider registers too; the widest that there are run. Nothing is summed across
// lanes and products are not fused into sums, so that the results are the same.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DETECTRON_WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DETECTRON_WIDE
#endif
#define DETECTRON_INLINE inline __attribute__((always_inline))

namespace detectron::cpu {
namespace {

constexpr int64_t kBlock = 1 << 14;  // values

struct Shape {
  int64_t images, channels, groups, pixels;
  int64_t rows, blocks;  // pixels of a block, blocks of an image

  Shape(const Tensor& x, int64_t groups)
      : images(x.size(0)), channels(x.size(1)), groups(groups), pixels(x.size(2) * x.size(3)) {
    rows = std::min(pixels, std::max<int64_t>(1, kBlock / channels));
    blocks = (pixels + rows - 1) / rows;
  }
  int64_t rows_of(int64_t block) const { return std::min(rows, pixels - block * rows); }
  int64_t offset(int64_t image, int64_t block) const {
    return (image * pixels + block * rows) * channels;
  }
};

// What the loops over a block read and write, as far as they do.
template <typename T>
struct Block {
  int64_t rows, channels;
  const T *x, *grad, *residual, *out;  // maps at the block's beginning; out: y, where the ReLU's mask is its
  const T *mean, *scale, *bias;        // of each channel: y = (x - mean) * scale + bias
  const T *slope, *offset;             // of each channel
  bool relu;
  T* to;             // the map that is made
  T *first, *second;  // sums of each channel
};

template <typename T>
using Lanes __attribute__((vector_size(64))) = T;

template <typename V, typename T>
DETECTRON_INLINE void load(V& lanes, const T* from) {
  __builtin_memcpy(&lanes, from, sizeof(V));
}

template <typename V, typename T>
DETECTRON_INLINE void store(const V& lanes, T* to) {
  __builtin_memcpy(to, &lanes, sizeof(V));
}

// Mean of each channel over a block's pixels, and sum of squared distances from it. Here and below for the
// channels from c on that V holds.
struct Moments {
  template <typename V, typename T>
  static DETECTRON_INLINE void run(const Block<T>& block, int64_t c) {
    const int64_t rows = block.rows, stride = block.channels;
    const T *begin = block.x + c, *from = begin;
    V centre, value, sum = {}, squares = {};
    load(centre, begin);
    for (int64_t r = 0; r < rows; ++r, from += stride) {
      load(value, from);
      sum += value - centre;
    }
    centre += sum / static_cast<T>(rows);
    sum -= sum;
    from = begin;
    for (int64_t r = 0; r < rows; ++r, from += stride) {
      load(value, from);
      value -= centre;
      sum += value;
      squares += value * value;
    }
    const V off = sum / static_cast<T>(rows);  // as far as rounding has left the mean off
    store(V(centre + off), block.first + c);
    store(V(squares - sum * off), block.second + c);
  }
};

// act((x - mean) * scale + bias + residual).
template <bool kResidual, bool kRelu>
struct Apply {
  template <typename V, typename T>
  static DETECTRON_INLINE void run(const Block<T>& block, int64_t c) {
    V mean, scale, bias, value, added;
    const V zero = {};
    load(mean, block.mean + c);
    load(scale, block.scale + c);
    load(bias, block.bias + c);
    const int64_t end = block.rows * block.channels;
    for (int64_t at = c; at < end; at += block.channels) {
      load(value, block.x + at);
      value = (value - mean) * scale + bias;
      if (kResidual) {
        load(added, block.residual + at);
        value += added;
      }
      if (kRelu) value = value <= zero ? zero : value;  // NaN stays
      store(value, block.to + at);
    }
  }
};

// Sums of the gradient before the ReLU (g) and of g * (x - mean). With `out` g itself is kept.
template <bool kRelu, bool kOut>
struct Sums {
  template <typename V, typename T>
  static DETECTRON_INLINE void run(const Block<T>& block, int64_t c) {
    V mean, scale, bias, distance, grad, y, sum = {}, product = {};
    const V zero = {};
    load(mean, block.mean + c);
    load(scale, block.scale + c);
    load(bias, block.bias + c);
    const int64_t end = block.rows * block.channels;
    for (int64_t at = c; at < end; at += block.channels) {
      load(distance, block.x + at);
      load(grad, block.grad + at);
      distance -= mean;
      if (kOut) {
        load(y, block.out + at);
      } else {
        y = distance * scale + bias;
      }
      if (kRelu) grad = y <= zero ? zero : grad;
      if (kOut) store(grad, block.to + at);
      sum += grad;
      product += grad * distance;
    }
    store(sum, block.first + c);
    store(product, block.second + c);
  }
};

// g * scale - (x - mean) * slope - offset, g the gradient before the ReLU.
template <bool kRelu>
struct Gradient {
  template <typename V, typename T>
  static DETECTRON_INLINE void run(const Block<T>& block, int64_t c) {
    V mean, scale, bias, slope, offset, distance, grad;
    const V zero = {};
    load(mean, block.mean + c);
    load(scale, block.scale + c);
    load(bias, block.bias + c);
    load(slope, block.slope + c);
    load(offset, block.offset + c);
    const int64_t end = block.rows * block.channels;
    for (int64_t at = c; at < end; at += block.channels) {
      load(distance, block.x + at);
      load(grad, block.grad + at);
      distance -= mean;
      if (kRelu) grad = distance * scale + bias <= zero ? zero : grad;
      grad = grad * scale - distance * slope - offset;
      store(grad, block.to + at);
    }
  }
};

template <typename Loop, typename T>
DETECTRON_INLINE void over_channels(const Block<T>& block) {
  constexpr int64_t lanes = sizeof(Lanes<T>) / sizeof(T);
  int64_t c = 0;
  for (; c + lanes <= block.channels; c += lanes) Loop::template run<Lanes<T>>(block, c);
  for (; c < block.channels; ++c) Loop::template run<T>(block, c);
}

template <typename T>
DETECTRON_INLINE void apply_any(const Block<T>& block) {
  if (block.residual && block.relu) return over_channels<Apply<true, true>>(block);
  if (block.residual) return over_channels<Apply<true, false>>(block);
  if (block.relu) return over_channels<Apply<false, true>>(block);
  over_channels<Apply<false, false>>(block);
}

template <typename T>
DETECTRON_INLINE void sums_any(const Block<T>& block) {
  if (block.out) return over_channels<Sums<true, true>>(block);
  if (block.relu) return over_channels<Sums<true, false>>(block);
  over_channels<Sums<false, false>>(block);
}

template <typename T>
DETECTRON_INLINE void gradient_any(const Block<T>& block) {
  if (block.relu) return over_channels<Gradient<true>>(block);
  over_channels<Gradient<false>>(block);
}

// Clones are made of functions that are no templates.
#define DETECTRON_LOOPS(T)                                                                        \
  DETECTRON_WIDE void moments(const Block<T>& block) { over_channels<Moments>(block); }           \
  DETECTRON_WIDE void apply(const Block<T>& block) { apply_any(block); }                          \
  DETECTRON_WIDE void sums(const Block<T>& block) { sums_any(block); }                            \
  DETECTRON_WIDE void gradient(const Block<T>& block) { gradient_any(block); }
DETECTRON_LOOPS(float)
DETECTRON_LOOPS(double)
#undef DETECTRON_LOOPS

// read(image, block) for all blocks of an image, then finish(image), then write(image, block). Images are
// shared out, so that one is still in the cache when it is read again; where they are too few, blocks.
template <typename R, typename F, typename W>
void in_two_passes(const Shape& s, const R& read, const F& finish, const W& write) {
  if (s.images >= at::get_num_threads()) {
    const int64_t grain = std::max<int64_t>(1, kBlock / (s.pixels * s.channels));
    at::parallel_for(0, s.images, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t b = 0; b < s.blocks; ++b) read(i, b);
        finish(i);
        for (int64_t b = 0; b < s.blocks; ++b) write(i, b);
      }
    });
    return;
  }
  const auto everywhere = [&](const auto& function) {
    at::parallel_for(0, s.images * s.blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) function(k / s.blocks, k % s.blocks);
    });
  };
  everywhere(read);
  for (int64_t i = 0; i < s.images; ++i) finish(i);
  everywhere(write);
}

// The values of a channel's group, for every channel of an image.
template <typename T>
void spread(const Shape& s, const T* of_group, T* of_channel) {
  const int64_t size = s.channels / s.groups;
  for (int64_t g = 0; g < s.groups; ++g) std::fill_n(of_channel + g * size, size, of_group[g]);
}

template <typename T>
void forward(
    const Shape& s, const T* x, const T* residual, const T* weight, const T* bias, double eps,
    bool relu, T* y, T* mean, T* rstd) {
  const int64_t C = s.channels, size = C / s.groups;
  std::vector<T> partial(s.images * s.blocks * 2 * C), factors(s.images * 2 * C);
  const auto read = [&](int64_t i, int64_t b) {
    T* to = partial.data() + (i * s.blocks + b) * 2 * C;
    Block<T> block{s.rows_of(b), C};
    block.x = x + s.offset(i, b);
    block.first = to;
    block.second = to + C;
    moments(block);
  };
  const auto finish = [&](int64_t i) {
    const T* from = partial.data() + i * s.blocks * 2 * C;
    for (int64_t g = 0; g < s.groups; ++g) {
      double sum = 0, square = 0;
      const auto each = [&](const auto& function) {
        for (int64_t b = 0; b < s.blocks; ++b) {
          for (int64_t c = g * size; c < (g + 1) * size; ++c) {
            function(from[b * 2 * C + c], from[b * 2 * C + C + c], double(s.rows_of(b)));
          }
        }
      };
      const double count = double(s.pixels * size);
      each([&](double m, double, double n) { sum += n * m; });
      const double centre = sum / count;
      each([&](double m, double q, double n) { square += q + n * (m - centre) * (m - centre); });
      mean[i * s.groups + g] = static_cast<T>(centre);
      rstd[i * s.groups + g] = static_cast<T>(1 / std::sqrt(square / count + eps));
    }
    T* means = factors.data() + i * 2 * C;
    spread(s, mean + i * s.groups, means);
    spread(s, rstd + i * s.groups, means + C);
    for (int64_t c = 0; c < C; ++c) means[C + c] *= weight[c];
  };
  in_two_passes(s, read, finish, [&](int64_t i, int64_t b) {
    const T* means = factors.data() + i * 2 * C;
    const int64_t at = s.offset(i, b);
    Block<T> block{s.rows_of(b), C};
    block.x = x + at;
    block.residual = residual ? residual + at : nullptr;
    block.mean = means;
    block.scale = means + C;
    block.bias = bias;
    block.relu = relu;
    block.to = y + at;
    apply(block);
  });
}

template <typename T>
void backward(
    const Shape& s, const T* grad, const T* x, const T* out, const T* weight, const T* bias,
    const T* mean, const T* rstd, bool relu, T* dx, T* dresidual, T* dweight, T* dbias) {
  const int64_t C = s.channels, size = C / s.groups;
  std::vector<T> partial(s.images * s.blocks * 2 * C), factors(s.images * 4 * C);
  std::vector<double> parameters(s.images * 2 * C);
  for (int64_t i = 0; i < s.images; ++i) {
    T* means = factors.data() + i * 4 * C;
    spread(s, mean + i * s.groups, means);
    spread(s, rstd + i * s.groups, means + C);
    for (int64_t c = 0; c < C; ++c) means[C + c] *= weight[c];
  }
  const auto block_of = [&](int64_t i, int64_t b) {
    const T* means = factors.data() + i * 4 * C;
    Block<T> block{s.rows_of(b), C};
    block.x = x + s.offset(i, b);
    block.mean = means;
    block.scale = means + C;
    block.bias = bias;
    block.slope = means + 2 * C;
    block.offset = means + 3 * C;
    return block;
  };
  const auto read = [&](int64_t i, int64_t b) {
    const int64_t at = s.offset(i, b);
    Block<T> block = block_of(i, b);
    block.grad = grad + at;
    block.out = out ? out + at : nullptr;
    block.relu = relu;
    block.to = out ? dresidual + at : nullptr;
    block.first = partial.data() + (i * s.blocks + b) * 2 * C;
    block.second = block.first + C;
    sums(block);
  };
  const auto finish = [&](int64_t i) {
    T* slope = factors.data() + i * 4 * C + 2 * C;
    double* db = parameters.data() + i * 2 * C;
    double* dw = db + C;
    for (int64_t b = 0; b < s.blocks; ++b) {
      const T* from = partial.data() + (i * s.blocks + b) * 2 * C;
      for (int64_t c = 0; c < C; ++c) db[c] += from[c], dw[c] += from[C + c];
    }
    for (int64_t g = 0; g < s.groups; ++g) {
      const double r = rstd[i * s.groups + g], count = double(s.pixels * size);
      double s1 = 0, s2 = 0;
      for (int64_t c = g * size; c < (g + 1) * size; ++c) {
        dw[c] *= r;
        s1 += weight[c] * db[c];
        s2 += weight[c] * dw[c];
      }
      std::fill_n(slope + g * size, size, static_cast<T>(r * r * s2 / count));
      std::fill_n(slope + C + g * size, size, static_cast<T>(r * s1 / count));
    }
  };
  in_two_passes(s, read, finish, [&](int64_t i, int64_t b) {
    const int64_t at = s.offset(i, b);
    Block<T> block = block_of(i, b);
    block.grad = (out ? dresidual : grad) + at;
    block.relu = relu && !out;
    block.to = dx + at;
    gradient(block);
  });
  for (int64_t c = 0; c < C; ++c) {
    double db = 0, dw = 0;
    for (int64_t i = 0; i < s.images; ++i) {
      db += parameters[i * 2 * C + c];
      dw += parameters[i * 2 * C + C + c];
    }
    dbias[c] = static_cast<T>(db);
    dweight[c] = static_cast<T>(dw);
  }
}

// A map as the loops read it: channels last, in the type that sums are taken in.
Tensor as_read(const Tensor& map) {
  return map.to(accumulate_dtype(map.scalar_type())).contiguous(at::MemoryFormat::ChannelsLast);
}

Tensor like(const Tensor& values, const Tensor& x) {
  return values.to(x.scalar_type()).contiguous(group_norm_layout(x));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> group_norm(
    const Tensor& x, const Tensor& weight, const Tensor& bias,
    const std::optional<Tensor>& residual, int64_t groups, double eps, bool relu) {
  check_group_norm("group_norm", x, weight, bias, groups);
  check_group_norm_map("group_norm: residual", residual, x);
  if (x.numel() == 0) {
    const Tensor none = at::zeros({x.size(0), groups}, weight.options());
    return {at::empty(x.sizes(), x.options(), group_norm_layout(x)), none, none.clone()};
  }
  const Tensor in = as_read(x), added = residual.has_value() ? as_read(*residual) : Tensor();
  const Tensor w = weight.contiguous(), b = bias.contiguous();
  Tensor y = at::empty_like(in), mean = at::empty({x.size(0), groups}, w.options());
  Tensor rstd = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "group_norm", [&] {
    forward<scalar_t>(
        Shape(x, groups), in.const_data_ptr<scalar_t>(),
        added.defined() ? added.const_data_ptr<scalar_t>() : nullptr, w.const_data_ptr<scalar_t>(),
        b.const_data_ptr<scalar_t>(), eps, relu, y.mutable_data_ptr<scalar_t>(),
        mean.mutable_data_ptr<scalar_t>(), rstd.mutable_data_ptr<scalar_t>());
  });
  return {like(y, x), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
    const Tensor& mean, const Tensor& rstd, const std::optional<Tensor>& out, int64_t groups,
    bool relu) {
  check_group_norm("group_norm_backward", x, weight, bias, groups);
  check_group_norm_map("group_norm_backward: grad", grad, x);
  check_group_norm_map("group_norm_backward: out", out, x);
  if (x.numel() == 0) {
    const Tensor none = at::zeros({x.size(1)}, weight.options());
    const Tensor dx = at::empty(x.sizes(), x.options(), group_norm_layout(x));
    return {dx, none, none.clone(), out.has_value() ? dx.clone() : at::empty({0}, x.options())};
  }
  const Tensor g = as_read(grad), in = as_read(x);
  const Tensor result = out.has_value() ? as_read(*out) : Tensor();
  const Tensor w = weight.contiguous(), b = bias.contiguous(), m = mean.contiguous(),
               r = rstd.contiguous();
  Tensor dx = at::empty_like(in), dweight = at::empty_like(w), dbias = at::empty_like(w);
  Tensor dresidual = out.has_value() ? at::empty_like(in) : at::empty({0}, in.options());
  AT_DISPATCH_FLOATING_TYPES(in.scalar_type(), "group_norm_backward", [&] {
    backward<scalar_t>(
        Shape(x, groups), g.const_data_ptr<scalar_t>(), in.const_data_ptr<scalar_t>(),
        result.defined() ? result.const_data_ptr<scalar_t>() : nullptr, w.const_data_ptr<scalar_t>(),
        b.const_data_ptr<scalar_t>(), m.const_data_ptr<scalar_t>(), r.const_data_ptr<scalar_t>(), relu,
        dx.mutable_data_ptr<scalar_t>(),
        result.defined() ? dresidual.mutable_data_ptr<scalar_t>() : nullptr,
        dweight.mutable_data_ptr<scalar_t>(), dbias.mutable_data_ptr<scalar_t>());
  });
  return {
      like(dx, x), dweight, dbias,
      out.has_value() ? like(dresidual, x) : dresidual.to(x.scalar_type())};
}

}  // namespace detectron::cpu
