// What the kernels of prefix injection share: the shape of a launch, and how a warp moves a row.
// No header of tvm_ffi in what nvcc compiles for a device: it reads a file once for every architecture.
#ifndef LASER_FAST_PREFIX_KV_DEVICE_H_
#define LASER_FAST_PREFIX_KV_DEVICE_H_

#include <algorithm>
#include <initializer_list>

#include "prefix_kv_launch.h"

namespace laser_fast {

constexpr int kWarpSize = 32;
constexpr int kWarpsPerBlock = 8;
constexpr int kThreadsPerBlock = kWarpSize * kWarpsPerBlock;

// One warp per output row.
inline unsigned blocks_of(int64_t rows) {
  return static_cast<unsigned>(std::max<int64_t>(1, (rows + kWarpsPerBlock - 1) / kWarpsPerBlock));
}

__device__ __forceinline__ int64_t output_row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
}

// Copies a row between tensors whose rows are equally long; zeros where from_row is negative. Four words a lane are
// read before the first is written, so that one warp has 2 KiB in flight.
template <typename Word>
__device__ __forceinline__ void copy_row(const char* from_base, int64_t from_row, char* to_base, int64_t to_row,
                                         int64_t row_bytes, int lane) {
  constexpr int kBatch = 4;
  const Word* __restrict__ from = reinterpret_cast<const Word*>(from_base + from_row * row_bytes);
  Word* __restrict__ to = reinterpret_cast<Word*>(to_base + to_row * row_bytes);
  const int words = static_cast<int>(row_bytes / static_cast<int64_t>(sizeof(Word)));
  for (int first = lane; first < words; first += kBatch * kWarpSize) {
    Word batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = first + i * kWarpSize;
      batch[i] = from_row >= 0 && index < words ? from[index] : Word{};
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = first + i * kWarpSize;
      if (index < words) to[index] = batch[i];
    }
  }
}

// All threads of the grid's first layer together.
__device__ __forceinline__ void write_output_offsets(const PrefixLayout& layout, int32_t* output_offsets) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; b <= layout.num_sequences;
       b += stride) {
    output_offsets[b] = static_cast<int32_t>(output_begin(layout, b));
  }
}

// Whether rows and all addresses (null ones count as aligned) are multiples of a word.
template <typename Arguments>  // PrefixArguments or PrefixGradArguments
bool all_aligned(const Arguments& arguments, uint64_t word_bytes) {
  const auto &key = arguments.key, &value = arguments.value;
  uint64_t bits = static_cast<uint64_t>(arguments.row_bytes);
  for (const void* pointer :
       std::initializer_list<const void*>{key.text, key.prefix, key.output, value.text, value.prefix, value.output}) {
    bits |= reinterpret_cast<uint64_t>(pointer);
  }
  return bits % word_bytes == 0;
}

// Element types of the kernels that compute, and N of them in one access of up to 16 bytes.
template <typename T>
struct WideOf {
  using Type = float;
};

template <>
struct WideOf<double> {
  using Type = double;
};

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T values[kCount];
};

template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_pack(const char* base, int64_t element) {
  return *reinterpret_cast<const Pack<T, kCount>*>(reinterpret_cast<const T*>(base) + element);
}

template <typename T, int kCount>
__device__ __forceinline__ void store_pack(char* base, int64_t element, const Pack<T, kCount>& pack) {
  *reinterpret_cast<Pack<T, kCount>*>(reinterpret_cast<T*>(base) + element) = pack;
}

}  // namespace laser_fast

#endif  // LASER_FAST_PREFIX_KV_DEVICE_H_
