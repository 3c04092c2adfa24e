// Bias, residual and ReLU after a convolution in one pass over memory, and the gradients.
//
// Channels last: a thread keeps to one group of V channels (16 bytes), so that it loads their biases once.
// NCHW: V neighbouring pixels of one channel.
#include "conv_epilogue.h"
#include "values_device.h"

namespace detectron::kernels {
namespace {

constexpr int kThreads = 256;
// Loads of each operand that a thread has under way, so that kResident blocks a multiprocessor keep the
// memory busy.
constexpr int kInFlight = 4, kInFlightBackward = 2;
constexpr int kResident = 4;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t elements(const EpilogueMaps& p) {
  return p.images * p.channels * p.height * p.width;
}

// Not through the read-only path: `from` may be written by the same kernel.
template <typename T, int V>
__device__ __forceinline__ void load(Packed<T, V>& to, const T* from) {
  if constexpr (V == 1) {
    to.value = *from;
  } else {
    to.words = *reinterpret_cast<const uint4*>(from);
  }
}

template <typename T, int V>
__device__ __forceinline__ void store(T* to, const Acc<T> (&from)[V]) {
  Packed<T, V> packed;
  packed.pack(from);
  packed.store(to);
}

// ---- forward ------------------------------------------------------------------------------------

enum class Residual { kNone, kSame, kUpsampled };

template <typename T>
__device__ __forceinline__ Acc<T> bias_of(const BiasAct& p, int64_t channel) {
  if (p.bias == nullptr) return 0;
  return p.bias_wide ? static_cast<const Acc<T>*>(p.bias)[channel]
                     : to_acc(static_cast<const T*>(p.bias)[channel]);
}

// The pixel of the map of half the size that lies over `pixel` (n * height * width + y * width + x).
__device__ __forceinline__ int64_t coarse_pixel(const EpilogueMaps& p, int64_t pixel) {
  const unsigned width = static_cast<unsigned>(p.width), height = static_cast<unsigned>(p.height);
  const unsigned row = static_cast<unsigned>(pixel) / width;  // the host checks that pixels fit
  const unsigned x = static_cast<unsigned>(pixel) - row * width;
  const unsigned image = row / height, y = row - image * height;
  return (static_cast<int64_t>(image) * (height / 2) + y / 2) * (width / 2) + x / 2;
}

// The number of blocks is such that a thread's stride is whole pixels: see blocks_of_whole_pixels().
template <typename T, int V, Residual kResidual>
__global__ void __launch_bounds__(kThreads, kResident) bias_act_channels_last(BiasAct p) {
  using A = Acc<T>;
  const T* in = static_cast<const T*>(p.in);
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  const int64_t groups = p.channels / V, total = p.images * p.height * p.width * groups;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads, pixels = stride / groups;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (first >= total) return;
  int64_t pixel = first / groups;
  const int64_t channel = (first - pixel * groups) * V;
  A bias[V];
#pragma unroll
  for (int v = 0; v < V; ++v) bias[v] = bias_of<T>(p, channel + v);

  for (int64_t i = first; i < total; i += kInFlight * stride) {
    Packed<T, V> a[kInFlight], b[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k, pixel += pixels) {
      const int64_t j = i + k * stride;
      if (j >= total) continue;
      load<T, V>(a[k], in + j * V);
      if constexpr (kResidual == Residual::kSame) b[k].load(residual + j * V);
      if constexpr (kResidual == Residual::kUpsampled) {
        b[k].load(residual + coarse_pixel(p, pixel) * p.channels + channel);
      }
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int64_t j = i + k * stride;
      if (j >= total) continue;
      A value[V], added[V];
      a[k].expand(value);
      if constexpr (kResidual != Residual::kNone) b[k].expand(added);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        value[v] += bias[v];
        if constexpr (kResidual != Residual::kNone) value[v] += added[v];
        if (p.relu && value[v] < 0) value[v] = 0;  // NaN stays
      }
      store<T, V>(out + j * V, value);
    }
  }
}

// V > 1 only where no vector straddles two channels, and never with an upsampled residual.
template <typename T, int V, Residual kResidual>
__global__ void __launch_bounds__(kThreads) bias_act_planes(BiasAct p) {
  using A = Acc<T>;
  const T* in = static_cast<const T*>(p.in);
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  const int64_t area = p.height * p.width, total = p.images * p.channels * area;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * V;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V; i < total;
       i += stride) {
    const int64_t plane = i / area;
    const A bias = bias_of<T>(p, plane % p.channels);
    Packed<T, V> a, b;
    load<T, V>(a, in + i);
    A value[V], added[V];
    a.expand(value);
    if constexpr (kResidual == Residual::kSame) b.load(residual + i);
    if constexpr (kResidual == Residual::kUpsampled) {
      const int64_t pixel = i - plane * area, y = pixel / p.width, x = pixel - y * p.width;
      b.load(residual + plane * (area / 4) + (y / 2) * (p.width / 2) + x / 2);
    }
    if constexpr (kResidual != Residual::kNone) b.expand(added);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      value[v] += bias;
      if constexpr (kResidual != Residual::kNone) value[v] += added[v];
      if (p.relu && value[v] < 0) value[v] = 0;
    }
    store<T, V>(out + i, value);
  }
}

