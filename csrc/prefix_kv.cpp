// Prefix injection on the CPU: the loops of prefix_kv_rows.h behind the checks of prefix_kv_calls.h.
#include <tvm/ffi/function.h>

#include "prefix_kv_calls.h"
#include "prefix_kv_rows.h"

namespace laser_fast {
namespace {

struct Cpu {
  static constexpr DLDeviceType kDevice = kDLCPU;

  static void inject(const ArgumentCheck& check, const PrefixArguments& arguments, int64_t num_threads) {
    check_values(check, arguments.layout);
    inject_rows(arguments, num_threads);
  }

  static void gather(const ArgumentCheck& check, const PrefixArguments& arguments, int64_t num_threads) {
    check_values(check, arguments.layout);
    gather_rows(arguments, num_threads);
    sum_prefixes(arguments, num_threads);
  }

  // A bad cu_seqlens or prefix_index leaves the outputs untouched.
  static void check_values(const ArgumentCheck& check, const PrefixLayout& layout) {
    const std::string error = layout_error(layout);
    check.holds(error.empty(), error);
  }
};

}  // namespace
}  // namespace laser_fast

TVM_FFI_DLL_EXPORT_TYPED_FUNC(inject_prefix_kv_cpu, (laser_fast::inject_prefix_kv<laser_fast::Cpu, int64_t>));
TVM_FFI_DLL_EXPORT_TYPED_FUNC(inject_prefix_kv_backward_cpu,
                              (laser_fast::inject_prefix_kv_backward<laser_fast::Cpu, int64_t>));
