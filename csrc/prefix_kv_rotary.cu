// Prefix injection on CUDA with the rotary embedding of the text keys fused into the copy. A lane holds a stretch of
// the first half of a head and its partner in the second; in 16-byte accesses where half a head is a multiple of that.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "prefix_kv_device.h"

namespace laser_fast {
namespace {

// Rotates one row; the inverse is the transpose. Computed in float32 (float64 for float64) and rounded once.
template <typename T, typename Table, int kCount, bool kInverse>
__device__ __forceinline__ void rotate_row(const Rotary& rotary, int64_t text_row, const char* from_base,
                                           int64_t from_row, char* to_base, int64_t to_row, int lane) {
  using Wide = typename WideOf<T>::Type;
  const int size = static_cast<int>(rotary.head_size), half = size / 2;
  const int packs_per_head = half / kCount, packs = static_cast<int>(rotary.num_heads) * packs_per_head;
  const int64_t width = rotary.num_heads * size;
#pragma unroll 1  // two turns of the widest kernel at once would spill
  for (int pack = lane; pack < packs; pack += kWarpSize) {
    const int head = pack / packs_per_head, place = (pack - head * packs_per_head) * kCount;
    const int64_t in = from_row * width + head * size + place, out = to_row * width + head * size + place;
    const int64_t at = text_row * size + place;
    const Pack<T, kCount> first = load_pack<T, kCount>(from_base, in);
    const Pack<T, kCount> second = load_pack<T, kCount>(from_base, in + half);
    const Pack<Table, kCount> cos_first = load_pack<Table, kCount>(rotary.cos, at);
    const Pack<Table, kCount> cos_second = load_pack<Table, kCount>(rotary.cos, at + half);
    const Pack<Table, kCount> sin_first = load_pack<Table, kCount>(rotary.sin, at);
    const Pack<Table, kCount> sin_second = load_pack<Table, kCount>(rotary.sin, at + half);
    Pack<T, kCount> to_first, to_second;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Wide x = static_cast<Wide>(first.values[i]), y = static_cast<Wide>(second.values[i]);
      const Wide sin_x = static_cast<Wide>(sin_first.values[i]), sin_y = static_cast<Wide>(sin_second.values[i]);
      const Wide x_cos = x * static_cast<Wide>(cos_first.values[i]),
                 y_cos = y * static_cast<Wide>(cos_second.values[i]);
      to_first.values[i] = static_cast<T>(kInverse ? x_cos + y * sin_y : x_cos - y * sin_x);
      to_second.values[i] = static_cast<T>(kInverse ? y_cos - x * sin_x : y_cos + x * sin_y);
    }
    store_pack<T, kCount>(to_base, out, to_first);
    store_pack<T, kCount>(to_base, out + half, to_second);
  }
}

template <typename T, typename Table, int kCount>
__global__ void __launch_bounds__(kThreadsPerBlock)
    inject_prefix_kv_rotary_kernel(PrefixArguments arguments, Rotary rotary) {
  using Word = Pack<T, kCount>;
  const PrefixLayout& layout = arguments.layout;
  const int64_t row = output_row_of_warp();
  if (row < layout.num_output_rows()) {
    const PrefixSource source = source_of_output_row(layout, row);
    const int lane = threadIdx.x % kWarpSize;
    const PrefixCopy &key = arguments.key, &value = arguments.value;
    if (source.from_prefix || source.row < 0) {
      copy_row<Word>(key.prefix, source.row, key.output, row, arguments.row_bytes, lane);
    } else {
      rotate_row<T, Table, kCount, false>(rotary, source.row, key.text, source.row, key.output, row, lane);
    }
    copy_row<Word>(source.from_prefix ? value.prefix : value.text, source.row, value.output, row, arguments.row_bytes,
                   lane);
  }
  write_output_offsets(layout, arguments.output_offsets);
}

template <typename T, typename Table, int kCount>
__global__ void __launch_bounds__(kThreadsPerBlock)
    gather_prefix_kv_rotary_kernel(PrefixGradArguments arguments, Rotary rotary) {
  using Word = Pack<T, kCount>;
  const PrefixLayout& layout = arguments.layout;
  const int64_t row = output_row_of_warp();
  if (row >= layout.num_output_rows()) return;
  const PrefixSource source = source_of_output_row(layout, row);
  if (source.row < 0 || (source.from_prefix && !layout.one_prefix_each())) return;
  const int lane = threadIdx.x % kWarpSize;
  const PrefixGrad &key = arguments.key, &value = arguments.value;
  char* const to_key = source.from_prefix ? key.prefix : key.text;
  char* const to_value = source.from_prefix ? value.prefix : value.text;
  if (to_key != nullptr && source.from_prefix) {
    copy_row<Word>(key.output, row, to_key, source.row, arguments.row_bytes, lane);
  } else if (to_key != nullptr) {
    rotate_row<T, Table, kCount, true>(rotary, source.row, key.output, row, to_key, source.row, lane);
  }
  if (to_value != nullptr) copy_row<Word>(value.output, row, to_value, source.row, arguments.row_bytes, lane);
}

bool wide_accesses(const Rotary& rotary, bool tensors_aligned) {
  const bool tables_aligned = all_aligned({rotary.cos, rotary.sin}, 0, 16);
  return tensors_aligned && tables_aligned;
}

int64_t half_head_bytes(const Rotary& rotary) { return rotary.head_size / 2 * element_bytes(rotary.element); }

// Calls the function object with one value of each type: that of the keys, and that of the tables.
template <typename Function>
void with_rotary_types(const Rotary& rotary, const Function& function) {
  const bool wide_table = rotary.table_element != rotary.element;
  switch (rotary.element) {
    case Element::kHalf:
      return wide_table ? function(__half{}, float{}) : function(__half{}, __half{});
    case Element::kBfloat16:
      return wide_table ? function(__nv_bfloat16{}, float{}) : function(__nv_bfloat16{}, __nv_bfloat16{});
    case Element::kFloat:
      return function(float{}, float{});
    case Element::kDouble:
      return wide_table ? function(double{}, float{}) : function(double{}, double{});
  }
}

// Elements of T per access; float tables of double keys would not be aligned, and nothing needs them fast.
template <typename T>
constexpr int kWideCount = sizeof(T) < sizeof(double) ? 16 / static_cast<int>(sizeof(T)) : 1;

}  // namespace

