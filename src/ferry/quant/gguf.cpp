#include "ferry/quant/gguf.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <cstring>
#include <unordered_set>

#include "ferry/base/error.h"
#include "ferry/quant/gguf_blocks.h"
#include "ferry/quant/row_kernels.h"

namespace ferry::quant {

namespace {

using io::GgmlType;

// ---- blocks by torch's operators; [n, bytes] each ----

at::Tensor bytes_at(const at::Tensor& blocks, int64_t begin, int64_t count) {
  return blocks.narrow(1, begin, count);
}

// Half-precision numbers side by side, as float32 [n, count].
at::Tensor halves_at(const at::Tensor& blocks, int64_t begin, int64_t count = 1) {
  return bytes_at(blocks, begin, 2 * count).contiguous().view(at::kHalf).to(at::kFloat);
}

at::Tensor constant(const at::Tensor& like, std::vector<int64_t> values) {
  return at::tensor(values, at::kByte).to(like.device());
}

// Each byte of [n, count] shifted right by each of `shifts` and cut to `bits`: [n, count /
// in_group, shifts, in_group], that is, group by group all bytes at one shift, then at the next.
at::Tensor fields(const at::Tensor& bytes, int64_t in_group, std::vector<int64_t> shifts,
                  int bits) {
  const auto count = static_cast<int64_t>(shifts.size());
  at::Tensor shift = constant(bytes, std::move(shifts)).view({1, 1, count, 1});
  at::Tensor groups = bytes.reshape({bytes.size(0), -1, 1, in_group});
  return groups.__rshift__(shift).bitwise_and((1 << bits) - 1);
}

at::Tensor nibbles(const at::Tensor& bytes, int64_t in_group) {
  return fields(bytes, in_group, {0, 4}, 4);
}

// Bit j of each block's little-endian number: [n, 8 * bytes].
at::Tensor bits_of(const at::Tensor& bytes) {
  return fields(bytes, 1, {0, 1, 2, 3, 4, 5, 6, 7}, 1).reshape({bytes.size(0), -1});
}

// [n, elements] as float32.
at::Tensor flat(const at::Tensor& values) {
  return values.reshape({values.size(0), -1}).to(at::kFloat);
}

at::Tensor from_table(const at::Tensor& nibble) {
  at::Tensor table = at::empty({16}, at::kFloat);
  std::memcpy(table.mutable_data_ptr(), kIq4Values, sizeof(kIq4Values));
  return table.to(nibble.device()).take(nibble.to(at::kLong));
}

// Scales [n, groups] for values [n, elements].
at::Tensor scaled(const at::Tensor& scales, const at::Tensor& values) {
  at::Tensor groups = values.view({values.size(0), scales.size(1), -1});
  return scales.unsqueeze(2).mul(groups).view(values.sizes());
}
at::Tensor scaled(const at::Tensor& scales, const at::Tensor& values, const at::Tensor& minimums) {
  at::Tensor groups = scaled(scales, values).view({values.size(0), scales.size(1), -1});
  return groups.sub(minimums.unsqueeze(2)).view(values.sizes());
}

// Scales and minimums [n, 8] of Q4_K and Q5_K; gguf_blocks.cpp says how they are packed.
std::pair<at::Tensor, at::Tensor> six_bit_scales(const at::Tensor& blocks) {
  at::Tensor first = bytes_at(blocks, 4, 4), second = bytes_at(blocks, 8, 4);
  at::Tensor third = bytes_at(blocks, 12, 4);
  auto upper = [](const at::Tensor& bytes) { return bytes.__rshift__(2).bitwise_and(0x30); };
  at::Tensor scale =
      at::cat({first.bitwise_and(63), third.bitwise_and(15).bitwise_or(upper(first))}, 1);
  at::Tensor minimum =
      at::cat({second.bitwise_and(63), third.__rshift__(4).bitwise_or(upper(second))}, 1);
  return {halves_at(blocks, 0).mul(scale.to(at::kFloat)),
          halves_at(blocks, 2).mul(minimum.to(at::kFloat))};
}

at::Tensor q2_k(const at::Tensor& blocks) {
  at::Tensor scales = bytes_at(blocks, 0, 16);
  at::Tensor q = flat(fields(bytes_at(blocks, 16, 64), 32, {0, 2, 4, 6}, 2));
  return scaled(halves_at(blocks, 80).mul(scales.bitwise_and(15).to(at::kFloat)), q,
                halves_at(blocks, 82).mul(scales.__rshift__(4).to(at::kFloat)));
}

at::Tensor q3_k(const at::Tensor& blocks) {
  const int64_t n = blocks.size(0);
  at::Tensor low = nibbles(bytes_at(blocks, 96, 8), 8).reshape({n, 16});
  at::Tensor high = fields(bytes_at(blocks, 104, 4), 4, {0, 2, 4, 6}, 2).reshape({n, 16});
  at::Tensor scales = low.bitwise_or(high.__lshift__(4)).to(at::kFloat).sub(32);
  at::Tensor q = flat(fields(bytes_at(blocks, 32, 64), 32, {0, 2, 4, 6}, 2));
  at::Tensor third = flat(fields(bytes_at(blocks, 0, 32), 32, {0, 1, 2, 3, 4, 5, 6, 7}, 1));
  return scaled(halves_at(blocks, 108).mul(scales), q.sub(third.neg().add(1).mul(4)));
}

at::Tensor q5_k(const at::Tensor& blocks) {
  auto [scales, minimums] = six_bit_scales(blocks);
  at::Tensor low = flat(nibbles(bytes_at(blocks, 48, 128), 32));
  at::Tensor high = flat(fields(bytes_at(blocks, 16, 32), 32, {0, 1, 2, 3, 4, 5, 6, 7}, 1));
  return scaled(scales, low.add(high.mul(16)), minimums);
}

at::Tensor q6_k(const at::Tensor& blocks) {
  at::Tensor low = flat(nibbles(bytes_at(blocks, 0, 128), 64));
  at::Tensor high = flat(fields(bytes_at(blocks, 128, 64), 32, {0, 2, 4, 6}, 2));
  at::Tensor scales = bytes_at(blocks, 192, 16).contiguous().view(at::kChar).to(at::kFloat);
  return scaled(halves_at(blocks, 208).mul(scales), low.add(high.mul(16)).sub(32));
}

at::Tensor iq4_xs(const at::Tensor& blocks) {
  const int64_t n = blocks.size(0);
  at::Tensor low = fields(bytes_at(blocks, 4, 4), 1, {0, 4}, 4).reshape({n, 8});
  at::Tensor high = fields(bytes_at(blocks, 2, 2), 1, {0, 2, 4, 6}, 2).reshape({n, 8});
  at::Tensor scales = low.bitwise_or(high.__lshift__(4)).to(at::kFloat).sub(32);
  at::Tensor q = from_table(nibbles(bytes_at(blocks, 8, 128), 16)).reshape({n, 256});
  return scaled(halves_at(blocks, 0).mul(scales), q);
}

// Four bits from `at` on, with the fifth from the 32 bits before them: [n, 32].
at::Tensor five_bits(const at::Tensor& blocks, int64_t at) {
  at::Tensor low = flat(nibbles(bytes_at(blocks, at, 16), 16));
  return low.add(bits_of(bytes_at(blocks, at - 4, 4)).to(at::kFloat).mul(16));
}

at::Tensor dequantize_2d(const at::Tensor& blocks, GgmlType type) {
  switch (type) {
    case GgmlType::Q8_0:
      return bytes_at(blocks, 2, 32)
          .contiguous()
          .view(at::kChar)
          .to(at::kFloat)
          .mul(halves_at(blocks, 0));
    case GgmlType::Q4_0:
      return halves_at(blocks, 0).mul(flat(nibbles(bytes_at(blocks, 2, 16), 16)).sub(8));
    case GgmlType::Q4_1:
      return halves_at(blocks, 0)
          .mul(flat(nibbles(bytes_at(blocks, 4, 16), 16)))
          .add(halves_at(blocks, 2));
    case GgmlType::Q5_0:
      return halves_at(blocks, 0).mul(five_bits(blocks, 6).sub(16));
    case GgmlType::Q5_1:
      return halves_at(blocks, 0).mul(five_bits(blocks, 8)).add(halves_at(blocks, 2));
    case GgmlType::IQ4_NL:
      return halves_at(blocks, 0).mul(
          from_table(nibbles(bytes_at(blocks, 2, 16), 16)).reshape({blocks.size(0), 32}));
    case GgmlType::Q2_K:
      return q2_k(blocks);
    case GgmlType::Q3_K:
      return q3_k(blocks);
    case GgmlType::Q4_K: {
      auto [scales, minimums] = six_bit_scales(blocks);
      return scaled(scales, flat(nibbles(bytes_at(blocks, 16, 128), 32)), minimums);
    }
    case GgmlType::Q5_K:
      return q5_k(blocks);
    case GgmlType::Q6_K:
      return q6_k(blocks);
    case GgmlType::IQ4_XS:
      return iq4_xs(blocks);
    default:
      throw_error<ArgumentError>("{}: ferry does not compute with it", io::name(type));
  }
}

std::vector<Component> components_of(const std::vector<int64_t>& shape, GgmlType type) {
  if (!find_dequantize(type)) {
    throw_error<ArgumentError>("GGUF {}: ferry does not compute with this type", io::name(type));
  }
  if (shape.size() != 2 || shape[0] <= 0 || shape[1] <= 0 ||
      shape[1] % io::block_elements(type) != 0) {
    throw_error<ArgumentError>(
        "GGUF {}: got the shape [{}], expected [out, in] of whole blocks of {}", io::name(type),
        fmt::join(shape, ", "), io::block_elements(type));
  }
  const int64_t row_bytes = shape[1] / io::block_elements(type) * io::block_bytes(type);
  return {{"blocks", io::Dtype::U8, {shape[0], row_bytes}}};
}

template <class T>
void round_to(const std::vector<float>& values, void* into) {
  T* out = static_cast<T*>(into);
  for (size_t i = 0; i < values.size(); ++i) out[i] = static_cast<T>(values[i]);
}

// ---- opening ----

constexpr std::string_view kPrefix = "model.diffusion_model.";

int64_t count_elements(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (int64_t extent : shape) count *= extent;
  return count;
}

// The shape that a tensor had before a writer folded it, or its own.
std::vector<int64_t> true_shape(const io::GgufTensor& tensor, const std::string& name,
                                const io::GgufMetadata& metadata, const std::string& where) {
  constexpr std::string_view kKey = "comfy.gguf.orig_shape.";
  const io::GgufValue* value = io::find_value(metadata, std::string(kKey) + tensor.name);
  if (!value) value = io::find_value(metadata, std::string(kKey) + name);
  if (!value) return tensor.shape;
  std::optional<std::vector<int64_t>> shape = value->as_integers();
  int64_t elements = 1;
  bool fits = shape && shape->size() <= 8;
  if (fits) {
    for (int64_t extent : *shape)
      fits = fits && extent >= 0 && !__builtin_mul_overflow(elements, extent, &elements);
  }
  if (!fits || elements != count_elements(tensor.shape)) {
    throw_error<FormatError>(
        "{}: tensor \"{}\" holds [{}], but {}{} says {}: expected whole numbers with the same "
        "product",
        where, tensor.name, fmt::join(tensor.shape, ", "), kKey, tensor.name,
        shape ? fmt::format("[{}]", fmt::join(*shape, ", ")) : "no list of whole numbers");
  }
  return *shape;
}

void check_single_file(const io::GgufMetadata& metadata, const std::string& where) {
  const io::GgufValue* parts = io::find_value(metadata, "split.count");
  if (parts && parts->as_integer().value_or(2) > 1) {
    throw_error<FormatError>(
        "{}: is one of {} parts of a split file; join them with llama.cpp's gguf-split --merge",
        where, parts->as_integer().value_or(0));
  }
}

// A quantized tensor: a matrix of whole blocks is one of weights.quantized, anything else is
// dequantized as it is read.
void add_quantized(StoredWeights& weights, const io::GgufTensor& tensor,
                   weights::StoredTensor stored, const std::vector<int64_t>& shape) {
  const int64_t in_block = io::block_elements(tensor.type);
  const bool is_matrix = shape.size() == 2 && shape[1] % in_block == 0;
  const int64_t elements = count_elements(tensor.shape);
  std::vector<int64_t> matrix =
      is_matrix ? shape : std::vector<int64_t>{elements / tensor.shape.back(), tensor.shape.back()};
  auto weight = std::make_shared<Gguf>(matrix, tensor.type);
  stored.dtype = io::Dtype::U8;
  stored.shape = weight->components()[0].shape;
  StoredQuantized quantized{std::move(weight), {std::move(stored)}};
  if (is_matrix) {
    weights.quantized.emplace(quantized.components[0].key, std::move(quantized));
    return;
  }
  weights::StoredTensor plain = dequantized_when_read(quantized, io::Dtype::F32);
  plain.shape = shape;
  weights.plain.push_back(std::move(plain));
}

}  // namespace

Gguf::Gguf(std::vector<int64_t> shape, io::GgmlType type)
    : QuantizedWeight(shape, components_of(shape, type)),
      type_(type),
      scheme_(fmt::format("GGUF {}", io::name(type))) {}

at::Tensor Gguf::dequantize(ComponentTensors components, at::ScalarType dtype) const {
  at::Tensor blocks = components[0].reshape({rows(), -1, io::block_bytes(type_)});
  return dequantize_blocks(blocks, type_).view({rows(), columns()}).to(dtype);
}

namespace {

// The vectorised kernel of the types that most files are made of; null for the others.
auto row_kernel(const RowKernels& kernels, io::GgmlType type) -> decltype(kernels.gguf_q8_0) {
  switch (type) {
    case io::GgmlType::Q8_0:
      return kernels.gguf_q8_0;
    case io::GgmlType::Q4_0:
      return kernels.gguf_q4_0;
    case io::GgmlType::Q4_K:
      return kernels.gguf_q4_k;
    case io::GgmlType::Q6_K:
      return kernels.gguf_q6_k;
    default:
      return nullptr;
  }
}

}  // namespace

void Gguf::dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                           at::ScalarType dtype, void* into) const {
  const int64_t row_bytes = components[0].size(1);
  const auto* from = static_cast<const std::byte*>(components[0].const_data_ptr());
  if (auto kernel = row_kernel(row_kernels(dtype), type_)) {
    kernel(from + first * row_bytes, count * columns(), into);
    return;
  }
  const DequantizeBlocks dequantize = find_dequantize(type_);
  const int64_t blocks = columns() / io::block_elements(type_);
  if (dtype == at::kFloat) {
    dequantize(from + first * row_bytes, count * blocks, static_cast<float*>(into));
    return;
  }
  // A row at a time, so that its float32 values stay in the cache.
  std::vector<float> row(static_cast<size_t>(columns()));
  auto* out = static_cast<std::byte*>(into);
  const int64_t out_bytes = columns() * 2;
  for (int64_t i = 0; i < count; ++i) {
    dequantize(from + (first + i) * row_bytes, blocks, row.data());
    if (dtype == at::kBFloat16) {
      round_to<at::BFloat16>(row, out + i * out_bytes);
    } else {
      round_to<at::Half>(row, out + i * out_bytes);
    }
  }
}

