// Prefix injection on CUDA, backward: rows of the text, and of prefixes that belong to one sequence each, are copied
// back by one warp a row; a prefix of several sequences is summed by one block for every 32 words of a row. No atomics:
// every sum has one order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "prefix_kv_device.h"

namespace laser_fast {
namespace {

template <typename Word>
__global__ void __launch_bounds__(kThreadsPerBlock) gather_prefix_kv_kernel(PrefixGradArguments arguments) {
  const PrefixLayout& layout = arguments.layout;
  const int64_t row = output_row_of_warp();
  if (row >= layout.num_output_rows()) return;
  const PrefixSource source = source_of_output_row(layout, row);
  if (source.row < 0 || (source.from_prefix && !layout.one_prefix_each())) return;
  const int lane = threadIdx.x % kWarpSize;
  const PrefixGrad &key = arguments.key, &value = arguments.value;
  char* const to_key = source.from_prefix ? key.prefix : key.text;
  char* const to_value = source.from_prefix ? value.prefix : value.text;
  if (to_key != nullptr) copy_row<Word>(key.output, row, to_key, source.row, arguments.row_bytes, lane);
  if (to_value != nullptr) copy_row<Word>(value.output, row, to_value, source.row, arguments.row_bytes, lane);
}

// Warp w adds the sequences b with b % kSumParts == w; the first warps then add the parts in order.
template <typename T, int kCount>
__global__ void __launch_bounds__(kWarpSize* kSumParts) sum_prefix_kv_kernel(PrefixGradArguments arguments) {
  using Wide = typename WideOf<T>::Type;
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
    const Pack<T, kCount> pack = load_pack<T, kCount>(from, row * width + column);
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
  store_pack<T, kCount>(to, static_cast<int64_t>(blockIdx.x) * width + column, total);
}

template <typename T, int kCount>
void launch_sum_of(const PrefixGradArguments& arguments, cudaStream_t stream) {
  const int64_t packs = arguments.row_bytes / static_cast<int64_t>(sizeof(T) * kCount);
  const dim3 blocks(static_cast<unsigned>(arguments.layout.num_prefix_rows()),
                    static_cast<unsigned>((packs + kWarpSize - 1) / kWarpSize), 2);
  sum_prefix_kv_kernel<T, kCount><<<blocks, kWarpSize * kSumParts, 0, stream>>>(arguments);
}

template <typename T>
void launch_sum_of(const PrefixGradArguments& arguments, cudaStream_t stream) {
  if (all_aligned(arguments, 16)) {
    launch_sum_of<T, 16 / sizeof(T)>(arguments, stream);
  } else {
    launch_sum_of<T, 1>(arguments, stream);
  }
}

}  // namespace

cudaError_t launch_gather(const PrefixGradArguments& arguments, cudaStream_t stream) {
  const unsigned blocks = blocks_of(arguments.layout.num_output_rows());
  if (all_aligned(arguments, sizeof(uint4))) {
    gather_prefix_kv_kernel<uint4><<<blocks, kThreadsPerBlock, 0, stream>>>(arguments);
  } else if (all_aligned(arguments, sizeof(uint32_t))) {
    gather_prefix_kv_kernel<uint32_t><<<blocks, kThreadsPerBlock, 0, stream>>>(arguments);
  } else {
    gather_prefix_kv_kernel<uint16_t><<<blocks, kThreadsPerBlock, 0, stream>>>(arguments);
  }
  return cudaGetLastError();
}

cudaError_t launch_sum(const PrefixGradArguments& arguments, cudaStream_t stream) {
  const PrefixLayout& layout = arguments.layout;
  const bool wanted = arguments.key.prefix != nullptr || arguments.value.prefix != nullptr;
  // CUDA refuses an empty grid
  if (!wanted || layout.one_prefix_each() || layout.num_prefix_rows() * arguments.row_bytes == 0) return cudaSuccess;
  switch (arguments.element) {
    case Element::kHalf:
      launch_sum_of<__half>(arguments, stream);
      break;
    case Element::kBfloat16:
      launch_sum_of<__nv_bfloat16>(arguments, stream);
      break;
    case Element::kFloat:
      launch_sum_of<float>(arguments, stream);
      break;
    case Element::kDouble:
      launch_sum_of<double>(arguments, stream);
      break;
  }
  return cudaGetLastError();
}

}  // namespace laser_fast
