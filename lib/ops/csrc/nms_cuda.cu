// Non-maximum suppression that stays on the device.
//
// The boxes of each problem, sorted by score, are worked through in chunks of kNmsChunk:
//   1. suppress_by_kept: the chunk's boxes against everything kept from earlier chunks;
//   2. compare_pairs:    the upper triangle of the chunk's IoU >= thresh bit matrix;
//   3. resolve:          one block per problem walks the matrix 64 boxes at a time. Within the 64 one
//                        thread decides serially on the diagonal word; all threads then OR the kept rows
//                        into the words still to come. It stops when max_out boxes are kept.
// A problem that has its max_out boxes makes the later kernels return at once.
#include "kernels.h"

namespace detectron::kernels {
namespace {

using Word = unsigned long long;

constexpr int kWordBits = 64;
constexpr int kMaxWords = kNmsChunk / kWordBits;
constexpr int kTile = 128;
constexpr int kResolveThreads = 512;

struct Box {
  float4 corners;
  float area;
  int group;
};

__device__ __forceinline__ Box make_box(float4 c, float one, int group) {
  return {c, (c.z - c.x + one) * (c.w - c.y + one), group};
}

// Groups of a problem's boxes from box `start` on; null where all are of one.
__device__ __forceinline__ const int* groups_from(
    const NmsProblems& p, int64_t problem, int64_t start) {
  return p.groups ? p.groups + problem * p.count + start : nullptr;
}

// Exactly the arithmetic of the CPU kernel (compiled without contraction).
__device__ __forceinline__ bool overlaps(const Box& a, const Box& b, float thresh, float one) {
  if (a.group != b.group) return false;
  const float w = fminf(a.corners.z, b.corners.z) - fmaxf(a.corners.x, b.corners.x) + one;
  const float h = fminf(a.corners.w, b.corners.w) - fmaxf(a.corners.y, b.corners.y) + one;
  const float inter = fmaxf(0.f, w) * fmaxf(0.f, h);
  // 0 / anything is 0 or NaN: spares most pairs the division
  if (inter == 0.f && thresh > 0.f) return false;
  return inter / (a.area + b.area - inter) >= thresh;
}

__global__ void __launch_bounds__(kTile) suppress_by_kept(NmsProblems p, int64_t start, int words) {
  const int64_t problem = blockIdx.z;
  const int64_t kept = p.kept[problem];
  if (kept >= p.max_out) return;
  const float4* boxes = reinterpret_cast<const float4*>(p.boxes) + problem * p.count;
  const int* groups = groups_from(p, problem, 0);
  const int64_t* keep = p.keep + problem * p.max_out;
  const float one = p.plus_one ? 1.f : 0.f;

  __shared__ Box tile[kTile];
  const int in_chunk = blockIdx.x * kTile + threadIdx.x;
  const int64_t index = start + in_chunk;
  const bool exists = in_chunk < kNmsChunk && index < p.count;
  const Box mine = make_box(
      exists ? boxes[index] : float4{0, 0, 0, 0}, one, exists && groups ? groups[index] : 0);
  bool suppressed = !exists;
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kTile; first < kept;
       first += static_cast<int64_t>(gridDim.y) * kTile) {
    const int n = static_cast<int>(kept - first < kTile ? kept - first : kTile);
    if (threadIdx.x < n) {
      const int64_t other = keep[first + threadIdx.x];
      tile[threadIdx.x] = make_box(boxes[other], one, groups ? groups[other] : 0);
    }
    __syncthreads();
    for (int i = 0; i < n && !suppressed; ++i) suppressed = overlaps(tile[i], mine, p.thresh, one);
    if (__syncthreads_and(suppressed)) break;  // also guards the tile before it is overwritten
  }
  const unsigned bits = __ballot_sync(0xffffffffu, suppressed && exists);
  if (threadIdx.x % 32 == 0 && bits != 0 && in_chunk < words * kWordBits) {
    const Word word = static_cast<Word>(bits) << (in_chunk % kWordBits);
    atomicOr(p.removed + problem * words + in_chunk / kWordBits, word);
  }
}

// Bit j of matrix[problem][i][word]: box i (of the chunk) suppresses box word * 64 + j, a later one.
__global__ void __launch_bounds__(kWordBits)
    compare_pairs(NmsProblems p, int64_t start, int n, int rows, int words) {
  const int row_word = blockIdx.y, column_word = blockIdx.x;
  if (column_word < row_word) return;
  const int64_t problem = blockIdx.z;
  if (p.kept[problem] >= p.max_out) return;
  const float4* boxes = reinterpret_cast<const float4*>(p.boxes) + problem * p.count + start;
  const int* groups = groups_from(p, problem, start);
  const float one = p.plus_one ? 1.f : 0.f;

  __shared__ Box columns[kWordBits];
  const int first = column_word * kWordBits;
  const int in_word = n - first < kWordBits ? n - first : kWordBits;
  if (threadIdx.x < in_word) {
    const int other = first + threadIdx.x;
    columns[threadIdx.x] = make_box(boxes[other], one, groups ? groups[other] : 0);
  }
  __syncthreads();

  const int row = row_word * kWordBits + threadIdx.x;
  if (row >= n) return;
  const Box mine = make_box(boxes[row], one, groups ? groups[row] : 0);
  Word bits = 0;
  for (int j = row_word == column_word ? threadIdx.x + 1 : 0; j < in_word; ++j) {
    if (overlaps(mine, columns[j], p.thresh, one)) bits |= Word(1) << j;
  }
  p.matrix[(problem * rows + row) * words + column_word] = bits;
}

__global__ void __launch_bounds__(kResolveThreads)
    resolve(NmsProblems p, int64_t start, int n, int rows, int words) {
  const int64_t problem = blockIdx.x;
  int64_t count = p.kept[problem];
  if (count >= p.max_out) return;
  const Word* matrix = p.matrix + problem * rows * words;
  const bool* valid = p.valid ? p.valid + problem * p.count + start : nullptr;
  int64_t* keep = p.keep + problem * p.max_out;
  const int tid = threadIdx.x;

  __shared__ Word removed[kMaxWords];
  __shared__ Word diagonal[kWordBits];
  __shared__ Word kept_here;

  const int used_words = (n + kWordBits - 1) / kWordBits;
  for (int i = tid; i < used_words * kWordBits; i += kResolveThreads) {
    // whole warps: used_words * 64 and the stride are multiples of 32
    const bool out = i >= n || (valid && !valid[i]);
    const unsigned bits = __ballot_sync(0xffffffffu, out);
    if (tid % 32 == 0) reinterpret_cast<unsigned*>(removed)[i / 32] = bits;  // little endian
  }
  __syncthreads();
  if (tid < used_words) removed[tid] |= p.removed[problem * words + tid];

  // The diagonal words are fetched one round ahead: their latency hides behind the serial part.
  Word next = tid < kWordBits && tid < n ? matrix[static_cast<int64_t>(tid) * words] : 0;
  for (int r = 0; r < used_words; ++r) {
    if (tid < kWordBits) diagonal[tid] = next;
    __syncthreads();  // the diagonal, and everything ORed into removed[r]
    const int ahead = (r + 1) * kWordBits + tid;
    next = tid < kWordBits && ahead < n ? matrix[static_cast<int64_t>(ahead) * words + r + 1] : 0;
    if (tid == 0) {
      Word alive = ~removed[r], chosen = 0;
      int64_t room = p.max_out - count;
      while (alive != 0 && room > 0) {
        const int i = __ffsll(static_cast<long long>(alive)) - 1;
        chosen |= Word(1) << i;
        alive &= ~(diagonal[i] | (Word(1) << i));
        --room;
      }
      kept_here = chosen;
    }
    __syncthreads();
    const Word chosen = kept_here;
    if (tid < kWordBits && (chosen >> tid & 1)) {
      keep[count + __popcll(chosen & ((Word(1) << tid) - 1))] = start + r * kWordBits + tid;
    }
    count += __popcll(chosen);
    if (count >= p.max_out) break;
    // 64 threads side by side on the columns, in groups that share the 64 rows
    constexpr int kGroups = kResolveThreads / kWordBits, kRows = kWordBits / kGroups;
    const int column = r + 1 + tid % kWordBits, group = tid / kWordBits;
    if (column < used_words) {
      Word bits = 0;
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const int i = group * kRows + k;
        if (chosen >> i & 1) {
          bits |= matrix[static_cast<int64_t>(r * kWordBits + i) * words + column];
        }
      }
      if (bits != 0) atomicOr(&removed[column], bits);
    }
  }
  if (tid == 0) p.kept[problem] = count;
}

