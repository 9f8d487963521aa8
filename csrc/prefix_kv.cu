// inject_prefix_kv on CUDA: one launch copies keys, values and offsets. Memory-bound: reads every input once and writes
// every output once. One warp serves one output row of both tensors, in the widest words the addresses allow.
// No header of tvm_ffi here: nvcc reads a file once for every architecture.
#include "prefix_kv_launch.h"

#include <algorithm>

namespace laser_fast {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarpsPerBlock = 8;

template <typename Word>
__device__ __forceinline__ void copy_row(const PrefixCopy& tensor, PrefixSource source, int64_t output_row,
                                         int64_t row_bytes, int lane) {
  const char* base = source.from_prefix ? tensor.prefix : tensor.text;
  const Word* __restrict__ from = reinterpret_cast<const Word*>(base + source.row * row_bytes);
  Word* __restrict__ to = reinterpret_cast<Word*>(tensor.output + output_row * row_bytes);
  const int64_t words = row_bytes / static_cast<int64_t>(sizeof(Word));
#pragma unroll 4
  for (int64_t i = lane; i < words; i += kWarpSize) to[i] = source.row < 0 ? Word{} : from[i];
}

// cu_seqlens is not read back to the host, so it is not checked: malformed offsets give wrong rows, or rows of zeros
// where they point outside, but never a stray access.
template <typename Word>
__global__ void __launch_bounds__(kWarpSize* kWarpsPerBlock) inject_prefix_kv_kernel(PrefixArguments arguments) {
  const PrefixLayout& layout = arguments.layout;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  if (warp < layout.num_output_rows()) {
    const PrefixSource source = source_of_output_row(layout, warp);
    copy_row<Word>(arguments.key, source, warp, arguments.row_bytes, lane);
    copy_row<Word>(arguments.value, source, warp, arguments.row_bytes, lane);
  }
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; b <= layout.num_sequences;
       b += stride) {
    arguments.output_offsets[b] = static_cast<int32_t>(output_begin(layout, b));
  }
}

bool all_aligned(const PrefixArguments& arguments, uint64_t bytes) {
  uint64_t bits = static_cast<uint64_t>(arguments.row_bytes);
  for (const PrefixCopy& tensor : {arguments.key, arguments.value}) {
    bits |= reinterpret_cast<uint64_t>(tensor.text) | reinterpret_cast<uint64_t>(tensor.prefix) |
            reinterpret_cast<uint64_t>(tensor.output);
  }
  return bits % bytes == 0;
}

__global__ void probe_kernel() {}

}  // namespace

cudaError_t launch_inject_prefix_kv(const PrefixArguments& arguments, cudaStream_t stream) {
  const int64_t rows = arguments.layout.num_output_rows();
  const auto blocks = static_cast<unsigned>(std::max<int64_t>(1, (rows + kWarpsPerBlock - 1) / kWarpsPerBlock));
  const unsigned threads = kWarpSize * kWarpsPerBlock;
  if (all_aligned(arguments, sizeof(uint4))) {
    inject_prefix_kv_kernel<uint4><<<blocks, threads, 0, stream>>>(arguments);
  } else if (all_aligned(arguments, sizeof(uint32_t))) {
    inject_prefix_kv_kernel<uint32_t><<<blocks, threads, 0, stream>>>(arguments);
  } else {
    inject_prefix_kv_kernel<uint16_t><<<blocks, threads, 0, stream>>>(arguments);
  }
  return cudaGetLastError();
}

cudaError_t launch_probe() {
  probe_kernel<<<1, 1>>>();
  return cudaGetLastError();
}

}  // namespace laser_fast