inline int64_t gcd(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

// About as many blocks as fill the GPU, in number such that their threads are a multiple of `groups`.
inline unsigned blocks_of_whole_pixels(const EpilogueMaps& p, int64_t items, int64_t groups) {
  const int64_t wanted = ceil_div(items, kThreads), most = kResident * p.multiprocessors;
  const int64_t whole = groups / gcd(groups, kThreads);
  return static_cast<unsigned>(ceil_div(wanted < most ? wanted : most, whole) * whole);
}

template <typename T, int V, Residual kResidual>
void launch_bias_act(const BiasAct& p, cudaStream_t stream) {
  const int64_t items = elements(p) / V;
  if (p.channels_last) {
    const unsigned blocks = blocks_of_whole_pixels(p, items, p.channels / V);
    bias_act_channels_last<T, V, kResidual><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    const int64_t most = 16 * p.multiprocessors, wanted = ceil_div(items, kThreads);
    const auto blocks = static_cast<unsigned>(wanted < most ? wanted : most);
    bias_act_planes<T, V, kResidual><<<blocks, kThreads, 0, stream>>>(p);
  }
}

// ---- backward -----------------------------------------------------------------------------------

constexpr int kMaxLanes = 32;  // threads side by side on the channels of a pixel

// A block works on `lanes` groups of V channels, kThreads / lanes pixels at a time; lanes is a power of 2.
// blockIdx.x: which groups; blockIdx.y: which part of the pixels.
template <typename T, int V, bool kMask, bool kSum>
__global__ void __launch_bounds__(kThreads, kResident) backward_channels_last(ReluBackward p, int lanes) {
  using A = Acc<T>;
  const T* grad = static_cast<const T*>(p.grad);
  const T* y = static_cast<const T*>(p.y);
  T* masked = static_cast<T*>(p.masked);
  const int lane = static_cast<int>(threadIdx.x) % lanes, row = static_cast<int>(threadIdx.x) / lanes;
  const int rows = kThreads / lanes;
  const int64_t groups = p.channels / V, group = static_cast<int64_t>(blockIdx.x) * lanes + lane;
  const int64_t pixels = p.images * p.height * p.width;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * rows;
  A sum[V] = {};
  if (group < groups) {
    for (int64_t i = static_cast<int64_t>(blockIdx.y) * rows + row; i < pixels;
         i += kInFlightBackward * stride) {
      Packed<T, V> g[kInFlightBackward], o[kInFlightBackward];
#pragma unroll
      for (int k = 0; k < kInFlightBackward; ++k) {
        const int64_t at = ((i + k * stride) * groups + group) * V;
        if (i + k * stride >= pixels) continue;
        g[k].load(grad + at);
        if constexpr (kMask) o[k].load(y + at);
      }
#pragma unroll
      for (int k = 0; k < kInFlightBackward; ++k) {
        const int64_t at = ((i + k * stride) * groups + group) * V;
        if (i + k * stride >= pixels) continue;
        A value[V];
        g[k].expand(value);
        if constexpr (kMask) {
          A output[V];
          o[k].expand(output);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            if (output[v] <= 0) value[v] = 0;
          }
          store<T, V>(masked + at, value);
        }
        if constexpr (kSum) {
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] += value[v];
        }
      }
    }
  }
  if constexpr (kSum) {
    __shared__ A shared[V][kThreads];
#pragma unroll
    for (int v = 0; v < V; ++v) shared[v][threadIdx.x] = sum[v];
    for (int half = rows / 2; half > 0; half /= 2) {
      __syncthreads();
      if (row < half) {
#pragma unroll
        for (int v = 0; v < V; ++v) shared[v][threadIdx.x] += shared[v][threadIdx.x + half * lanes];
      }
    }
    if (row == 0 && group < groups) {
      A* part = static_cast<A*>(p.partials) + blockIdx.y * p.channels + group * V;
#pragma unroll
      for (int v = 0; v < V; ++v) part[v] = shared[v][threadIdx.x];  // this thread's own sum
    }
  }
}

