// Turns the tensors of a prefix injection into raw pointers and a PrefixLayout, and names the culprit where they do not
// fit. Only shapes, dtypes and devices are read here, never data.
#ifndef LASER_FAST_PREFIX_KV_ARGUMENTS_H_
#define LASER_FAST_PREFIX_KV_ARGUMENTS_H_

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/optional.h>

#include <initializer_list>
#include <limits>

#include "prefix_kv.h"

namespace laser_fast {

using tvm::ffi::TensorView;
using OptionalTensor = tvm::ffi::Optional<TensorView>;

template <typename T>
T* data_of(const TensorView& tensor) {
  return reinterpret_cast<T*>(static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset());
}

template <typename T>
T* data_of(const OptionalTensor& tensor) {
  return tensor.has_value() ? data_of<T>(tensor.value()) : nullptr;
}

// The checks of one call: each names the function and the argument.
struct ArgumentCheck {
  const char* function;
  DLDevice device;

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

  template <typename Value>
  void holds(bool condition, const char* name, const char* rule, const Value& found) const {
    if (!condition) TVM_FFI_THROW(ValueError) << function << ": " << name << " must " << rule << ", got " << found;
  }

  void dimensions(const TensorView& tensor, const char* name, int32_t wanted) const {
    if (tensor.ndim() != wanted) {
      TVM_FFI_THROW(ValueError) << function << ": " << name << " must have " << wanted << " dimensions, got "
                                << tensor.ndim();
    }
  }

  void tensor(const TensorView& tensor, const char* name, DLDataType dtype,
              std::initializer_list<int64_t> shape) const {
    if (tensor.dtype().code != dtype.code || tensor.dtype().bits != dtype.bits || tensor.dtype().lanes != 1) {
      TVM_FFI_THROW(TypeError) << function << ": " << name << " must have DLPack type (code " << int{dtype.code} << ", "
                               << int{dtype.bits} << " bits), got (code " << int{tensor.dtype().code} << ", "
                               << int{tensor.dtype().bits} << " bits)";
    }
    if (tensor.device().device_type != device.device_type || tensor.device().device_id != device.device_id) {
      TVM_FFI_THROW(ValueError) << function << ": " << name << " must be on device (" << device.device_type << ", "
                                << device.device_id << "), got (" << tensor.device().device_type << ", "
                                << tensor.device().device_id << ")";
    }
    dimensions(tensor, name, static_cast<int32_t>(shape.size()));
    int32_t dimension = 0;
    for (const int64_t size : shape) {
      if (tensor.size(dimension) != size) {
        TVM_FFI_THROW(ValueError) << function << ": " << name << " must have size " << size << " in dimension "
                                  << dimension << ", got " << tensor.size(dimension);
      }
      ++dimension;
    }
    holds(tensor.IsContiguous(), name, "be contiguous", "other strides");
    holds(tensor.data_ptr() != nullptr || tensor.numel() == 0, name, "have memory", "a null pointer");
  }

  void at_most_int32(const char* name, int64_t size) const {
    if (size > std::numeric_limits<int32_t>::max()) {
      TVM_FFI_THROW(ValueError) << function << ": " << name << " must fit in int32, got " << size;
    }
  }

  // Sizes that are to be multiplied: small enough that no product of two wraps.
  void sizes(const char* name, std::initializer_list<int64_t> sizes) const {
    for (const int64_t size : sizes) {
      holds(size >= 0, name, "be at least 0", size);
      at_most_int32(name, size);
    }
  }

