// Calls what the CPU library exports with arguments of which some are spoilt (dtype, dimensions, sizes, strides,
// device, memory, values), built with the address and undefined-behaviour sanitizers: a call either answers or throws,
// and every buffer is exactly as large as its shape says, so a step outside ends the program. Usage:
// prefix_kv_arguments_fuzz <calls>. Prints how many answered and how many were refused.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/prefix_kv.cpp"

namespace {

using namespace laser_fast;

std::mt19937_64 random_bits(20240608);

int64_t random_up_to(int64_t largest) { return static_cast<int64_t>(random_bits() % (largest + 1)); }

const DLDataType kDtypes[] = {{kDLFloat, 16, 1}, {kDLBfloat, 16, 1}, {kDLFloat, 32, 1}, {kDLFloat, 64, 1}};
const DLDataType kOther[] = {{kDLInt, 64, 1}, {kDLInt, 32, 2}, {kDLFloat, 8, 1}, {kDLFloat, 32, 1}, {kDLBfloat, 16, 1}};
const int64_t kSizes[] = {-1, 0, 1, 7, int64_t{1} << 31, int64_t{1} << 40, int64_t{1} << 62};
const int32_t kNumbers[] = {-1, 1 << 30, -(1 << 30), 2147483647, -2147483647 - 1};

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
  const int64_t calls = std::atoll(arguments[1]);
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
