// What the library exports for either device: checks of the tensors, which name the culprit, and then raw pointers and
// a PrefixLayout for a backend. Only shapes, dtypes and devices are read here, never data.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/optional.h>

#include <initializer_list>
#include <limits>
#include <sstream>

#include "prefix_kv.h"

namespace laser_fast {

using tvm::ffi::TensorView;
using OptionalTensor = tvm::ffi::Optional<TensorView>;

constexpr DLDataType kInt32 = {kDLInt, 32, 1};

template <typename T>
T* data_of(const TensorView& tensor) {
  return reinterpret_cast<T*>(static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset());
}

// The checks of one call: each names the function and the argument.
struct ArgumentCheck {
  const char* function;
  DLDevice device;

  // Throws unless the condition holds; the text is put together only then.
  template <typename... Parts>
  void holds(bool condition, const Parts&... parts) const {
    if (condition) return;
    std::ostringstream text;
    (text << ... << parts);
    TVM_FFI_THROW(ValueError) << function << ": " << text.str();
  }

  Element element_of(const TensorView& tensor, const char* name) const {
    const DLDataType dtype = tensor.dtype();
    if (dtype.lanes == 1 && dtype.code == kDLBfloat) return Element::kBfloat16;
    if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 16) return Element::kHalf;
    if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 32) return Element::kFloat;
    if (dtype.lanes == 1 && dtype.code == kDLFloat && dtype.bits == 64) return Element::kDouble;
    TVM_FFI_THROW(TypeError) << function << ": " << name
                             << " must be float16, bfloat16, float32 or float64, got DLPack type (code "
                             << int{dtype.code} << ", " << int{dtype.bits} << " bits)";
    return Element::kFloat;  // never reached
  }

  void dimensions(const TensorView& tensor, const char* name, int32_t wanted) const {
    holds(tensor.ndim() == wanted, name, " must have ", wanted, " dimensions, got ", tensor.ndim());
  }

  void tensor(const TensorView& tensor, const char* name, DLDataType dtype,
              std::initializer_list<int64_t> shape) const {
    const DLDataType found = tensor.dtype();
    if (found.code != dtype.code || found.bits != dtype.bits || found.lanes != 1) {
      TVM_FFI_THROW(TypeError) << function << ": " << name << " must have DLPack type (code " << int{dtype.code} << ", "
                               << int{dtype.bits} << " bits), got (code " << int{found.code} << ", " << int{found.bits}
                               << " bits)";
    }
    const DLDevice where = tensor.device();
    holds(where.device_type == device.device_type && where.device_id == device.device_id, name, " must be on device (",
          device.device_type, ", ", device.device_id, "), got (", where.device_type, ", ", where.device_id, ")");
    dimensions(tensor, name, static_cast<int32_t>(shape.size()));
    int32_t dimension = 0;
    for (const int64_t size : shape) {
      const int64_t given = tensor.size(dimension);
      holds(given == size, name, " must have size ", size, " in dimension ", dimension, ", got ", given);
      ++dimension;
    }
    holds(tensor.IsContiguous(), name, " must be contiguous, got other strides");
    holds(tensor.data_ptr() != nullptr || tensor.numel() == 0, name, " must have memory, got a null pointer");
  }

  // Sizes to be multiplied: no product of two of them wraps.
  void sizes(const char* name, std::initializer_list<int64_t> sizes) const {
    for (const int64_t size : sizes) {
      holds(size >= 0, name, " must be at least 0, got ", size);
      holds(size <= std::numeric_limits<int32_t>::max(), name, " must fit in int32, got ", size);
    }
  }
};

inline ArgumentCheck check_of(const char* function, const TensorView& first, const char* name, DLDeviceType type) {
  const ArgumentCheck check = {function, first.device()};
  check.holds(check.device.device_type == type, name, " must be on device type ", int{type}, ", got ",
              int{check.device.device_type});
  return check;
}

// Offsets and slots on the device of the check; their sizes give B. T is left at 0.
inline PrefixLayout check_layout(const ArgumentCheck& check, const TensorView& offsets, const OptionalTensor& slots,
                                 int64_t num_prefixes, int64_t prefix_length) {
  check.dimensions(offsets, "cu_seqlens", 1);
  check.sizes("cu_seqlens", {offsets.size(0)});
  check.tensor(offsets, "cu_seqlens", kInt32, {offsets.size(0)});
  check.holds(offsets.size(0) > 0, "cu_seqlens must have at least 1 entry, got 0");
  const int64_t num_sequences = offsets.size(0) - 1;
  check.sizes("sequences, prefixes and prefix length", {num_sequences, num_prefixes, prefix_length});
  check.sizes("rows of all prefixes", {num_prefixes * prefix_length});
  check.sizes("prefix rows of the output", {num_sequences * prefix_length});
  if (slots.has_value()) {
    check.tensor(slots.value(), "prefix_index", kInt32, {num_sequences});
  } else {
    check.holds(num_prefixes == 1 || num_prefixes == num_sequences, "prefix_key must have 1 or ", num_sequences,
                " prefixes, got ", num_prefixes);
  }
  const int32_t* slots_data = slots.has_value() ? data_of<const int32_t>(slots.value()) : nullptr;
  return {data_of<const int32_t>(offsets), slots_data, num_sequences, 0, prefix_length, num_prefixes};
}

