// The anchors of an image that the RPN learns from: foreground without, background with replacement. The
// flags become bits, and a block an image counts them and draws ranks among the set ones.
#include "anchors_kernels.h"

namespace detectron::kernels {
namespace {

constexpr int kPackThreads = 256;
constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kMaxSlots = 2048;
constexpr unsigned kAll = 0xffffffffu;

__global__ void __launch_bounds__(kPackThreads) pack(SampleAnchors p, int64_t words) {
  const int64_t image = blockIdx.y;
  const int64_t a = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  const bool exists = a < p.count;
  const int64_t place = image * p.count + a;
  const unsigned foreground = __ballot_sync(kAll, exists && p.foreground[place]);
  const unsigned background = __ballot_sync(kAll, exists && p.background[place]);
  if (threadIdx.x % 32 == 0 && exists) {
    p.foreground_bits[image * words + a / 32] = foreground;
    p.background_bits[image * words + a / 32] = background;
  }
}

// Set bits of an image: thread t counts words [t * each, (t + 1) * each) and knows those before it.
struct Counted {
  const unsigned* bits;
  int64_t words;
  int each;
  int* before;  // (kThreads + 1,) in shared memory

  __device__ void count() {
    __shared__ int sums[kWarps];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t first = static_cast<int64_t>(threadIdx.x) * each;
    int own = 0;
    for (int64_t w = first; w < first + each && w < words; ++w) own += __popc(bits[w]);
    int through = own;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAll, through, step);
      if (lane >= step) through += other;
    }
    if (lane == 31) sums[warp] = through;
    __syncthreads();
    for (int w = 0; w < warp; ++w) through += sums[w];
    before[threadIdx.x + 1] = through;
    if (threadIdx.x == 0) before[0] = 0;
    __syncthreads();  // also guards the sums of the next count
  }

  __device__ int total() const { return before[kThreads]; }

  // Position of the set bit number `rank` < total().
  __device__ int64_t place(int rank) const {
    int low = 0, high = kThreads;  // before[low] <= rank < before[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (before[middle] <= rank) low = middle; else high = middle;
    }
    int left = rank - before[low];
    int64_t w = static_cast<int64_t>(low) * each;
    while (__popc(bits[w]) <= left) left -= __popc(bits[w++]);
    unsigned word = bits[w];
    for (; left > 0; --left) word &= word - 1;
    return 32 * w + __ffs(word) - 1;
  }
};

__global__ void __launch_bounds__(kThreads) draw(SampleAnchors p, int64_t words, int each) {
  __shared__ int foreground_before[kThreads + 1], background_before[kThreads + 1];
  __shared__ int rank[kMaxSlots], index[kMaxSlots];
  const int64_t image = blockIdx.x;
  Counted objects{p.foreground_bits + image * words, words, each, foreground_before};
  Counted rest{p.background_bits + image * words, words, each, background_before};
  objects.count();
  rest.count();
  const float* random = p.random + image * (p.max_foreground + static_cast<int64_t>(p.draws));
  const int total = objects.total(), others = rest.total();
  const int chosen = total < p.max_foreground ? total : p.max_foreground;
  if (threadIdx.x < 32) {
    // Floyd's way to draw without replacement, one after another; with nothing to choose all are taken.
    for (int i = 0; i < chosen; ++i) {
      const int last = total - chosen + i, drawn = draw_below(random[i], last + 1);
      bool taken = false;
      for (int k = threadIdx.x; k < i; k += 32) taken = taken || rank[k] == drawn;
      taken = __any_sync(kAll, taken);
      if (threadIdx.x == 0) rank[i] = total <= p.max_foreground ? i : taken ? last : drawn;
      __syncwarp();
    }
  }
  for (int i = threadIdx.x; i < p.draws - chosen; i += kThreads) {
    if (others <= p.draws - chosen) {
      rank[chosen + i] = i < others ? i : -1;
    } else {
      rank[chosen + i] = draw_below(random[p.max_foreground + i], others);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.draws; i += kThreads) {
    const Counted& from = i < chosen ? objects : rest;
    index[i] = rank[i] < 0 ? -1 : static_cast<int>(from.place(rank[i]));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < p.draws; i += kThreads) {
    // Foreground that the background overwrites gives way, and what is drawn twice counts once.
    bool again = index[i] < 0;
    for (int k = chosen; k < (i < chosen ? p.draws : i); ++k) again = again || index[k] == index[i];
    const int64_t slot = image * p.draws + i;
    p.index[slot] = index[i] < 0 ? 0 : index[i];
    p.labels[slot] = again ? -1 : i < chosen;
  }
}

}  // namespace

void sample_anchors(const SampleAnchors& p, cudaStream_t stream) {
  const int64_t words = (p.count + 31) / 32;
  const unsigned blocks = static_cast<unsigned>((p.count + kPackThreads - 1) / kPackThreads);
  pack<<<dim3(blocks, static_cast<unsigned>(p.images)), kPackThreads, 0, stream>>>(p, words);
  const int each = static_cast<int>((words + kThreads - 1) / kThreads);
  draw<<<static_cast<unsigned>(p.images), kThreads, 0, stream>>>(p, words, each);
}

}  // namespace detectron::kernels
