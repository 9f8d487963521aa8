// Prefix injection on CUDA, forward: one launch copies keys, values and offsets of all layers. Memory-bound: reads
// every input once and writes every output once. One warp serves one output row of both tensors, in the widest words
// the addresses allow.
#include "prefix_kv_device.h"

namespace laser_fast {
namespace {

// cu_seqlens and prefix_index are not read back to the host, so they are not checked: malformed ones give wrong rows,
// or rows of zeros where they point outside, but never a stray access.
template <typename Word>
__global__ void __launch_bounds__(kThreadsPerBlock) inject_prefix_kv_kernel(PrefixArguments arguments) {
  const PrefixLayout& layout = arguments.layout;
  const int64_t row = output_row_of_warp();
  if (row < layout.num_output_rows()) {
    const PrefixSource source = source_of_output_row(layout, row);
    const int64_t layer = blockIdx.y;
    const int64_t layer_rows = source.from_prefix ? layout.num_prefix_rows() : layout.num_text_rows;
    const int64_t from = source.row < 0 ? -1 : layer * layer_rows + source.row;
    const int64_t to = layer * layout.num_output_rows() + row;
    const int lane = threadIdx.x % kWarpSize;
    const PrefixCopy &key = arguments.key, &value = arguments.value;
    copy_row<Word>(source.from_prefix ? key.prefix : key.text, from, key.output, to, arguments.row_bytes, lane);
    copy_row<Word>(source.from_prefix ? value.prefix : value.text, from, value.output, to, arguments.row_bytes, lane);
  }
  if (blockIdx.y == 0) write_output_offsets(layout, arguments.output_offsets);
}

__global__ void probe_kernel() {}

}  // namespace

cudaError_t launch_inject(const PrefixArguments& arguments, cudaStream_t stream) {
  const dim3 blocks(blocks_of(arguments.layout.num_output_rows()),
                    static_cast<unsigned>(std::max<int64_t>(1, arguments.num_layers)));
  if (all_aligned(arguments, sizeof(uint4))) {
    inject_prefix_kv_kernel<uint4><<<blocks, kThreadsPerBlock, 0, stream>>>(arguments);
  } else if (all_aligned(arguments, sizeof(uint32_t))) {
    inject_prefix_kv_kernel<uint32_t><<<blocks, kThreadsPerBlock, 0, stream>>>(arguments);
  } else {
    inject_prefix_kv_kernel<uint16_t><<<blocks, kThreadsPerBlock, 0, stream>>>(arguments);
  }
  return cudaGetLastError();
}

cudaError_t launch_probe() {
  probe_kernel<<<1, 1>>>();
  return cudaGetLastError();
}

}  // namespace laser_fast