// A tensor of a call that may be missing.
struct Argument {
  OptionalTensor tensor;
  const char* name;
};

// The floating-point tensors of a call: one dtype, rows of Hkv heads of width d.
struct RowCheck {
  const ArgumentCheck& check;
  DLDataType dtype;
  int64_t heads, size;

  int64_t row_bytes(Element element) const {
    check.sizes("heads and head width", {heads, size});
    check.sizes("numbers of a row", {heads * size});
    check.sizes("bytes of a row", {heads * size * element_bytes(element)});
    return heads * size * element_bytes(element);
  }

  // Keys or values of the right shapes; null where nothing is given.
  PrefixTensor half(const PrefixLayout& layout, const Argument& text, const Argument& prefix,
                    const Argument& output) const {
    return {data(text, {layout.num_text_rows, heads, size}),
            data(prefix, {layout.num_prefixes, layout.prefix_length, heads, size}),
            data(output, {layout.num_output_rows(), heads, size})};
  }

  char* data(const Argument& argument, std::initializer_list<int64_t> shape) const {
    if (!argument.tensor.has_value()) return nullptr;
    check.tensor(argument.tensor.value(), argument.name, dtype, shape);
    return data_of<char>(argument.tensor.value());
  }
};

// A Backend has a kDevice, and static inject and gather with the arguments below; the CPU takes a number of threads.
template <typename Backend, typename... Threads>
void inject_prefix_kv(TensorView key, TensorView value, TensorView prefix_key, TensorView prefix_value,
                      TensorView cu_seqlens, OptionalTensor prefix_index, TensorView output_key,
                      TensorView output_value, TensorView output_cu_seqlens, Threads... threads) {
  const ArgumentCheck check = check_of("inject_prefix_kv", key, "key", Backend::kDevice);
  const Element element = check.element_of(key, "key");
  check.dimensions(key, "key", 3);
  check.dimensions(prefix_key, "prefix_key", 4);
  const RowCheck of = {check, key.dtype(), key.size(1), key.size(2)};
  PrefixLayout layout = check_layout(check, cu_seqlens, prefix_index, prefix_key.size(0), prefix_key.size(1));
  layout.num_text_rows = key.size(0);
  check.sizes("rows of key", {layout.num_text_rows});
  check.sizes("rows of the output", {layout.num_output_rows()});
  const int64_t row_bytes = of.row_bytes(element);
  const PrefixTensor of_key = of.half(layout, {key, "key"}, {prefix_key, "prefix_key"}, {output_key, "output_key"});
  const PrefixTensor of_value =
      of.half(layout, {value, "value"}, {prefix_value, "prefix_value"}, {output_value, "output_value"});
  check.tensor(output_cu_seqlens, "output_cu_seqlens", kInt32, {layout.num_sequences + 1});
  int32_t* const offsets = data_of<int32_t>(output_cu_seqlens);
  Backend::inject(check, PrefixArguments{layout, of_key, of_value, offsets, row_bytes, element}, threads...);
}

// A missing gradient that comes in says that nothing of its half is wanted, a missing one that goes out that it is not
// wanted itself.
template <typename Backend, typename... Threads>
void inject_prefix_kv_backward(OptionalTensor grad_key, OptionalTensor grad_value, TensorView cu_seqlens,
                               OptionalTensor prefix_index, int64_t num_prefixes, int64_t prefix_length,
                               OptionalTensor key, OptionalTensor value, OptionalTensor prefix_key,
                               OptionalTensor prefix_value, Threads... threads) {
  const char* function = "inject_prefix_kv_backward";
  const bool key_given = grad_key.has_value();
  if (!key_given && !grad_value.has_value()) {
    TVM_FFI_THROW(ValueError) << function << ": grad_key or grad_value must be given, got neither";
  }
  const char* name = key_given ? "grad_key" : "grad_value";
  const TensorView& output = key_given ? grad_key.value() : grad_value.value();
  const ArgumentCheck check = check_of(function, output, name, Backend::kDevice);
  const Element element = check.element_of(output, name);
  check.dimensions(output, name, 3);
  const RowCheck of = {check, output.dtype(), output.size(1), output.size(2)};
  PrefixLayout layout = check_layout(check, cu_seqlens, prefix_index, num_prefixes, prefix_length);
  const int64_t rows = output.size(0);
  check.sizes(name, {rows});
  layout.num_text_rows = rows - layout.num_sequences * prefix_length;
  check.holds(layout.num_text_rows >= 0, name, " must have at least B P rows, got ", rows);
  const int64_t row_bytes = of.row_bytes(element);
  const bool key_wanted = key.has_value() || prefix_key.has_value();
  const bool value_wanted = value.has_value() || prefix_value.has_value();
  check.holds(key_given || !key_wanted, "grad_key must be given, got none");
  check.holds(grad_value.has_value() || !value_wanted, "grad_value must be given, got none");
  const PrefixTensor of_key = of.half(layout, {key, "key"}, {prefix_key, "prefix_key"}, {grad_key, "grad_key"});
  const PrefixTensor of_value =
      of.half(layout, {value, "value"}, {prefix_value, "prefix_value"}, {grad_value, "grad_value"});
  Backend::gather(check, PrefixArguments{layout, of_key, of_value, nullptr, row_bytes, element}, threads...);
}

}  // namespace laser_fast
