// Runs the CPU library of prefix injection with random layouts and arguments, built with the address and
// undefined-behaviour sanitizers: every buffer is exactly as large as it must be, so a step outside ends the program.
// Usage: prefix_kv_fuzz <iterations> <calls>.
//
// An iteration compares the loops with the mapping that a GPU thread follows; exit status 1 where they differ. A call
// hands what is exported some spoilt arguments (dtype, dimensions, sizes, strides, device, memory, values), and it
// either answers or throws. Prints how many calls answered and how many were refused.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/prefix_kv.cpp"

namespace {

using namespace laser_fast;

constexpr char kPoison = 0x5a;
const int32_t kNumbers[] = {-1, 1 << 30, -(1 << 30), 2147483647, -2147483647 - 1};

std::mt19937_64 random_bits(20240607);

int64_t random_up_to(int64_t largest) { return static_cast<int64_t>(random_bits() % (largest + 1)); }

[[noreturn]] void fail(const std::string& what) {
  std::printf("wrong: %s\n", what.c_str());
  std::exit(1);
}

// A heap block of its own for every tensor; an empty one has a null pointer, as in torch.
struct Buffer {
  std::unique_ptr<char[]> bytes;
  int64_t size;

  explicit Buffer(int64_t size, bool random = false) : bytes(size > 0 ? new char[size] : nullptr), size(size) {
    for (int64_t i = 0; i < size; ++i) bytes[i] = random ? static_cast<char>(random_bits()) : kPoison;
  }
  char* data() const { return bytes.get(); }
  bool untouched() const {
    for (int64_t i = 0; i < size; ++i) {
      if (bytes[i] != kPoison) return false;
    }
    return true;
  }
};

struct Case {
  std::vector<int32_t> offsets, slots;
  PrefixLayout layout;

  Case() {
    const int64_t sequences = random_up_to(6), length = random_up_to(4);
    offsets.push_back(0);
    for (int64_t b = 0; b < sequences; ++b) {
      offsets.push_back(offsets.back() + static_cast<int32_t>(random_up_to(2) == 0 ? 0 : random_up_to(9)));
    }
    const int64_t kind = random_up_to(2);  // per sequence, shared, pool
    const int64_t prefixes = kind == 0 ? sequences : kind == 1 ? 1 : 1 + random_up_to(4);
    if (kind == 2) {
      for (int64_t b = 0; b < sequences; ++b) slots.push_back(static_cast<int32_t>(random_up_to(prefixes - 1)));
    }
    layout = {offsets.data(), slots.empty() ? nullptr : slots.data(), sequences, offsets.back(), length, prefixes};
    if (slots.empty() && kind == 2) layout.num_prefixes = sequences;
  }
  int64_t threads() const { return 1 + random_up_to(3); }
};

struct Tensors {
  Buffer text, prefix, output;
  int64_t row_bytes;

  Tensors(const PrefixLayout& layout, int64_t row_bytes, bool forward)
      : text(layout.num_text_rows * row_bytes, forward),
        prefix(layout.num_prefix_rows() * row_bytes, forward),
        output(layout.num_output_rows() * row_bytes, !forward),
        row_bytes(row_bytes) {}
  PrefixTensor data() const { return {text.data(), prefix.data(), output.data()}; }