// blockIdx.x: channel; blockIdx.y: which part of its pixels. V > 1 only where V divides the map's area.
template <typename T, int V, bool kMask, bool kSum>
__global__ void __launch_bounds__(kThreads) backward_planes(ReluBackward p) {
  using A = Acc<T>;
  const T* grad = static_cast<const T*>(p.grad);
  const T* y = static_cast<const T*>(p.y);
  T* masked = static_cast<T*>(p.masked);
  const int64_t area = p.height * p.width, items = p.images * (area / V), channel = blockIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kThreads;
  A sum = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < items;
       i += stride) {
    const int64_t image = i / (area / V);
    const int64_t at = (image * p.channels + channel) * area + (i - image * (area / V)) * V;
    Packed<T, V> g, o;
    A value[V];
    g.load(grad + at);
    g.expand(value);
    if constexpr (kMask) {
      A output[V];
      o.load(y + at);
      o.expand(output);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (output[v] <= 0) value[v] = 0;
      }
      store<T, V>(masked + at, value);
    }
    if constexpr (kSum) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum += value[v];
    }
  }
  if constexpr (kSum) {
    __shared__ A shared[kThreads];
    shared[threadIdx.x] = sum;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    if (threadIdx.x == 0) {
      static_cast<A*>(p.partials)[blockIdx.y * p.channels + channel] = shared[0];
    }
  }
}

constexpr int kColumns = 32;

// sum[c] = sum of partials[:, c]; a block makes kColumns channels.
template <typename A>
__global__ void __launch_bounds__(kThreads) add_partials(
    const A* partials, int64_t parts, int64_t channels, A* sum) {
  constexpr int kRows = kThreads / kColumns;
  __shared__ A shared[kThreads];
  const int column = threadIdx.x % kColumns, row = threadIdx.x / kColumns;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kColumns + column;
  A total = 0;
  if (channel < channels) {
    for (int64_t i = row; i < parts; i += kRows) total += partials[i * channels + channel];
  }
  shared[threadIdx.x] = total;
  for (int half = kRows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row < half) shared[threadIdx.x] += shared[threadIdx.x + half * kColumns];
  }
  if (row == 0 && channel < channels) sum[channel] = shared[threadIdx.x];
}

struct BackwardGrid {
  int lanes;  // 0: planes
  dim3 grid;
};

inline BackwardGrid backward_grid(const EpilogueMaps& p, int vector) {
  BackwardGrid out{0, dim3(static_cast<unsigned>(p.channels))};
  int64_t items = p.images * p.height * p.width, columns = p.channels, at_once = kThreads;
  if (p.channels_last) {
    const int64_t groups = p.channels / vector;
    out.lanes = 1;
    while (out.lanes < groups && out.lanes < kMaxLanes) out.lanes *= 2;
    columns = ceil_div(groups, out.lanes);
    at_once = kThreads / out.lanes;
  } else {
    items /= vector;
  }
  const int64_t wanted = ceil_div(kResident * p.multiprocessors, columns);
  const int64_t most = ceil_div(items, at_once * kInFlightBackward);
  out.grid = dim3(static_cast<unsigned>(columns), static_cast<unsigned>(wanted < most ? wanted : most));
  return out;
}

template <typename T, int V, bool kMask, bool kSum>
void launch_backward(const ReluBackward& p, cudaStream_t stream) {
  using A = Acc<T>;
  const BackwardGrid g = backward_grid(p, V);
  if (p.channels_last) {
    backward_channels_last<T, V, kMask, kSum><<<g.grid, kThreads, 0, stream>>>(p, g.lanes);
  } else {
    backward_planes<T, V, kMask, kSum><<<g.grid, kThreads, 0, stream>>>(p);
  }
  if constexpr (kSum) {
    const auto blocks = static_cast<unsigned>(ceil_div(p.channels, kColumns));
    add_partials<A><<<blocks, kThreads, 0, stream>>>(
        static_cast<const A*>(p.partials), g.grid.y, p.channels, static_cast<A*>(p.sum));
  }
}

template <typename T, int V>
void launch_backward(const ReluBackward& p, cudaStream_t stream) {
  if (p.y == nullptr) return launch_backward<T, V, false, true>(p, stream);
  if (p.sum == nullptr) return launch_backward<T, V, true, false>(p, stream);
  return launch_backward<T, V, true, true>(p, stream);
}

