// inject_prefix_kv on the CPU: two copies per sequence and tensor, whatever the element type.
#include <tvm/ffi/function.h>

#include <cstring>

#include "prefix_kv_arguments.h"

namespace laser_fast {
namespace {

// Every offset is read before the first byte is written: a bad cu_seqlens leaves the outputs untouched.
void check_offsets(const PrefixLayout& layout) {
  const int32_t* offsets = layout.offsets;
  if (offsets[0] != 0) {
    TVM_FFI_THROW(ValueError) << "inject_prefix_kv: cu_seqlens must start at 0, got " << offsets[0];
  }
  for (int64_t b = 0; b < layout.num_sequences; ++b) {
    if (offsets[b + 1] < offsets[b]) {
      TVM_FFI_THROW(ValueError) << "inject_prefix_kv: cu_seqlens must not decrease, got " << offsets[b] << " before "
                                << offsets[b + 1];
    }
  }
  if (offsets[layout.num_sequences] != layout.num_text_rows) {
    TVM_FFI_THROW(ValueError) << "inject_prefix_kv: cu_seqlens must end at the number of text tokens, "
                              << layout.num_text_rows << ", got " << offsets[layout.num_sequences];
  }
}

void copy_rows(char* to, int64_t to_row, const char* from, int64_t from_row, int64_t num_rows, int64_t row_bytes) {
  // an empty tensor may have a null pointer, which memcpy must not see
  if (num_rows * row_bytes > 0) std::memcpy(to + to_row * row_bytes, from + from_row * row_bytes, num_rows * row_bytes);
}

void inject_prefix_kv_cpu(TensorView key, TensorView value, TensorView prefix_key, TensorView prefix_value,
                          TensorView cu_seqlens, TensorView output_key, TensorView output_value,
                          TensorView output_cu_seqlens) {
  const PrefixArguments arguments = check_arguments(key, value, prefix_key, prefix_value, cu_seqlens, output_key,
                                                    output_value, output_cu_seqlens, kDLCPU);
  const PrefixLayout& layout = arguments.layout;
  check_offsets(layout);
  for (int64_t b = 0; b < layout.num_sequences; ++b) {
    const int64_t begin = layout.offsets[b], length = layout.offsets[b + 1] - begin;
    for (const PrefixCopy& tensor : {arguments.key, arguments.value}) {
      copy_rows(tensor.output, output_row_of_prefix(layout, b, 0), tensor.prefix, prefix_row(layout, b, 0),
                layout.prefix_length, arguments.row_bytes);
      copy_rows(tensor.output, output_row_of_text(layout, b, begin), tensor.text, begin, length, arguments.row_bytes);
    }
  }
  for (int64_t b = 0; b <= layout.num_sequences; ++b) {
    arguments.output_offsets[b] = static_cast<int32_t>(output_begin(layout, b));
  }
}

// The mapping a GPU thread follows, row by row: (1, prefix row) or (0, text row). The tests hold it against the copies
// above.
void prefix_sources_cpu(TensorView cu_seqlens, int64_t num_text_rows, int64_t prefix_length, bool shared_prefix,
                        TensorView sources) {
  const DLDevice cpu = {kDLCPU, 0};
  check_tensor(cu_seqlens, "cu_seqlens", 1, {kDLInt, 32, 1}, cpu);
  check_tensor(sources, "sources", 2, {kDLInt, 64, 1}, cpu);
  const PrefixLayout layout = {data_of<const int32_t>(cu_seqlens), cu_seqlens.size(0) - 1, num_text_rows, prefix_length,
                               shared_prefix};
  check_size(sources, "sources", 0, layout.num_output_rows());
  check_size(sources, "sources", 1, 2);
  int64_t* out = data_of<int64_t>(sources);
  for (int64_t row = 0; row < layout.num_output_rows(); ++row) {
    const PrefixSource source = source_of_output_row(layout, row);
    out[2 * row] = source.from_prefix;
    out[2 * row + 1] = source.row;
  }
}

}  // namespace
}  // namespace laser_fast

TVM_FFI_DLL_EXPORT_TYPED_FUNC(inject_prefix_kv_cpu, laser_fast::inject_prefix_kv_cpu);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(prefix_sources_cpu, laser_fast::prefix_sources_cpu);