__global__ void mark(
    const int64_t* keep, const int64_t* kept, const int64_t* order, int64_t count, bool* flags) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count && i < *kept) flags[order[keep[i]]] = true;
}

}  // namespace

void nms(const NmsProblems& p, cudaStream_t stream) {
  const int rows = static_cast<int>(p.count < kNmsChunk ? p.count : kNmsChunk);
  const int words = (rows + kWordBits - 1) / kWordBits;
  const unsigned problems = static_cast<unsigned>(p.problems);
  for (int64_t start = 0; start < p.count; start += kNmsChunk) {
    const int64_t left = p.count - start;
    const int n = static_cast<int>(left < kNmsChunk ? left : kNmsChunk);
    const unsigned used = static_cast<unsigned>((n + kWordBits - 1) / kWordBits);
    cudaMemsetAsync(p.removed, 0, sizeof(Word) * p.problems * words, stream);
    if (start > 0) {
      const dim3 grid(static_cast<unsigned>((n + kTile - 1) / kTile), 32, problems);
      suppress_by_kept<<<grid, kTile, 0, stream>>>(p, start, words);
    }
    compare_pairs<<<dim3(used, used, problems), kWordBits, 0, stream>>>(p, start, n, rows, words);
    resolve<<<problems, kResolveThreads, 0, stream>>>(p, start, n, rows, words);
  }
}

void nms_mark(
    const int64_t* keep, const int64_t* kept, const int64_t* order, int64_t count, bool* flags,
    cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((count + 255) / 256);
  mark<<<blocks, 256, 0, stream>>>(keep, kept, order, count, flags);
}

}  // namespace detectron::kernels
