// Prefix injection on the CPU: checks, then the loops of prefix_kv_rows.h.
#include <tvm/ffi/function.h>

#include "prefix_kv_arguments.h"
#include "prefix_kv_rows.h"

namespace laser_fast {
namespace {

// A bad cu_seqlens or prefix_index leaves the outputs untouched.
void check_values(const char* function, const PrefixLayout& layout) {
  const std::string error = layout_error(layout);
  if (!error.empty()) TVM_FFI_THROW(ValueError) << function << ": " << error;
}

void inject_prefix_kv_cpu(TensorView key, TensorView value, TensorView prefix_key, TensorView prefix_value,
                          TensorView cu_seqlens, OptionalTensor prefix_index, TensorView output_key,
                          TensorView output_value, TensorView output_cu_seqlens, int64_t num_threads) {
  const char* function = "inject_prefix_kv";
  const InjectionTensors given = {key,          value,      prefix_key,   prefix_value,     cu_seqlens,
                                  prefix_index, output_key, output_value, output_cu_seqlens};
  const PrefixArguments arguments = check_injection(function, given, kDLCPU);
  check_values(function, arguments.layout);
  inject_rows(arguments, num_threads);
}

void inject_prefix_kv_layers_cpu(TensorView keys, TensorView values, TensorView prefix_keys, TensorView prefix_values,
                                 TensorView cu_seqlens, OptionalTensor prefix_index, TensorView output_keys,
                                 TensorView output_values, TensorView output_cu_seqlens, int64_t num_threads) {
  const char* function = "inject_prefix_kv_layers";
  const InjectionTensors given = {keys,         values,      prefix_keys,   prefix_values,    cu_seqlens,
                                  prefix_index, output_keys, output_values, output_cu_seqlens};
  const PrefixArguments arguments = check_injection(function, given, kDLCPU, /*layered=*/true);
  check_values(function, arguments.layout);
  inject_rows(arguments, num_threads);
}

void inject_prefix_kv_backward_cpu(OptionalTensor grad_key, OptionalTensor grad_value, TensorView cu_seqlens,
                                   OptionalTensor prefix_index, int64_t num_prefixes, int64_t prefix_length,
                                   OptionalTensor key, OptionalTensor value, OptionalTensor prefix_key,
                                   OptionalTensor prefix_value, int64_t num_threads) {
  const char* function = "inject_prefix_kv_backward";
  const GradientTensors given = {grad_key,      grad_value, cu_seqlens, prefix_index, num_prefixes,
                                 prefix_length, key,        value,      prefix_key,   prefix_value};
  const PrefixGradArguments arguments = check_gradients(function, given, kDLCPU);
  check_values(function, arguments.layout);
  gather_rows(arguments, num_threads);
  sum_prefixes(arguments, num_threads);
}

// The mapping a GPU thread follows, row by row: (1, prefix row) or (0, text row). The tests hold it against the copies
// above.
void prefix_sources_cpu(TensorView cu_seqlens, OptionalTensor prefix_index, int64_t num_text_rows, int64_t num_prefixes,
                        int64_t prefix_length, TensorView sources) {
  const ArgumentCheck check = check_of("prefix_sources", cu_seqlens, "cu_seqlens", kDLCPU);
  PrefixLayout layout = check_layout(check, cu_seqlens, prefix_index, num_prefixes, prefix_length);
  check.sizes("num_text_rows", {num_text_rows});
  layout.num_text_rows = num_text_rows;
  check.tensor(sources, "sources", {kDLInt, 64, 1}, {layout.num_output_rows(), 2});
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
TVM_FFI_DLL_EXPORT_TYPED_FUNC(inject_prefix_kv_layers_cpu, laser_fast::inject_prefix_kv_layers_cpu);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(inject_prefix_kv_backward_cpu, laser_fast::inject_prefix_kv_backward_cpu);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(prefix_sources_cpu, laser_fast::prefix_sources_cpu);
