// Prefix injection on CUDA, host side: picks device and stream and launches, behind the checks of prefix_kv_calls.h.
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>

#include "prefix_kv_calls.h"
#include "prefix_kv_launch.h"

namespace laser_fast {
namespace {

struct Cuda {
  static constexpr DLDeviceType kDevice = kDLCUDA;

  // On the stream that the caller's framework uses.
  static void inject(const ArgumentCheck& check, const PrefixArguments& arguments) {
    const tvm::ffi::CUDADeviceGuard guard(check.device.device_id);
    TVM_FFI_CHECK_CUDA_ERROR(launch_inject(arguments, stream_of(check.device)));
  }

  static void gather(const ArgumentCheck& check, const PrefixArguments& arguments) {
    const tvm::ffi::CUDADeviceGuard guard(check.device.device_id);
    TVM_FFI_CHECK_CUDA_ERROR(launch_gather(arguments, stream_of(check.device)));
    TVM_FFI_CHECK_CUDA_ERROR(launch_sum(arguments, stream_of(check.device)));
  }

  static cudaStream_t stream_of(DLDevice device) {
    return static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  }
};

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

TVM_FFI_DLL_EXPORT_TYPED_FUNC(inject_prefix_kv_cuda, laser_fast::inject_prefix_kv<laser_fast::Cuda>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(inject_prefix_kv_backward_cuda, laser_fast::inject_prefix_kv_backward<laser_fast::Cuda>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(probe_cuda, laser_fast::probe_cuda);
