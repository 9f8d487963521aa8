// inject_prefix_kv on CUDA: one launch copies keys, values and offsets. Memory-bound: reads every input once and writes
// every output once. One warp serves one output row of both tensors, in the widest words the addresses allow.
#include <cuda_runtime.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <string>

#include "prefix_kv_arguments.h"

namespace laser_fast {
namespace {

constexpr int kWarpSize = 32;
constexpr int kWarpsPerBlock = 8;

template <typename Word>
__device__ __forceinline__ void copy_row(char* __restrict__ to, const char* __restrict__ from, int64_t row_bytes,
                                         int lane) {
  const int64_t words = row_bytes / static_cast<int64_t>(sizeof(Word));
#pragma unroll 4
  for (int64_t i = lane; i < words; i += kWarpSize) {
    reinterpret_cast<Word*>(to)[i] = from == nullptr ? Word{} : reinterpret_cast<const Word*>(from)[i];
  }
}

// cu_seqlens is not read back to the host, so it is not checked: malformed offsets give rows of zeros, never a stray
// access.
template <typename Word>
__global__ void __launch_bounds__(kWarpSize* kWarpsPerBlock) inject_prefix_kv_kernel(PrefixArguments arguments) {
  const PrefixLayout& layout = arguments.layout;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  if (warp < layout.num_output_rows()) {
    const PrefixSource source = source_of_output_row(layout, warp);
    for (const PrefixCopy& tensor : {arguments.key, arguments.value}) {
      const char* base = source.from_prefix ? tensor.prefix : tensor.text;
      const char* from = source.row < 0 ? nullptr : base + source.row * arguments.row_bytes;
      copy_row<Word>(tensor.output + warp * arguments.row_bytes, from, arguments.row_bytes, lane);
    }
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

void inject_prefix_kv_cuda(TensorView key, TensorView value, TensorView prefix_key, TensorView prefix_value,
                           TensorView cu_seqlens, TensorView output_key, TensorView output_value,
                           TensorView output_cu_seqlens) {
  const PrefixArguments arguments = check_arguments(key, value, prefix_key, prefix_value, cu_seqlens, output_key,
                                                    output_value, output_cu_seqlens, kDLCUDA);
  const DLDevice device = key.device();
  const tvm::ffi::CUDADeviceGuard guard(device.device_id);
  const auto stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
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
  TVM_FFI_CHECK_CUDA_ERROR(cudaGetLastError());
}

__global__ void probe_kernel() {}

// Empty where this library's code runs on the device; else CUDA's own words ("no kernel image is available ...").
tvm::ffi::String probe_cuda(int64_t device_id) {
  int original = 0;
  cudaError_t error = cudaGetDevice(&original);
  if (error == cudaSuccess) error = cudaSetDevice(static_cast<int>(device_id));
  if (error == cudaSuccess) {
    probe_kernel<<<1, 1>>>();
    error = cudaGetLastError();
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
    cudaSetDevice(original);
  }
  cudaGetLastError();  // a refused launch must not surface in the next call of somebody else
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace
}  // namespace laser_fast

TVM_FFI_DLL_EXPORT_TYPED_FUNC(inject_prefix_kv_cuda, laser_fast::inject_prefix_kv_cuda);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(probe_cuda, laser_fast::probe_cuda);
