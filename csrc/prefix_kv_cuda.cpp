// Prefix injection on CUDA, host side: checks the arguments, picks device and stream, launches.
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>

#include "prefix_kv_arguments.h"
#include "prefix_kv_launch.h"

namespace laser_fast {
namespace {

// Runs launch(stream) on the device of a tensor, on the stream that the caller's framework uses there.
template <typename Launch>
void on_device_of(const TensorView& tensor, const Launch& launch) {
  const DLDevice device = tensor.device();
  const tvm::ffi::CUDADeviceGuard guard(device.device_id);
  launch(static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id)));
}

void inject_prefix_kv_cuda(TensorView key, TensorView value, TensorView prefix_key, TensorView prefix_value,
                           TensorView cu_seqlens, OptionalTensor prefix_index, TensorView output_key,
                           TensorView output_value, TensorView output_cu_seqlens) {
  const InjectionTensors given = {key,          value,      prefix_key,   prefix_value,     cu_seqlens,
                                  prefix_index, output_key, output_value, output_cu_seqlens};
  const PrefixArguments arguments = check_injection("inject_prefix_kv", given, kDLCUDA);
  on_device_of(key, [&](cudaStream_t stream) { TVM_FFI_CHECK_CUDA_ERROR(launch_inject(arguments, stream)); });
}

void inject_prefix_kv_layers_cuda(TensorView keys, TensorView values, TensorView prefix_keys, TensorView prefix_values,
                                  TensorView cu_seqlens, OptionalTensor prefix_index, TensorView output_keys,
                                  TensorView output_values, TensorView output_cu_seqlens) {
  const InjectionTensors given = {keys,         values,      prefix_keys,   prefix_values,    cu_seqlens,
                                  prefix_index, output_keys, output_values, output_cu_seqlens};
  const PrefixArguments arguments = check_injection("inject_prefix_kv_layers", given, kDLCUDA, /*layered=*/true);
  on_device_of(keys, [&](cudaStream_t stream) { TVM_FFI_CHECK_CUDA_ERROR(launch_inject(arguments, stream)); });
}

void inject_prefix_kv_backward_cuda(OptionalTensor grad_key, OptionalTensor grad_value, TensorView cu_seqlens,
                                    OptionalTensor prefix_index, int64_t num_prefixes, int64_t prefix_length,
                                    OptionalTensor key, OptionalTensor value, OptionalTensor prefix_key,
                                    OptionalTensor prefix_value) {
  const GradientTensors given = {grad_key,      grad_value, cu_seqlens, prefix_index, num_prefixes,
                                 prefix_length, key,        value,      prefix_key,   prefix_value};
  const PrefixGradArguments arguments = check_gradients("inject_prefix_kv_backward", given, kDLCUDA);
  on_device_of(cu_seqlens, [&](cudaStream_t stream) {
    TVM_FFI_CHECK_CUDA_ERROR(launch_gather(arguments, stream));
    TVM_FFI_CHECK_CUDA_ERROR(launch_sum(arguments, stream));
  });
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
TVM_FFI_DLL_EXPORT_TYPED_FUNC(inject_prefix_kv_layers_cuda, laser_fast::inject_prefix_kv_layers_cuda);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(inject_prefix_kv_backward_cuda, laser_fast::inject_prefix_kv_backward_cuda);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(probe_cuda, laser_fast::probe_cuda);
