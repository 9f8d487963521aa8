// Index arithmetic of prefix injection, shared by the CPU and the CUDA implementation.
//
// Text of B sequences lies packed in T rows; sequence b owns rows [offsets[b], offsets[b+1]). The output has P prefix
// rows in front of every sequence, so sequence b begins at offsets[b] + b * P there. Prefix rows are numbered
// b * P + p, or p alone where one prefix is shared by all sequences.
#ifndef LASER_FAST_PREFIX_KV_H_
#define LASER_FAST_PREFIX_KV_H_

#include <cstdint>

#ifdef __CUDACC__
#define LASER_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LASER_FAST_HOST_DEVICE inline
#endif

namespace laser_fast {

struct PrefixLayout {
  const int32_t* offsets;  // [B+1], cu_seqlens of the text
  int64_t num_sequences;   // B
  int64_t num_text_rows;   // T
  int64_t prefix_length;   // P
  bool shared_prefix;

  LASER_FAST_HOST_DEVICE int64_t num_output_rows() const { return num_text_rows + num_sequences * prefix_length; }
};

struct PrefixCopy {
  const char* text;    // [T, Hkv, d]
  const char* prefix;  // [B, P, Hkv, d] or [1, P, Hkv, d]
  char* output;        // [T + B*P, Hkv, d]
};

struct PrefixArguments {
  PrefixLayout layout;
  PrefixCopy key, value;
  int32_t* output_offsets;  // [B+1]
  int64_t row_bytes;        // Hkv * d * element size
};

// Where an output row comes from. row < 0: the offsets are malformed and no row of the text belongs here.
struct PrefixSource {
  bool from_prefix;
  int64_t row;
};

LASER_FAST_HOST_DEVICE int64_t output_begin(const PrefixLayout& layout, int64_t sequence) {
  return static_cast<int64_t>(layout.offsets[sequence]) + sequence * layout.prefix_length;
}

LASER_FAST_HOST_DEVICE int64_t output_row_of_text(const PrefixLayout& layout, int64_t sequence, int64_t text_row) {
  return text_row + (sequence + 1) * layout.prefix_length;
}

LASER_FAST_HOST_DEVICE int64_t output_row_of_prefix(const PrefixLayout& layout, int64_t sequence, int64_t position) {
  return output_begin(layout, sequence) + position;
}

LASER_FAST_HOST_DEVICE int64_t prefix_row(const PrefixLayout& layout, int64_t sequence, int64_t position) {
  return (layout.shared_prefix ? 0 : sequence * layout.prefix_length) + position;
}

// The sequence that owns an output row: the last one that begins at or before it (so an empty one is passed over).
LASER_FAST_HOST_DEVICE int64_t sequence_of_output_row(const PrefixLayout& layout, int64_t output_row) {
  int64_t low = 0, high = layout.num_sequences - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (output_begin(layout, middle) <= output_row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

LASER_FAST_HOST_DEVICE PrefixSource source_of_output_row(const PrefixLayout& layout, int64_t output_row) {
  const int64_t sequence = sequence_of_output_row(layout, output_row);
  const int64_t position = output_row - output_begin(layout, sequence);
  if (position < 0) return {false, -1};
  if (position < layout.prefix_length) return {true, prefix_row(layout, sequence, position)};
  const int64_t text_row = output_row - (sequence + 1) * layout.prefix_length;
  return {false, text_row >= 0 && text_row < layout.num_text_rows ? text_row : -1};
}

}  // namespace laser_fast

#endif  // LASER_FAST_PREFIX_KV_H_