  // Row by row, through the mapping that a GPU thread follows.
  bool rows_match(const PrefixLayout& layout, bool with_text, bool with_prefix) const {
    for (int64_t row = 0; row < layout.num_output_rows(); ++row) {
      const PrefixSource source = source_of_output_row(layout, row);
      if (source.from_prefix ? !with_prefix : !with_text) continue;
      const char* from = (source.from_prefix ? prefix : text).data() + source.row * row_bytes;
      if (row_bytes > 0 && std::memcmp(from, output.data() + row * row_bytes, row_bytes) != 0) return false;
    }
    return true;
  }
};

void check_forward() {
  const Case given;
  const PrefixLayout& layout = given.layout;
  if (!layout_error(layout).empty()) fail("a good layout is refused: " + layout_error(layout));
  const int64_t row_bytes = 2 * random_up_to(20);
  const Tensors key(layout, row_bytes, true), value(layout, row_bytes, true);
  std::vector<int32_t> output_offsets(layout.num_sequences + 1, -1);
  inject_rows({layout, key.data(), value.data(), output_offsets.data(), row_bytes, Element::kHalf}, given.threads());
  if (!key.rows_match(layout, true, true) || !value.rows_match(layout, true, true)) fail("forward");
  if (output_offsets.back() != layout.num_output_rows()) fail("output offsets");
}

template <typename E>
void check_backward(Element element) {
  using Stored = typename E::Stored;
  const Case given;
  const PrefixLayout& layout = given.layout;
  const int64_t width = random_up_to(300), row_bytes = width * static_cast<int64_t>(sizeof(Stored));
  const Tensors key(layout, row_bytes, false), value(layout, row_bytes, false);
  const bool with_text = random_up_to(2) > 0, with_prefix = random_up_to(2) > 0;
  PrefixTensor of_key = key.data();
  if (!with_text) of_key.text = nullptr;
  if (!with_prefix) of_key.prefix = nullptr;
  const PrefixArguments arguments = {layout, of_key, value.data(), nullptr, row_bytes, element};
  gather_rows(arguments, given.threads());
  sum_prefixes(arguments, given.threads());
  const bool copied = layout.one_prefix_each();
  if (!key.rows_match(layout, with_text, with_prefix && copied)) fail("gather of keys");
  if (!value.rows_match(layout, true, copied)) fail("gather of values");
  if (!with_text && !key.text.untouched()) fail("a text gradient that nobody needs");
  if (!with_prefix && !key.prefix.untouched()) fail("a prefix gradient that nobody needs");
}

// One number of a good layout is spoilt: it must be refused, and nothing may have been written by then.
void check_refusal() {
  Case given;
  PrefixLayout& layout = given.layout;
  const Tensors tensors(layout, 8, true);
  std::vector<int32_t>& spoilt = given.slots.empty() || random_up_to(1) == 0 ? given.offsets : given.slots;
  spoilt[random_up_to(static_cast<int64_t>(spoilt.size()) - 1)] = kNumbers[random_up_to(4)];
  layout.num_text_rows += random_up_to(2);  // rows of no sequence
  std::vector<int32_t> output_offsets(layout.num_sequences + 1, -1);
  if (layout_error(layout).empty()) {
    inject_rows({layout, tensors.data(), tensors.data(), output_offsets.data(), 8, Element::kHalf}, 1);
    fail("a bad layout is accepted");
  }
  if (!tensors.output.untouched() || output_offsets.back() != -1) fail("a bad layout is written");
  // a GPU does not refuse it, but maps no output row to a place outside
  for (int64_t row = 0; row < layout.num_output_rows(); ++row) {
    const PrefixSource source = source_of_output_row(layout, row);
    const int64_t rows = source.from_prefix ? layout.num_prefix_rows() : layout.num_text_rows;
    if (source.row < -1 || source.row >= rows) fail("a bad layout reads outside");
  }
}

const DLDataType kDtypes[] = {{kDLFloat, 16, 1}, {kDLBfloat, 16, 1}, {kDLFloat, 32, 1}, {kDLFloat, 64, 1}};
const DLDataType kOther[] = {{kDLInt, 64, 1}, {kDLInt, 32, 2}, {kDLFloat, 8, 1}, {kDLFloat, 32, 1}, {kDLBfloat, 16, 1}};
const int64_t kSizes[] = {-1, 0, 1, 7, int64_t{1} << 31, int64_t{1} << 40, int64_t{1} << 62};

struct Argument {
  DLTensor tensor{};
  std::vector<int64_t> shape, strides;
  std::unique_ptr<char[]> memory;
  int64_t bytes = 0;

  Argument(DLDataType dtype, std::vector<int64_t> sizes) : shape(std::move(sizes)) {
    tensor.dtype = dtype;
    tensor.device = {kDLCPU, 0};
    settle();
  }

  // Dense strides and as much memory as the shape asks for; none for a shape that nobody could hold.
  void settle() {
    int64_t numbers = 1;
    strides.assign(shape.size(), 1);
    for (size_t i = shape.size(); i-- > 0;) {
      strides[i] = numbers;
      const bool held = shape[i] >= 0 && shape[i] <= 4096 && numbers <= 1 << 20;
      numbers = held ? numbers * shape[i] : 0;
    }
    bytes = numbers * tensor.dtype.bits * tensor.dtype.lanes / 8;
    memory.reset(bytes > 0 ? new char[bytes]() : nullptr);
    tensor.data = memory.get();
    point();
  }
  void point() {
    tensor.ndim = static_cast<int32_t>(shape.size());
    tensor.shape = shape.data();
    tensor.strides = strides.data();
  }
  void fill(const std::vector<int32_t>& numbers) {
    if (!numbers.empty()) std::memcpy(memory.get(), numbers.data(), numbers.size() * sizeof(int32_t));
  }
  TensorView view() const { return TensorView(&tensor); }