// ---- sums of 2x2 ----------------------------------------------------------------------------------

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) sum_2x2_channels_last(Sum2x2 p) {
  using A = Acc<T>;
  const T* in = static_cast<const T*>(p.in);
  T* out = static_cast<T*>(p.out);
  const int64_t groups = p.channels / V, half_h = p.height / 2, half_w = p.width / 2;
  const int64_t total = p.images * half_h * half_w * groups;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads, pixels = stride / groups;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (first >= total) return;
  int64_t pixel = first / groups;
  const int64_t channel = (first - pixel * groups) * V;
  for (int64_t i = first; i < total; i += stride, pixel += pixels) {
    // Rows of all images in one count: they have an even number of rows each.
    const unsigned row = static_cast<unsigned>(pixel) / static_cast<unsigned>(half_w);
    const int64_t x = pixel - static_cast<int64_t>(row) * half_w;
    const T* corner = in + (2 * static_cast<int64_t>(row) * p.width + 2 * x) * p.channels + channel;
    Packed<T, V> taps[4];
    taps[0].load(corner);
    taps[1].load(corner + p.channels);
    taps[2].load(corner + p.width * p.channels);
    taps[3].load(corner + (p.width + 1) * p.channels);
    A sum[V] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      A value[V];
      taps[k].expand(value);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += value[v];
    }
    store<T, V>(out + i * V, sum);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sum_2x2_planes(Sum2x2 p) {
  const T* in = static_cast<const T*>(p.in);
  T* out = static_cast<T*>(p.out);
  const int64_t half_w = p.width / 2, total = p.images * p.channels * (p.height / 2) * half_w;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += stride) {
    const int64_t row = i / half_w, x = i - row * half_w;  // rows of all planes in one count
    const T* corner = in + 2 * row * p.width + 2 * x;
    const Acc<T> top = to_acc(corner[0]) + to_acc(corner[1]);
    out[i] = from_acc<T>(top + to_acc(corner[p.width]) + to_acc(corner[p.width + 1]));
  }
}

template <typename T>
constexpr int kPerVector = 16 / sizeof(T);

// Whether vectors can be taken of these maps, all of whose addresses are given.
template <typename T, typename... Pointers>
bool vectors_fit(const EpilogueMaps& p, Pointers... pointers) {
  const int64_t run = p.channels_last ? p.channels : p.height * p.width;
  return run % kPerVector<T> == 0 && (aligned_to(pointers, 16) && ...);
}

template <typename T, int V>
void launch_bias_act(const BiasAct& p, cudaStream_t stream) {
  if (p.residual == nullptr) return launch_bias_act<T, V, Residual::kNone>(p, stream);
  if (p.upsample) return launch_bias_act<T, V, Residual::kUpsampled>(p, stream);
  return launch_bias_act<T, V, Residual::kSame>(p, stream);
}

}  // namespace

void bias_act(const BiasAct& p, cudaStream_t stream) {
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool neighbours_share = p.channels_last || p.residual == nullptr || !p.upsample;
    if (neighbours_share && vectors_fit<T>(p, p.in, p.residual, p.out)) {
      launch_bias_act<T, kPerVector<T>>(p, stream);
    } else {
      launch_bias_act<T, 1>(p, stream);
    }
  });
}

int64_t channel_sum_parts(const EpilogueMaps& p) {
  // The most that any width of vectors asks for.
  int64_t parts = backward_grid(p, 1).grid.y;
  with_type(p.dtype, [&](auto zero) {
    constexpr int kVector = kPerVector<decltype(zero)>;
    if (!vectors_fit<decltype(zero)>(p)) return;
    const int64_t others = backward_grid(p, kVector).grid.y;
    parts = parts > others ? parts : others;
  });
  return parts;
}

void relu_backward(const ReluBackward& p, cudaStream_t stream) {
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (vectors_fit<T>(p, p.grad, p.y, p.masked)) {
      launch_backward<T, kPerVector<T>>(p, stream);
    } else {
      launch_backward<T, 1>(p, stream);
    }
  });
}

void sum_2x2(const Sum2x2& p, cudaStream_t stream) {
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t outputs = elements(p) / 4;
    if (!p.channels_last) {
      const int64_t most = 16 * p.multiprocessors, wanted = ceil_div(outputs, kThreads);
      const auto blocks = static_cast<unsigned>(wanted < most ? wanted : most);
      sum_2x2_planes<T><<<blocks, kThreads, 0, stream>>>(p);
    } else if (vectors_fit<T>(p, p.in, p.out)) {
      constexpr int V = kPerVector<T>;
      const unsigned blocks = blocks_of_whole_pixels(p, outputs / V, p.channels / V);
      sum_2x2_channels_last<T, V><<<blocks, kThreads, 0, stream>>>(p);
    } else {
      const unsigned blocks = blocks_of_whole_pixels(p, outputs, p.channels);
      sum_2x2_channels_last<T, 1><<<blocks, kThreads, 0, stream>>>(p);
    }
  });
}

}  // namespace detectron::kernels
