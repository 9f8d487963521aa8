// inject_prefix_kv on CUDA, host side: checks the arguments, picks device and stream, launches.
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>

#include "prefix_kv_arguments.h"
#include "prefix_kv_launch.h"

namespace laser_fast {
namespace {

void inject_prefix_kv_cuda(TensorView key, TensorView value, TensorView prefix_key, TensorView prefix_value,
                           TensorView cu_seqlens, TensorView output_key, TensorView output_value,
                           TensorView output_cu_seqlens) {
  const PrefixArguments arguments = check_arguments(key, value, prefix_key, prefix_value, cu_seqlens, output_key,
                                                    output_value, output_cu_seqlens, kDLCUDA);
  const DLDevice device = key.device();
  const tvm::ffi::CUDADeviceGuard guard(device.device_id);
  const auto stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  TVM_FFI_CHECK_CUDA_ERROR(launch_inject_prefix_kv(arguments, stream));
}

// Empty where this library's code runs on the device; else CUDA's own words ("no kernel image is available ...").
tvm::ffi::String probe_cuda(int64_t device_id) {
  int original = 0;
  cudaError_t error = cudaGetDevice(&original);
  if (error == cudaSuccess) error = cudaSetDevice(static_cast<int>(device_id));
  if (error == cudaSuccess) {
    error = launch_probe();
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
