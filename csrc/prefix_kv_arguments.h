// Turns the tensors of an inject_prefix_kv call into raw pointers and a PrefixLayout, and names the culprit where they
// do not fit. Only shapes, dtypes and devices are read here, never data.
#ifndef LASER_FAST_PREFIX_KV_ARGUMENTS_H_
#define LASER_FAST_PREFIX_KV_ARGUMENTS_H_

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>

#include "prefix_kv.h"

namespace laser_fast {

using tvm::ffi::TensorView;

template <typename T>
T* data_of(const TensorView& tensor) {
  return reinterpret_cast<T*>(static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset());
}

inline void check_tensor(const TensorView& tensor, const char* name, int32_t ndim, DLDataType dtype, DLDevice device) {
  if (tensor.dtype().code != dtype.code || tensor.dtype().bits != dtype.bits || tensor.dtype().lanes != 1) {
    TVM_FFI_THROW(TypeError) << "inject_prefix_kv: " << name << " must have DLPack type (code " << int{dtype.code}
                             << ", " << int{dtype.bits} << " bits), got (code " << int{tensor.dtype().code} << ", "
                             << int{tensor.dtype().bits} << " bits)";
  }
  if (tensor.device().device_type != device.device_type || tensor.device().device_id != device.device_id) {
    TVM_FFI_THROW(ValueError) << "inject_prefix_kv: " << name << " must be on device (" << device.device_type << ", "
                              << device.device_id << "), got (" << tensor.device().device_type << ", "
                              << tensor.device().device_id << ")";
  }
  if (tensor.ndim() != ndim) {
    TVM_FFI_THROW(ValueError) << "inject_prefix_kv: " << name << " must have " << ndim << " dimensions, got "
                              << tensor.ndim();
  }
  if (!tensor.IsContiguous()) TVM_FFI_THROW(ValueError) << "inject_prefix_kv: " << name << " must be contiguous";
}

inline void check_size(const TensorView& tensor, const char* name, int32_t dimension, int64_t size) {
  if (tensor.size(dimension) != size) {
    TVM_FFI_THROW(ValueError) << "inject_prefix_kv: " << name << " must have size " << size << " in dimension "
                              << dimension << ", got " << tensor.size(dimension);
  }
}

inline PrefixArguments check_arguments(const TensorView& key, const TensorView& value, const TensorView& prefix_key,
                                       const TensorView& prefix_value, const TensorView& offsets,
                                       const TensorView& output_key, const TensorView& output_value,
                                       const TensorView& output_offsets, DLDeviceType device_type) {
  const DLDevice device = key.device();
  const DLDataType dtype = key.dtype(), int32 = {kDLInt, 32, 1};
  if (device.device_type != device_type) {
    TVM_FFI_THROW(ValueError) << "inject_prefix_kv: key must be on device type " << int{device_type} << ", got "
                              << int{device.device_type};
  }
  if (!((dtype.code == kDLFloat && dtype.bits >= 16) || dtype.code == kDLBfloat)) {
    TVM_FFI_THROW(TypeError)
        << "inject_prefix_kv: key must be float16, bfloat16, float32 or float64, got DLPack type (code "
        << int{dtype.code} << ", " << int{dtype.bits} << " bits)";
  }
  check_tensor(key, "key", 3, dtype, device);
  check_tensor(value, "value", 3, dtype, device);
  check_tensor(prefix_key, "prefix_key", 4, dtype, device);
  check_tensor(prefix_value, "prefix_value", 4, dtype, device);
  check_tensor(offsets, "cu_seqlens", 1, int32, device);
  check_tensor(output_key, "output_key", 3, dtype, device);
  check_tensor(output_value, "output_value", 3, dtype, device);
  check_tensor(output_offsets, "output_cu_seqlens", 1, int32, device);
  if (offsets.size(0) < 1)
    TVM_FFI_THROW(ValueError) << "inject_prefix_kv: cu_seqlens must have at least 1 entry, got 0";

  const int64_t num_sequences = offsets.size(0) - 1, text_rows = key.size(0), prefix_length = prefix_key.size(1);
  const bool shared = prefix_key.size(0) == 1;
  for (int32_t dimension = 0; dimension < 3; ++dimension) {
    const int64_t rows = dimension == 0 ? text_rows + num_sequences * prefix_length : key.size(dimension);
    check_size(value, "value", dimension, key.size(dimension));
    check_size(output_key, "output_key", dimension, rows);
    check_size(output_value, "output_value", dimension, rows);
  }
  if (!shared) check_size(prefix_key, "prefix_key", 0, num_sequences);
  for (int32_t dimension = 0; dimension < 4; ++dimension) {
    if (dimension >= 2) check_size(prefix_key, "prefix_key", dimension, key.size(dimension - 1));
    check_size(prefix_value, "prefix_value", dimension, prefix_key.size(dimension));
  }
  check_size(output_offsets, "output_cu_seqlens", 0, num_sequences + 1);
  return {{data_of<const int32_t>(offsets), num_sequences, text_rows, prefix_length, shared},
          {data_of<const char>(key), data_of<const char>(prefix_key), data_of<char>(output_key)},
          {data_of<const char>(value), data_of<const char>(prefix_value), data_of<char>(output_value)},
          data_of<int32_t>(output_offsets),
          key.size(1) * key.size(2) * (dtype.bits / 8)};
}

}  // namespace laser_fast

#endif  // LASER_FAST_PREFIX_KV_ARGUMENTS_H_
