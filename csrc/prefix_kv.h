// Index arithmetic of prefix injection, shared by the CPU and the CUDA implementation. No framework, no allocation.
//
// Sequence b owns rows [offsets[b], offsets[b+1]) of the packed text. The output has P prefix rows in front of every
// sequence, which begins at offsets[b] + b * P there. Row p of prefix s has number s * P + p. Sequence b takes prefix
// slots[b], or without slots prefix b, or the only one there is.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LASER_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LASER_FAST_HOST_DEVICE inline
#endif

namespace laser_fast {

// A sum over sequences adds sequence b to part b % kSumParts, then the parts in order, on every device.
constexpr int kSumParts = 8;

struct PrefixLayout {
  const int32_t* offsets;  // [B+1], cu_seqlens of the text
  const int32_t* slots;    // [B], prefix of every sequence; null: one prefix each, or one for all
  int64_t num_sequences;   // B
  int64_t num_text_rows;   // T
  int64_t prefix_length;   // P
  int64_t num_prefixes;    // S

  LASER_FAST_HOST_DEVICE int64_t num_output_rows() const { return num_text_rows + num_sequences * prefix_length; }
  LASER_FAST_HOST_DEVICE int64_t num_prefix_rows() const { return num_prefixes * prefix_length; }
  LASER_FAST_HOST_DEVICE bool one_prefix_each() const { return slots == nullptr && num_prefixes == num_sequences; }
};

enum class Element { kHalf, kBfloat16, kFloat, kDouble };

// Keys or values. Forward reads text and prefix and writes the output; backward reads the output's gradient and writes
// the other two, null where not wanted.
struct PrefixTensor {
  char* text;    // [T, Hkv, d]
  char* prefix;  // [S, P, Hkv, d]
  char* output;  // [T + B*P, Hkv, d]
};

struct PrefixArguments {
  PrefixLayout layout;
  PrefixTensor key, value;
  int32_t* output_offsets;  // [B+1], written by forward
  int64_t row_bytes;        // Hkv * d * element size
  Element element;
};

// Where an output row comes from. row < 0: offsets or slot are malformed and no row belongs here.
struct PrefixSource {
  bool from_prefix;
  int64_t row;
};

LASER_FAST_HOST_DEVICE int64_t element_bytes(Element element) {
  return element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2;
}

LASER_FAST_HOST_DEVICE int64_t output_begin(const PrefixLayout& layout, int64_t sequence) {
  return static_cast<int64_t>(layout.offsets[sequence]) + sequence * layout.prefix_length;
}

// The prefix of a sequence, -1 where its slot lies outside the pool, or where there is no such sequence.
LASER_FAST_HOST_DEVICE int64_t prefix_of_sequence(const PrefixLayout& layout, int64_t sequence) {
  if (sequence >= layout.num_sequences) return -1;
  if (layout.slots == nullptr) return layout.num_prefixes == 1 ? 0 : sequence;
  const int64_t slot = layout.slots[sequence];
  return slot >= 0 && slot < layout.num_prefixes ? slot : -1;
}

// The output row of a prefix position, -1 where malformed offsets put it outside.
LASER_FAST_HOST_DEVICE int64_t output_row_of_prefix(const PrefixLayout& layout, int64_t sequence, int64_t position) {
  const int64_t row = output_begin(layout, sequence) + position;
  return row >= 0 && row < layout.num_output_rows() ? row : -1;
}

// The sequence that owns an output row: the last that begins at or before it, which passes over empty ones.
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

// The source of an output row of a known sequence.
LASER_FAST_HOST_DEVICE PrefixSource source_in_sequence(const PrefixLayout& layout, int64_t sequence,
                                                       int64_t output_row) {
  const int64_t position = output_row - output_begin(layout, sequence);
  if (position < 0) return {false, -1};
  if (position < layout.prefix_length) {
    const int64_t prefix = prefix_of_sequence(layout, sequence);
    return {true, prefix < 0 ? -1 : prefix * layout.prefix_length + position};
  }
  const int64_t text_row = output_row - (sequence + 1) * layout.prefix_length;
  return {false, text_row >= 0 && text_row < layout.num_text_rows ? text_row : -1};
}

LASER_FAST_HOST_DEVICE PrefixSource source_of_output_row(const PrefixLayout& layout, int64_t output_row) {
  return source_in_sequence(layout, sequence_of_output_row(layout, output_row), output_row);
}

}  // namespace laser_fast
