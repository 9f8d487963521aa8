// Prefix injection on CUDA. Memory-bound: reads every input once and writes every output once, without atomics.
//
// Forward, one warp copies one output row of keys and of values; backward, it copies a row of the text, or of a prefix
// of one sequence, back. A prefix of several sequences is summed by one block for every 32 words of a row, in one
// order. cu_seqlens and prefix_index are not read back to the host: malformed ones give wrong rows, or rows of zeros
// where they point outside, but never a stray access.
//
// No header of tvm_ffi here: nvcc reads this file once for every architecture.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "prefix_kv_launch.h"

namespace laser_fast {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarpsPerBlock = 8;
constexpr int kThreadsPerBlock = kWarpSize * kWarpsPerBlock;

// Copies a row, or zeros where from_row is negative. Four words a lane are read before the first is written, so that
// one warp has 2 KiB in flight.
template <typename Word>
__device__ __forceinline__ void copy_row(const char* from_base, int64_t from_row, char* to_base, int64_t to_row,
                                         int64_t row_bytes) {
  constexpr int kBatch = 4;
  const Word* __restrict__ from = reinterpret_cast<const Word*>(from_base + from_row * row_bytes);
  Word* __restrict__ to = reinterpret_cast<Word*>(to_base + to_row * row_bytes);
  const int words = static_cast<int>(row_bytes / static_cast<int64_t>(sizeof(Word)));
  for (int first = threadIdx.x % kWarpSize; first < words; first += kBatch * kWarpSize) {
    Word batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = first + i * kWarpSize;
      batch[i] = from_row >= 0 && index < words ? from[index] : Word{};
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = first + i * kWarpSize;
      if (index < words) to[index] = batch[i];
    }
  }
}

__device__ __forceinline__ int64_t output_row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
}

template <typename Word>
__global__ void __launch_bounds__(kThreadsPerBlock) inject_prefix_kv_kernel(PrefixArguments arguments) {
  const PrefixLayout& layout = arguments.layout;
  const int64_t row = output_row_of_warp();
  if (row < layout.num_output_rows()) {
    const PrefixSource source = source_of_output_row(layout, row);
    const PrefixTensor &key = arguments.key, &value = arguments.value;
    copy_row<Word>(source.from_prefix ? key.prefix : key.text, source.row, key.output, row, arguments.row_bytes);
    copy_row<Word>(source.from_prefix ? value.prefix : value.text, source.row, value.output, row, arguments.row_bytes);
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t b = first; b <= layout.num_sequences; b += stride) {
    arguments.output_offsets[b] = static_cast<int32_t>(output_begin(layout, b));
  }
}

template <typename Word>
__global__ void __launch_bounds__(kThreadsPerBlock) gather_prefix_kv_kernel(PrefixArguments arguments) {
  const PrefixLayout& layout = arguments.layout;
  const int64_t row = output_row_of_warp();
  if (row >= layout.num_output_rows()) return;
  const PrefixSource source = source_of_output_row(layout, row);
  if (source.row < 0 || (source.from_prefix && !layout.one_prefix_each())) return;
  const PrefixTensor &key = arguments.key, &value = arguments.value;
  char* const to_key = source.from_prefix ? key.prefix : key.text;
  char* const to_value = source.from_prefix ? value.prefix : value.text;
  if (to_key != nullptr) copy_row<Word>(key.output, row, to_key, source.row, arguments.row_bytes);
  if (to_value != nullptr) copy_row<Word>(value.output, row, to_value, source.row, arguments.row_bytes);
}

// Elements of one access of up to 16 bytes.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T values[kCount];
};

// Warp w adds the sequences b with b % kSumParts == w; the first warps then add the parts in order.
template <typename T, int kCount>
__global__ void __launch_bounds__(kWarpSize* kSumParts) sum_prefix_kv_kernel(PrefixArguments arguments) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  __shared__ Wide parts[kSumParts][kCount][kWarpSize];
  const PrefixLayout& layout = arguments.layout;
  const char* const from = blockIdx.z == 0 ? arguments.key.output : arguments.value.output;
  char* const to = blockIdx.z == 0 ? arguments.key.prefix : arguments.value.prefix;
  if (to == nullptr) return;
  const int lane = threadIdx.x % kWarpSize, part = threadIdx.x / kWarpSize;
  const int64_t width = arguments.row_bytes / static_cast<int64_t>(sizeof(T));
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kWarpSize + lane) * kCount;
  const unsigned length = static_cast<unsigned>(layout.prefix_length);
  const int64_t prefix = blockIdx.x / length, position = blockIdx.x % length;
  Wide sum[kCount] = {};
