// The loops of prefix injection on the CPU where the text keys are rotated on their way. No framework.
#ifndef LASER_FAST_PREFIX_KV_ROTARY_H_
#define LASER_FAST_PREFIX_KV_ROTARY_H_

#include "prefix_kv_rows.h"

namespace laser_fast {

// One row of Hkv heads: the first half of a head pairs with its second. The inverse is the transpose of the rotation.
template <typename E, typename Table, bool kInverse>
void rotate_row(const Rotary& rotary, int64_t text_row, const char* from, char* to) {
  const int64_t size = rotary.head_size, half = size / 2;
  const auto* cos = reinterpret_cast<const typename Table::Stored*>(rotary.cos) + text_row * size;
  const auto* sin = reinterpret_cast<const typename Table::Stored*>(rotary.sin) + text_row * size;
  using Stored = typename E::Stored;
  using Wide = typename E::Wide;
  for (int64_t head = 0; head < rotary.num_heads; ++head) {
    const Stored* x = reinterpret_cast<const Stored*>(from) + head * size;
    Stored* out = reinterpret_cast<Stored*>(to) + head * size;
    for (int64_t i = 0; i < half; ++i) {
      const Wide first = E::widen(x[i]), second = E::widen(x[i + half]);
      const Wide cos_first = Table::widen(cos[i]), cos_second = Table::widen(cos[i + half]);
      const Wide sin_first = Table::widen(sin[i]), sin_second = Table::widen(sin[i + half]);
      out[i] = E::round(first * cos_first + second * (kInverse ? sin_second : -sin_first));
      out[i + half] = E::round(second * cos_second + first * (kInverse ? -sin_first : sin_second));
    }
  }
}

template <typename E, typename Table>
void inject_rotated(const PrefixArguments& arguments, const Rotary& rotary, int64_t num_threads) {
  const PrefixLayout& layout = arguments.layout;
  const int64_t bytes = arguments.row_bytes;
  over_output_rows(layout, 1, bytes, num_threads, [&](int64_t, int64_t begin, int64_t end) {
    for_each_run(layout, begin, end, [&](PrefixSource source, int64_t row, int64_t num_rows) {
      const PrefixCopy &key = arguments.key, &value = arguments.value;
      copy_rows(value.output, row, source.from_prefix ? value.prefix : value.text, source.row, num_rows, bytes);
      if (source.from_prefix) return copy_rows(key.output, row, key.prefix, source.row, num_rows, bytes);
      for (int64_t i = 0; i < num_rows; ++i) {
        rotate_row<E, Table, false>(rotary, source.row + i, key.text + (source.row + i) * bytes,
                                    key.output + (row + i) * bytes);
      }
    });
  });
  write_output_offsets(layout, arguments.output_offsets);
}

template <typename E, typename Table>
void gather_rotated(const PrefixGradArguments& arguments, const Rotary& rotary, int64_t num_threads) {
  const PrefixLayout& layout = arguments.layout;
  const int64_t bytes = arguments.row_bytes;
  PrefixGradArguments copied = arguments;
  copied.key.text = nullptr;
  gather_rows(copied, num_threads);
  const PrefixGrad& key = arguments.key;
  if (key.text == nullptr) return;
  over_output_rows(layout, 1, bytes, num_threads, [&](int64_t, int64_t begin, int64_t end) {
    for_each_run(layout, begin, end, [&](PrefixSource source, int64_t row, int64_t num_rows) {
      for (int64_t i = 0; !source.from_prefix && i < num_rows; ++i) {
        rotate_row<E, Table, true>(rotary, source.row + i, key.output + (row + i) * bytes,
                                   key.text + (source.row + i) * bytes);
      }
    });
  });
}

// Calls the function object with the element types of keys and tables as (value-less) arguments.
template <typename Function>
void with_rotary_types(const Rotary& rotary, const Function& function) {
  const bool wide_table = rotary.table_element != rotary.element;
  switch (rotary.element) {
    case Element::kHalf:
      return wide_table ? function(Half{}, Single{}) : function(Half{}, Half{});
    case Element::kBfloat16:
      return wide_table ? function(Bfloat16{}, Single{}) : function(Bfloat16{}, Bfloat16{});
    case Element::kFloat:
      return function(Single{}, Single{});
    case Element::kDouble:
      return wide_table ? function(Double{}, Single{}) : function(Double{}, Double{});
  }
}

inline void inject_rows_rotary(const PrefixArguments& arguments, const Rotary& rotary, int64_t num_threads) {
  with_rotary_types(rotary, [&](auto element, auto table) {
    inject_rotated<decltype(element), decltype(table)>(arguments, rotary, num_threads);
  });
}

inline void gather_rows_rotary(const PrefixGradArguments& arguments, const Rotary& rotary, int64_t num_threads) {
  with_rotary_types(rotary, [&](auto element, auto table) {
    gather_rotated<decltype(element), decltype(table)>(arguments, rotary, num_threads);
  });
}

}  // namespace laser_fast

#endif  // LASER_FAST_PREFIX_KV_ROTARY_H_