  int64_t row_bytes(int64_t heads, int64_t head_size, Element element) const {
    sizes("heads and head width", {heads, head_size});
    at_most_int32("numbers of a row", heads * head_size);
    at_most_int32("bytes of a row", heads * head_size * element_bytes(element));
    return heads * head_size * element_bytes(element);
  }
};

inline ArgumentCheck check_of(const char* function, const TensorView& first, const char* name, DLDeviceType type) {
  if (first.device().device_type != type) {
    TVM_FFI_THROW(ValueError) << function << ": " << name << " must be on device type " << int{type} << ", got "
                              << int{first.device().device_type};
  }
  return {function, first.device()};
}

// Offsets and slots on the device of the check; their sizes give B.
inline PrefixLayout check_layout(const ArgumentCheck& check, const TensorView& offsets, const OptionalTensor& slots,
                                 int64_t num_prefixes, int64_t prefix_length) {
  const DLDataType int32 = {kDLInt, 32, 1};
  check.dimensions(offsets, "cu_seqlens", 1);
  check.sizes("cu_seqlens", {offsets.size(0)});
  check.tensor(offsets, "cu_seqlens", int32, {offsets.size(0)});
  if (offsets.size(0) < 1) {
    TVM_FFI_THROW(ValueError) << check.function << ": cu_seqlens must have at least 1 entry, got 0";
  }
  const int64_t num_sequences = offsets.size(0) - 1;
  check.sizes("sequences, prefixes and prefix length", {num_sequences, num_prefixes, prefix_length});
  check.at_most_int32("rows of all prefixes", num_prefixes * prefix_length);
  check.at_most_int32("prefix rows of the output", num_sequences * prefix_length);
  if (slots.has_value()) {
    check.tensor(slots.value(), "prefix_index", int32, {num_sequences});
  } else if (num_prefixes != 1 && num_prefixes != num_sequences) {
    TVM_FFI_THROW(ValueError) << check.function << ": prefix_key must have 1 or " << num_sequences << " prefixes, got "
                              << num_prefixes;
  }
  return {
      data_of<const int32_t>(offsets), data_of<const int32_t>(slots), num_sequences, 0, prefix_length, num_prefixes};
}

struct InjectionTensors {
  TensorView key, value, prefix_key, prefix_value, offsets;
  OptionalTensor slots;
  TensorView output_key, output_value, output_offsets;
};

// `layered`: all but offsets and slots have a leading dimension L.
inline PrefixArguments check_injection(const char* function, const InjectionTensors& given, DLDeviceType device_type,
                                       bool layered = false) {
  const TensorView &key = given.key, &prefix = given.prefix_key;
  const ArgumentCheck check = check_of(function, key, "key", device_type);
  const DLDataType dtype = key.dtype();
  const Element element = check.element_of(key, "key");
  const int32_t first = layered ? 1 : 0;  // the dimension of rows
  check.dimensions(key, "key", 3 + first);
  check.dimensions(prefix, "prefix_key", 4 + first);
  const int64_t layers = layered ? key.size(0) : 1, text_rows = key.size(first), heads = key.size(first + 1);
  const int64_t size = key.size(first + 2), prefixes = prefix.size(first), length = prefix.size(first + 1);
  check.sizes("sizes of key and prefix_key", {layers, text_rows, heads, size, prefixes, length});
  const auto rows_of = [&](const TensorView& tensor, const char* name, int64_t rows) {
    if (layered) return check.tensor(tensor, name, dtype, {layers, rows, heads, size});
    check.tensor(tensor, name, dtype, {rows, heads, size});
  };
  const auto prefix_of = [&](const TensorView& tensor, const char* name) {
    if (layered) return check.tensor(tensor, name, dtype, {layers, prefixes, length, heads, size});
    check.tensor(tensor, name, dtype, {prefixes, length, heads, size});
  };
  rows_of(key, "key", text_rows);
  rows_of(given.value, "value", text_rows);
  prefix_of(prefix, "prefix_key");
  prefix_of(given.prefix_value, "prefix_value");
  PrefixLayout layout = check_layout(check, given.offsets, given.slots, prefixes, length);
  layout.num_text_rows = text_rows;
  check.at_most_int32("rows of the output", layout.num_output_rows());
  const int64_t row_bytes = check.row_bytes(heads, size, element);
  rows_of(given.output_key, "output_key", layout.num_output_rows());
  rows_of(given.output_value, "output_value", layout.num_output_rows());
  check.tensor(given.output_offsets, "output_cu_seqlens", {kDLInt, 32, 1}, {layout.num_sequences + 1});
  return {
      layout,
      {data_of<const char>(key), data_of<const char>(prefix), data_of<char>(given.output_key)},
      {data_of<const char>(given.value), data_of<const char>(given.prefix_value), data_of<char>(given.output_value)},
      data_of<int32_t>(given.output_offsets),
      row_bytes,
      layers};
}

struct GradientTensors {
  OptionalTensor output_key, output_value;  // what comes in; none: nothing of that half is wanted
  TensorView offsets;
  OptionalTensor slots;
  int64_t num_prefixes, prefix_length;
  OptionalTensor key, value, prefix_key, prefix_value;  // what is wanted
};

inline PrefixGradArguments check_gradients(const char* function, const GradientTensors& given,
                                           DLDeviceType device_type) {
  const bool key_given = given.output_key.has_value();
  if (!key_given && !given.output_value.has_value()) {
    TVM_FFI_THROW(ValueError) << function << ": grad_key or grad_value must be given, got neither";
  }
  const char* name = key_given ? "grad_key" : "grad_value";
  const TensorView& output = key_given ? given.output_key.value() : given.output_value.value();
  const ArgumentCheck check = check_of(function, output, name, device_type);
  const DLDataType dtype = output.dtype();
  const Element element = check.element_of(output, name);
  check.dimensions(output, name, 3);
  const int64_t rows = output.size(0), heads = output.size(1), size = output.size(2);
  PrefixLayout layout = check_layout(check, given.offsets, given.slots, given.num_prefixes, given.prefix_length);
  layout.num_text_rows = rows - layout.num_sequences * layout.prefix_length;
  check.sizes(name, {rows, heads, size});
  const int64_t row_bytes = check.row_bytes(heads, size, element);
  check.holds(layout.num_text_rows >= 0, name, "have at least B P rows", rows);
  const auto half = [&](const OptionalTensor& from, const char* from_name, const OptionalTensor& text,
                        const char* text_name, const OptionalTensor& prefix, const char* prefix_name) -> PrefixGrad {
    check.holds(from.has_value() || !(text.has_value() || prefix.has_value()), from_name, "be given", "none");
    if (from.has_value()) check.tensor(from.value(), from_name, dtype, {rows, heads, size});
    if (text.has_value()) check.tensor(text.value(), text_name, dtype, {layout.num_text_rows, heads, size});
    if (prefix.has_value()) {
      check.tensor(prefix.value(), prefix_name, dtype, {given.num_prefixes, given.prefix_length, heads, size});
    }
    return {data_of<const char>(from), data_of<char>(text), data_of<char>(prefix)};
  };
  const PrefixGrad key = half(given.output_key, "grad_key", given.key, "key", given.prefix_key, "prefix_key");
  const PrefixGrad value =
      half(given.output_value, "grad_value", given.value, "value", given.prefix_value, "prefix_value");
  return {layout, key, value, row_bytes, element};
}

}  // namespace laser_fast

#endif  // LASER_FAST_PREFIX_KV_ARGUMENTS_H_