std::shared_ptr<const QuantizedWeight> Gguf::with_rows(int64_t rows) const {
  return std::make_shared<Gguf>(std::vector<int64_t>{rows, columns()}, type_);
}

at::Tensor dequantize_blocks(const at::Tensor& blocks, io::GgmlType type) {
  std::vector<int64_t> shape = blocks.sizes().vec();
  at::Tensor values = dequantize_2d(blocks.reshape({-1, shape.back()}), type);
  shape.back() = io::block_elements(type);
  return values.view(shape);
}

GgufCheckpoint open_gguf(const std::filesystem::path& path) {
  const std::string where = path.string();
  GgufCheckpoint checkpoint;
  checkpoint.file = io::File::open(path);
  io::GgufHeader header = io::read_gguf_header(*checkpoint.file);
  checkpoint.metadata = std::move(header.metadata);
  check_single_file(checkpoint.metadata, where);
  std::unordered_set<std::string> names;
  for (const io::GgufTensor& tensor : header.tensors) {
    std::string name = tensor.name;
    if (name.starts_with(kPrefix)) name.erase(0, kPrefix.size());
    if (!names.insert(name).second) {
      throw_error<FormatError>("{}: \"{}\" is there with and without \"{}\"", where, name, kPrefix);
    }
    std::vector<int64_t> shape = true_shape(tensor, name, checkpoint.metadata, where);
    weights::StoredTensor stored{name,          io::Dtype::U8,    shape, checkpoint.file,
                                 tensor.offset, tensor.size_bytes};
    if (std::optional<io::Dtype> dtype = io::plain_dtype(tensor.type)) {
      stored.dtype = *dtype;
      checkpoint.weights.plain.push_back(std::move(stored));
      continue;
    }
    if (!find_dequantize(tensor.type) || tensor.size_bytes == 0) {
      throw_error<FormatError>(
          "{}: tensor \"{}\" [{}] is stored as {}, which ferry does not compute with; it has Q8_0, "
          "Q6_K, Q5_K, Q4_K, Q3_K, Q2_K, Q5_1, Q5_0, Q4_1, Q4_0, IQ4_NL, IQ4_XS, BF16, F16, F32",
          where, tensor.name, fmt::join(tensor.shape, ", "), io::name(tensor.type));
    }
    add_quantized(checkpoint.weights, tensor, std::move(stored), shape);
  }
  return checkpoint;
}

}  // namespace ferry::quant
