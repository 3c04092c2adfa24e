// The focal loss of a sigmoid and its gradient, in one pass over the logits.
#include "focal_loss.h"
#include "values_device.h"

namespace detectron::kernels {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct GradientOf {
  using type = T;
};
template <>
struct GradientOf<__half> {
  using type = float;  // it could underflow
};

__device__ __forceinline__ float power(float x, float e) { return e == 2.f ? x * x : powf(x, e); }
__device__ __forceinline__ double power(double x, double e) { return e == 2. ? x * x : pow(x, e); }

// ln(1 + exp(x)) and the sigmoid of x.
template <typename A>
__device__ __forceinline__ void soften(A x, A* softplus, A* sigmoid) {
  const A e = exp(-fabs(x)), whole = A(1) / (A(1) + e);
  *softplus = (x > A(0) ? x : A(0)) + log1p(e);
  *sigmoid = x < A(0) ? e * whole : whole;
}

// Where a logit lies: its class and the place of its label. Steps go through memory.
struct Place {
  int64_t outer, within;
  int channel;

  __device__ Place(const FocalLoss& p, int64_t at) {
    const bool small = p.count <= 0xffffffffll;  // then 32 bits divide much sooner
    const int64_t row = divide(at, p.inner, small);
    within = at - row * p.inner;
    outer = divide(row, p.classes, small);
    channel = static_cast<int>(row - outer * p.classes);
  }
  // Whether the label is another one now.
  __device__ __forceinline__ bool step(const FocalLoss& p) {
    if (++within < p.inner) return true;
    within = 0;
    if (++channel == p.classes) {
      channel = 0;
      ++outer;
      return true;
    }
    return p.inner > 1;
  }
  __device__ __forceinline__ int64_t label(const FocalLoss& p) const {
    return p.labels[outer * p.inner + within];
  }

 private:
  static __device__ __forceinline__ int64_t divide(int64_t a, int64_t b, bool small) {
    return small ? static_cast<unsigned>(a) / static_cast<unsigned>(b) : a / b;
  }
};

template <typename A>
__device__ __forceinline__ A cost(A x, bool own, A alpha, A gamma, A* grad) {
  A log, p;  // of the probability of what is wrong: -ln(1 - p), p
  soften<A>(own ? -x : x, &log, &p);
  const A weight = (own ? alpha : A(1) - alpha) * power(p, gamma);
  const A slope = weight * (p + gamma * (A(1) - p) * log);
  *grad = own ? -slope : slope;
  constexpr A kMostLog = A(87.33654475055310898657);  // of the least normal float
  return weight * (own && log > kMostLog ? kMostLog : log);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) focal_loss(FocalLoss p) {
  using A = Acc<T>;
  using G = typename GradientOf<T>::type;
  const A alpha = static_cast<A>(p.alpha), gamma = static_cast<A>(p.gamma);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * V;
  double total = 0;
  for (int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V; at < p.count;
       at += stride) {
    Packed<T, V> raw;
    raw.load(static_cast<const T*>(p.logits) + at);
    A x[V], sum = 0;
    raw.expand(x);
    Vector<G, V> grads;
    Place place(p, at);
    int64_t label = place.label(p);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (v > 0 && place.step(p)) label = place.label(p);
      A grad = 0;
      if (label >= 0) sum += cost<A>(x[v], label == place.channel + 1, alpha, gamma, &grad);
      grads.v[v] = from_acc<G>(grad);
    }
    total += static_cast<double>(sum);
    if (p.grad) *reinterpret_cast<Vector<G, V>*>(static_cast<G*>(p.grad) + at) = grads;
  }
  __shared__ double of_warp[kThreads / 32];
  for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_down_sync(~0u, total, lanes);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kThreads / 32; ++w) total += of_warp[w];
  p.sums[blockIdx.x] = total;
}

template <typename T>
void launch(const FocalLoss& p, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool fit = p.count % kVector == 0 && aligned_to(p.logits, 16) && aligned_to(p.grad, 32);
  const auto kernel = fit ? &focal_loss<T, kVector> : &focal_loss<T, 1>;
  kernel<<<p.blocks, kThreads, 0, stream>>>(p);
}

}  // namespace

void sigmoid_focal_loss(const FocalLoss& p, cudaStream_t stream) {
  with_type(p.dtype, [&](auto zero) { launch<decltype(zero)>(p, stream); });
}

}  // namespace detectron::kernels