cudaError_t launch_inject_rotary(const PrefixArguments& arguments, const Rotary& rotary, cudaStream_t stream) {
  const unsigned blocks = blocks_of(arguments.layout.num_output_rows());
  const bool wide = wide_accesses(rotary, all_aligned(arguments, half_head_bytes(rotary), 16));
  with_rotary_types(rotary, [&](auto element, auto table) {
    using T = decltype(element);
    using Table = decltype(table);
    if (wide) {
      inject_prefix_kv_rotary_kernel<T, Table, kWideCount<T>>
          <<<blocks, kThreadsPerBlock, 0, stream>>>(arguments, rotary);
    } else {
      inject_prefix_kv_rotary_kernel<T, Table, 1><<<blocks, kThreadsPerBlock, 0, stream>>>(arguments, rotary);
    }
  });
  return cudaGetLastError();
}

cudaError_t launch_gather_rotary(const PrefixGradArguments& arguments, const Rotary& rotary, cudaStream_t stream) {
  const unsigned blocks = blocks_of(arguments.layout.num_output_rows());
  const bool wide = wide_accesses(rotary, all_aligned(arguments, half_head_bytes(rotary), 16));
  with_rotary_types(rotary, [&](auto element, auto table) {
    using T = decltype(element);
    using Table = decltype(table);
    if (wide) {
      gather_prefix_kv_rotary_kernel<T, Table, kWideCount<T>>
          <<<blocks, kThreadsPerBlock, 0, stream>>>(arguments, rotary);
    } else {
      gather_prefix_kv_rotary_kernel<T, Table, 1><<<blocks, kThreadsPerBlock, 0, stream>>>(arguments, rotary);
    }
  });
  return cudaGetLastError();
}

}  // namespace laser_fast