#pragma unroll 4
  for (int64_t b = part; b < layout.num_sequences; b += kSumParts) {
    const int64_t row = output_row_of_prefix(layout, b, position);
    if (prefix_of_sequence(layout, b) != prefix || row < 0 || column >= width) continue;
    const auto pack =
        *reinterpret_cast<const Pack<T, kCount>*>(reinterpret_cast<const T*>(from) + row * width + column);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] += static_cast<Wide>(pack.values[i]);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) parts[part][i][lane] = sum[i];
  __syncthreads();
  if (part != 0 || column >= width) return;
  Pack<T, kCount> total;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    Wide whole = parts[0][i][lane];
#pragma unroll
    for (int other = 1; other < kSumParts; ++other) whole += parts[other][i][lane];
    total.values[i] = static_cast<T>(whole);
  }
  const int64_t to_element = static_cast<int64_t>(blockIdx.x) * width + column;
  *reinterpret_cast<Pack<T, kCount>*>(reinterpret_cast<T*>(to) + to_element) = total;
}

__global__ void probe_kernel() {}

// Whether rows and all addresses (null ones count as aligned) are multiples of a word.
bool all_aligned(const PrefixArguments& arguments, uint64_t word_bytes) {
  const PrefixTensor &key = arguments.key, &value = arguments.value;
  uint64_t bits = static_cast<uint64_t>(arguments.row_bytes);
  for (const char* pointer : {key.text, key.prefix, key.output, value.text, value.prefix, value.output}) {
    bits |= reinterpret_cast<uint64_t>(pointer);
  }
  return bits % word_bytes == 0;
}

// Calls launch(word, blocks), one warp for an output row, in the widest words that the addresses allow.
template <typename Launch>
cudaError_t launch_rows(const PrefixArguments& arguments, const Launch& launch) {
  const int64_t rows = arguments.layout.num_output_rows();
  const auto blocks = static_cast<unsigned>(std::max<int64_t>(1, (rows + kWarpsPerBlock - 1) / kWarpsPerBlock));
  if (all_aligned(arguments, sizeof(uint4))) {
    launch(uint4{}, blocks);
  } else if (all_aligned(arguments, sizeof(uint32_t))) {
    launch(uint32_t{}, blocks);
  } else {
    launch(uint16_t{}, blocks);
  }
  return cudaGetLastError();
}

template <typename T, int kCount>
void launch_sum_of(const PrefixArguments& arguments, cudaStream_t stream) {
  const int64_t packs = arguments.row_bytes / static_cast<int64_t>(sizeof(T) * kCount);
  const dim3 blocks(static_cast<unsigned>(arguments.layout.num_prefix_rows()),
                    static_cast<unsigned>((packs + kWarpSize - 1) / kWarpSize), 2);
  sum_prefix_kv_kernel<T, kCount><<<blocks, kWarpSize * kSumParts, 0, stream>>>(arguments);
}

template <typename T>
cudaError_t launch_sum_of(const PrefixArguments& arguments, cudaStream_t stream) {
  if (all_aligned(arguments, 16)) {
    launch_sum_of<T, 16 / sizeof(T)>(arguments, stream);
  } else {
    launch_sum_of<T, 1>(arguments, stream);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_inject(const PrefixArguments& arguments, cudaStream_t stream) {
  return launch_rows(arguments, [&](auto word, unsigned blocks) {
    inject_prefix_kv_kernel<decltype(word)><<<blocks, kThreadsPerBlock, 0, stream>>>(arguments);
  });
}

cudaError_t launch_gather(const PrefixArguments& arguments, cudaStream_t stream) {
  return launch_rows(arguments, [&](auto word, unsigned blocks) {
    gather_prefix_kv_kernel<decltype(word)><<<blocks, kThreadsPerBlock, 0, stream>>>(arguments);
  });
}

cudaError_t launch_sum(const PrefixArguments& arguments, cudaStream_t stream) {
  const PrefixLayout& layout = arguments.layout;
  const bool wanted = arguments.key.prefix != nullptr || arguments.value.prefix != nullptr;
  // CUDA refuses an empty grid
  if (!wanted || layout.one_prefix_each() || layout.num_prefix_rows() * arguments.row_bytes == 0) return cudaSuccess;
  switch (arguments.element) {
    case Element::kHalf:
      return launch_sum_of<__half>(arguments, stream);
    case Element::kBfloat16:
      return launch_sum_of<__nv_bfloat16>(arguments, stream);
    case Element::kFloat:
      return launch_sum_of<float>(arguments, stream);
    case Element::kDouble:
      return launch_sum_of<double>(arguments, stream);
  }
  return cudaErrorInvalidValue;  // never reached
}

cudaError_t launch_probe() {
  probe_kernel<<<1, 1>>>();
  return cudaGetLastError();
}

}  // namespace laser_fast
