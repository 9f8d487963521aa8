// The loops of prefix injection on the CPU, and the check of values that must come before them. No framework.
#pragma once

#include <algorithm>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "prefix_kv.h"
#include "prefix_kv_elements.h"

namespace laser_fast {

// Bytes read and written that are worth a thread. On two busy cores a second one breaks even at twice this size and
// takes 40% off at eight times. The sanitizer test lowers it.
#ifndef LASER_FAST_BYTES_PER_THREAD
#define LASER_FAST_BYTES_PER_THREAD (int64_t{1} << 22)
#endif
constexpr int64_t kBytesPerThread = LASER_FAST_BYTES_PER_THREAD;

// What is wrong with offsets and slots, empty where nothing is; all are read before the first byte is written.
inline std::string layout_error(const PrefixLayout& layout) {
  const auto text = [](int64_t number) { return std::to_string(number); };
  const int32_t* offsets = layout.offsets;
  if (offsets[0] != 0) return "cu_seqlens must start at 0, got " + text(offsets[0]);
  for (int64_t b = 0; b < layout.num_sequences; ++b) {
    if (offsets[b + 1] < offsets[b]) {
      return "cu_seqlens must not decrease, got " + text(offsets[b]) + " before " + text(offsets[b + 1]);
    }
  }
  if (offsets[layout.num_sequences] != layout.num_text_rows) {
    return "cu_seqlens must end at the number of text tokens, " + text(layout.num_text_rows) + ", got " +
           text(offsets[layout.num_sequences]);
  }
  for (int64_t b = 0; layout.slots != nullptr && b < layout.num_sequences; ++b) {
    if (prefix_of_sequence(layout, b) < 0) {
      return "prefix_index must be between 0 and " + text(layout.num_prefixes - 1) + ", got " + text(layout.slots[b]) +
             " at position " + text(b);
    }
  }
  return "";
}

// Calls part(begin, end) for a fixed split of [0, count), on up to num_threads threads.
template <typename Part>
void in_parallel(int64_t count, int64_t bytes, int64_t num_threads, const Part& part) {
  const int64_t parts = std::max<int64_t>(1, std::min({num_threads, count, bytes / kBytesPerThread}));
  const auto begin = [&](int64_t index) { return count / parts * index + std::min(index, count % parts); };
  std::vector<std::thread> threads;
  threads.reserve(parts - 1);
  for (int64_t index = 1; index < parts; ++index) {
    try {
      threads.emplace_back([&, index] { part(begin(index), begin(index + 1)); });
    } catch (const std::system_error&) {  // no thread to be had: the work is done here
      part(begin(index), begin(index + 1));
    }
  }
  part(begin(0), begin(1));
  for (std::thread& thread : threads) thread.join();
}

inline void copy_rows(char* to, int64_t to_row, const char* from, int64_t from_row, int64_t num_rows,
                      int64_t row_bytes) {
  // an empty tensor may have a null pointer, which memcpy must not see
  if (num_rows * row_bytes > 0) std::memcpy(to + to_row * row_bytes, from + from_row * row_bytes, num_rows * row_bytes);
}

// Calls run(source, output_row, num_rows) for all stretches of output rows with consecutive sources, on up to
// num_threads threads.
template <typename Run>
void for_all_runs(const PrefixArguments& arguments, int64_t num_threads, const Run& run) {
  const PrefixLayout& layout = arguments.layout;
  const int64_t rows = layout.num_output_rows();
  if (rows * arguments.row_bytes == 0) return;  // rows without numbers may be many
  in_parallel(rows, 2 * rows * arguments.row_bytes, num_threads, [&](int64_t begin, int64_t end) {
    int64_t sequence = sequence_of_output_row(layout, begin);
    for (int64_t row = begin; row < end;) {
      const int64_t text_begin = output_begin(layout, sequence) + layout.prefix_length;
      const int64_t sequence_end = output_begin(layout, sequence + 1);
      const int64_t run_end = std::min(row < text_begin ? text_begin : sequence_end, end);
      if (run_end > row) run(source_in_sequence(layout, sequence, row), row, run_end - row);
      row = run_end;
      if (row == sequence_end) ++sequence;
    }
  });
}

inline void inject_rows(const PrefixArguments& arguments, int64_t num_threads) {
  const PrefixLayout& layout = arguments.layout;
  for_all_runs(arguments, num_threads, [&](PrefixSource source, int64_t row, int64_t num_rows) {
    for (const PrefixTensor& tensor : {arguments.key, arguments.value}) {
      const char* from = source.from_prefix ? tensor.prefix : tensor.text;
      copy_rows(tensor.output, row, from, source.row, num_rows, arguments.row_bytes);
    }
  });
  for (int64_t b = 0; b <= layout.num_sequences; ++b) {
    arguments.output_offsets[b] = static_cast<int32_t>(output_begin(layout, b));
  }
}

// Gradients of text, and of prefixes of one sequence each: every output row has one place to go to.
inline void gather_rows(const PrefixArguments& arguments, int64_t num_threads) {
  for_all_runs(arguments, num_threads, [&](PrefixSource source, int64_t row, int64_t num_rows) {
    if (source.from_prefix && !arguments.layout.one_prefix_each()) return;
    for (const PrefixTensor& tensor : {arguments.key, arguments.value}) {
      char* to = source.from_prefix ? tensor.prefix : tensor.text;
      if (to != nullptr) copy_rows(to, source.row, tensor.output, row, num_rows, arguments.row_bytes);
    }
  });
}

// One row of a prefix's gradient: the sum over its sequences, rounded once.
template <typename E>
void sum_prefix_row(const PrefixLayout& layout, const PrefixTensor& tensor, int64_t prefix_row_index, int64_t width) {
  constexpr int64_t kColumns = 256;  // the parts of so many columns stay in the first cache
  using Stored = typename E::Stored;
  using Wide = typename E::Wide;
  const int64_t prefix = prefix_row_index / layout.prefix_length, position = prefix_row_index % layout.prefix_length;
  Stored* to = reinterpret_cast<Stored*>(tensor.prefix) + prefix_row_index * width;
  for (int64_t first = 0; first < width; first += kColumns) {
    const int64_t columns = std::min(kColumns, width - first);
    Wide parts[kSumParts][kColumns] = {};
    for (int64_t b = 0; b < layout.num_sequences; ++b) {
      const int64_t row = output_row_of_prefix(layout, b, position);
      if (prefix_of_sequence(layout, b) != prefix || row < 0) continue;
      const Stored* from = reinterpret_cast<const Stored*>(tensor.output) + row * width + first;
      for (int64_t c = 0; c < columns; ++c) parts[b % kSumParts][c] += E::widen(from[c]);
    }
    for (int64_t c = 0; c < columns; ++c) {
      Wide sum = parts[0][c];
      for (int part = 1; part < kSumParts; ++part) sum += parts[part][c];
      to[first + c] = E::round(sum);
    }
  }
}

template <typename E>
void sum_prefix_rows(const PrefixArguments& arguments, int64_t num_threads) {
  const PrefixLayout& layout = arguments.layout;
  const int64_t rows = layout.num_prefix_rows();
  const int64_t width = arguments.row_bytes / static_cast<int64_t>(sizeof(typename E::Stored));
  const int64_t bytes = 2 * (layout.num_sequences * layout.prefix_length + rows) * arguments.row_bytes;
  in_parallel(rows, bytes, num_threads, [&](int64_t begin, int64_t end) {
    for (const PrefixTensor& tensor : {arguments.key, arguments.value}) {
      for (int64_t row = begin; tensor.prefix != nullptr && row < end; ++row) {
        sum_prefix_row<E>(layout, tensor, row, width);
      }
    }
  });
}

inline void sum_prefixes(const PrefixArguments& arguments, int64_t num_threads) {
  if (arguments.layout.one_prefix_each()) return;
  switch (arguments.element) {
    case Element::kHalf:
      return sum_prefix_rows<Half>(arguments, num_threads);
    case Element::kBfloat16:
      return sum_prefix_rows<Bfloat16>(arguments, num_threads);
    case Element::kFloat:
      return sum_prefix_rows<Native<float>>(arguments, num_threads);
    case Element::kDouble:
      return sum_prefix_rows<Native<double>>(arguments, num_threads);
  }
}

}  // namespace laser_fast