  void spoil() {
    const int64_t kind = random_up_to(6),
                  any = shape.empty() ? 0 : random_up_to(static_cast<int64_t>(shape.size()) - 1);
    if (kind == 0) tensor.dtype = kOther[random_up_to(4)];
    if (kind == 1 && !shape.empty()) shape.pop_back();
    if (kind == 2) shape.push_back(1 + random_up_to(2));
    if (kind == 3 && !shape.empty()) shape[any] = kSizes[random_up_to(6)];
    if (kind <= 3) settle();
    if (kind == 4 && !strides.empty()) strides[any] += 1 - 2 * random_up_to(1);
    if (kind == 5) tensor.device.device_type = kDLCUDA;
    if (kind == 6) {
      if (tensor.dtype.code != kDLInt || bytes < 4 || random_up_to(3) == 0) {
        tensor.data = nullptr;
      } else {
        reinterpret_cast<int32_t*>(memory.get())[random_up_to(bytes / 4 - 1)] = kNumbers[random_up_to(4)];
      }
    }
  }
};

OptionalTensor given(const Argument& argument, bool present) {
  return present ? OptionalTensor(argument.view()) : OptionalTensor(std::nullopt);
}

void call() {
  const int64_t sequences = random_up_to(3), length = random_up_to(3), heads = random_up_to(2), size = random_up_to(3);
  std::vector<int32_t> offsets = {0}, slots;
  for (int64_t b = 0; b < sequences; ++b) offsets.push_back(offsets.back() + static_cast<int32_t>(random_up_to(3)));
  const int64_t kind = random_up_to(2), prefixes = kind == 0 ? sequences : kind == 1 ? 1 : 1 + random_up_to(2);
  for (int64_t b = 0; b < sequences; ++b)
    slots.push_back(static_cast<int32_t>(random_up_to(prefixes - (prefixes > 0))));
  const int64_t text = offsets.back(), rows = text + sequences * length;
  const DLDataType dtype = kDtypes[random_up_to(3)];
  const auto shaped = [&](std::vector<int64_t> sizes) {
    sizes.insert(sizes.end(), {heads, size});
    return Argument(dtype, sizes);
  };
  // in the order of an injection's arguments
  std::vector<Argument> all;
  for (int i = 0; i < 2; ++i) all.push_back(shaped({text}));
  for (int i = 0; i < 2; ++i) all.push_back(shaped({prefixes, length}));
  all.emplace_back(kInt32, std::vector<int64_t>{sequences + 1});
  all.emplace_back(kInt32, std::vector<int64_t>{sequences});
  for (int i = 0; i < 2; ++i) all.push_back(shaped({rows}));
  all.emplace_back(kInt32, std::vector<int64_t>{sequences + 1});
  all[4].fill(offsets);
  all[5].fill(slots);
  for (Argument& argument : all) argument.point();  // the vector moved them
  for (int64_t spoilt = random_up_to(2); spoilt > 0; --spoilt) all[random_up_to(8)].spoil();
  const auto a = [&](int i) { return all[i].view(); };
  const OptionalTensor index = given(all[5], kind == 2);
  const int64_t threads = 1 + random_up_to(2);
  if (random_up_to(1) == 0) {
    return inject_prefix_kv<Cpu, int64_t>(a(0), a(1), a(2), a(3), a(4), index, a(6), a(7), a(8), threads);
  }
  const bool other = random_up_to(5) == 0;
  const int64_t some_prefixes = other ? kSizes[random_up_to(6)] : prefixes;
  const int64_t some_length = other ? kSizes[random_up_to(6)] : length;
  const auto maybe = [&](int i) { return given(all[i], random_up_to(4) > 0); };
  inject_prefix_kv_backward<Cpu, int64_t>(maybe(6), maybe(7), a(4), index, some_prefixes, some_length, maybe(0),
                                          maybe(1), maybe(2), maybe(3), threads);
}

}  // namespace

int main(int, char** arguments) {
  const int64_t iterations = std::atoll(arguments[1]), calls = std::atoll(arguments[2]);
  for (int64_t i = 0; i < iterations; ++i) {
    check_forward();
    check_refusal();
    check_backward<Half>(Element::kHalf);
    check_backward<Bfloat16>(Element::kBfloat16);
    check_backward<Native<float>>(Element::kFloat);
    check_backward<Native<double>>(Element::kDouble);
  }
  int64_t refused = 0;
  for (int64_t i = 0; i < calls; ++i) {
    try {
      call();
    } catch (const tvm::ffi::Error&) {
      ++refused;
    }
  }
  std::printf("%lld answered, %lld refused\n", static_cast<long long>(calls - refused),
              static_cast<long long>(refused));
  return 0;
}
