#include "ferry/quant/bitsandbytes_4bit.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <functional>
#include <numeric>

#include "ferry/base/error.h"
#include "ferry/quant/float_codes.h"
#include "ferry/quant/row_kernels.h"
#include "ferry/quant/rows.h"

namespace ferry::quant {

namespace {

// NormalFloat4 (QLoRA, arXiv 2305.14314): quantiles of a normal distribution.
constexpr std::array<float, 16> kNf4 = {-1.0f,        -0.69619280f, -0.52507305f,  -0.39491749f,
                                        -0.28444138f, -0.18477343f, -0.091050036f, 0.0f,
                                        0.079580300f, 0.16093020f,  0.24611230f,   0.33791524f,
                                        0.44070983f,  0.56261700f,  0.72295684f,   1.0f};

constexpr int64_t kMaxBlockSize = 1 << 20;  // bitsandbytes' own ends at 4096

int64_t blocks_of(int64_t count, int64_t block_size) {
  return (count + block_size - 1) / block_size;
}

void check_block_size(int64_t block_size) {
  if (block_size < 1 || block_size > kMaxBlockSize) {
    throw_error<ArgumentError>("bitsandbytes: got a block size of {}, expected 1 to {}", block_size,
                               kMaxBlockSize);
  }
}

std::vector<int64_t> qdata_shape_of(int64_t count, const BitsAndBytes4bitWeight::Options& options) {
  const int64_t bytes = (count + 1) / 2, item = io::item_size(options.storage);
  std::vector<int64_t> shape = options.qdata_shape;
  if (shape.empty()) shape = {bytes / item, 1};
  int64_t stored =
      std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>()) * item;
  if (stored != bytes) {
    throw_error<ArgumentError>("bitsandbytes {}: got {} bytes of codes, expected {} for {} values",
                               options.quant_type, stored, bytes, count);
  }
  return shape;
}

std::vector<Component> components_of(const std::vector<int64_t>& shape,
                                     const BitsAndBytes4bitWeight::Options& options) {
  if (options.quant_type != "nf4" && options.quant_type != "fp4") {
    throw_error<ArgumentError>("bitsandbytes: got quant_type \"{}\", expected \"nf4\" or \"fp4\"",
                               options.quant_type);
  }
  check_block_size(options.block_size);
  if (options.nested) check_block_size(options.nested->block_size);
  const int64_t count = shape[0] * shape[1], blocks = blocks_of(count, options.block_size);
  std::vector<Component> components{
      {"qdata", options.storage, qdata_shape_of(count, options)},
      {"absmax", options.nested ? io::Dtype::U8 : io::Dtype::F32, {blocks}},
      {"quant_map", io::Dtype::F32, {16}}};
  if (options.nested) {
    components.push_back(
        {"nested_absmax", io::Dtype::F32, {blocks_of(blocks, options.nested->block_size)}});
    components.push_back({"nested_quant_map", io::Dtype::F32, {256}});
  }
  return components;
}

// `count` elements from `first` on of a stored vector.
weights::StoredTensor cut(const weights::StoredTensor& stored, int64_t first, int64_t count,
                          std::vector<int64_t> shape) {
  weights::StoredTensor part = stored;
  part.shape = std::move(shape);
  part.offset = stored.offset + first * io::item_size(stored.dtype);
  part.size_bytes = count * io::item_size(stored.dtype);
  return part;
}

}  // namespace

BitsAndBytes4bitWeight::BitsAndBytes4bitWeight(std::vector<int64_t> shape, Options options)
    : QuantizedWeight(shape, components_of(shape, options)), options_(std::move(options)) {}

at::Tensor BitsAndBytes4bitWeight::dequantize(ComponentTensors components,
                                              at::ScalarType dtype) const {
  const int64_t count = rows() * columns();
  auto per_element = [](const at::Tensor& values, int64_t block_size, int64_t elements) {
    return values.unsqueeze(1)
        .expand({values.size(0), block_size})
        .reshape({-1})
        .narrow(0, 0, elements);
  };
  auto at_codes = [](const at::Tensor& codes, const at::Tensor& table) {
    return table.index_select(0, codes.to(at::kInt));
  };
  at::Tensor bytes = components[0].contiguous().view({-1}).view(at::kByte);
  at::Tensor codes = unpack_nibbles(bytes, /*high_first=*/true).narrow(0, 0, count);
  at::Tensor absmax = components[1];
  if (options_.nested) {
    absmax = at_codes(absmax, components[4]) *
                 per_element(components[3], options_.nested->block_size, absmax.size(0)) +
             options_.nested->offset;
  }
  at::Tensor values =
      at_codes(codes, components[2]) * per_element(absmax, options_.block_size, count);
  return values.view(shape()).to(dtype);
}

void BitsAndBytes4bitWeight::dequantize_rows(ComponentTensors components, int64_t first,
                                             int64_t count, at::ScalarType dtype,
                                             void* into) const {
  const auto* bytes = static_cast<const uint8_t*>(components[0].const_data_ptr());
  const float* table = components[2].const_data_ptr<float>();
  if (count == 0) return;
  auto absmax = [&](int64_t block) {
    if (!options_.nested) return components[1].const_data_ptr<float>()[block];
    const float nested = components[3].const_data_ptr<float>()[block / options_.nested->block_size];
    const uint8_t code = components[1].const_data_ptr<uint8_t>()[block];
    float product = components[4].const_data_ptr<float>()[code] * nested;
    return product + options_.nested->offset;
  };
  const int64_t block = options_.block_size;
  const int64_t begin = first * columns(), end = begin + count * columns();
  const int64_t first_block = begin / block;
  std::vector<float> scales((end - 1) / block - first_block + 1);
  for (size_t i = 0; i < scales.size(); ++i)
    scales[i] = absmax(first_block + static_cast<int64_t>(i));
  row_kernels(dtype).codebook4(bytes + first_block * block / 2, table, scales.data(), block,
                               begin - first_block * block, end - begin, into);
}

StoredQuantized BitsAndBytes4bitWeight::rows_of(const std::vector<weights::StoredTensor>& stored,
                                                int64_t first, int64_t count) const {
  const int64_t begin = first * columns(), elements = count * columns();
  const int64_t block = options_.block_size;
  const int64_t per_item = 2 * io::item_size(options_.storage);
  const bool last = first + count == rows();
  bool whole = begin % block == 0 && (last || elements % block == 0) && begin % per_item == 0 &&
               (last || elements % per_item == 0);
  if (options_.nested) {
    const int64_t span = block * options_.nested->block_size;
    whole = whole && begin % span == 0 && (last || elements % span == 0);
  }
  for (const weights::StoredTensor& tensor : stored) whole = whole && !tensor.encoding;
  if (!whole) {
    throw_error<FormatError>(
        "{}: '{}' is stored as {} in blocks of {} values, and rows {} to {} do not begin and end "
        "with blocks: it cannot be cut there",
        stored.front().file->path().string(), stored.front().key, scheme(), block, first,
        first + count);
  }
  Options options = options_;
  options.qdata_shape = {};
  StoredQuantized part;
  part.weight = std::make_shared<BitsAndBytes4bitWeight>(std::vector<int64_t>{count, columns()},
                                                         std::move(options));
  const std::vector<Component>& all = part.weight->components();
  part.components.push_back(cut(stored[0], begin / per_item, all[0].shape[0], all[0].shape));
  part.components.push_back(cut(stored[1], begin / block, all[1].shape[0], all[1].shape));
  part.components.push_back(stored[2]);
  if (options_.nested) {
    const int64_t nested = begin / block / options_.nested->block_size;
    part.components.push_back(cut(stored[3], nested, all[3].shape[0], all[3].shape));
    part.components.push_back(stored[4]);
  }
  return part;
}

namespace {

// For each value how many of the 15 borders lie below it; even ones in the high half of their byte.
at::Tensor nearest_codes(const at::Tensor& values, const float* borders) {
  constexpr int64_t kAtOnce = 64;
  const int64_t bytes = values.numel() / 2;
  at::Tensor packed = at::empty({bytes, 1}, at::kByte);
  const float* from = values.const_data_ptr<float>();
  auto* into = packed.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, (bytes + kAtOnce - 1) / kAtOnce, 64, [&](int64_t begin, int64_t end) {
    std::array<float, 2 * kAtOnce> value{};
    std::array<int32_t, 2 * kAtOnce> code;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kAtOnce, count = std::min(kAtOnce, bytes - first);
      std::copy_n(from + 2 * first, 2 * count, value.begin());
      code.fill(0);
      for (int border = 0; border < 15; ++border) {
        for (int64_t i = 0; i < 2 * kAtOnce; ++i) code[i] += value[i] > borders[border] ? 1 : 0;
      }
      for (int64_t i = 0; i < count; ++i)
        into[first + i] = static_cast<uint8_t>(code[2 * i] << 4 | code[2 * i + 1]);
    }
  });
  return packed;
}

}  // namespace

Nf4Components quantize_nf4(const at::Tensor& weight, int64_t block_size) {
  if (weight.dim() != 2 || block_size < 2 || block_size % 2 != 0) {
    throw_error<ArgumentError>(
        "nf4: got a weight of {} dimensions and blocks of {}, expected a "
        "matrix and an even block size",
        weight.dim(), block_size);
  }
  at::Tensor table = at::empty({16}, at::kFloat);
  std::copy(kNf4.begin(), kNf4.end(), table.mutable_data_ptr<float>());
  at::Tensor borders = (table.narrow(0, 0, 15) + table.narrow(0, 1, 15)) / 2;

  at::Tensor flat = weight.detach().reshape({-1}).to(at::kFloat);
  const int64_t count = flat.size(0), full = count / block_size * block_size;
  at::Tensor blocks = flat.narrow(0, 0, full).view({-1, block_size});
  at::Tensor absmax = blocks.abs().amax(1);
  at::Tensor scaled =
      (blocks * absmax.clamp_min(1e-38).reciprocal().unsqueeze(1)).clamp(-1, 1).view({-1});
  if (full < count) {  // the last block is short, and divided instead of multiplied
    at::Tensor rest = flat.narrow(0, full, count - full);
    at::Tensor greatest = rest.abs().amax().clamp_min(1e-38);
    absmax = at::cat({absmax, greatest.unsqueeze(0)});
    scaled = at::cat({scaled, (rest / greatest).clamp(-1, 1)});
  }
  if (count % 2 != 0) scaled = at::constant_pad_nd(scaled, {0, 1});
  at::Tensor packed = nearest_codes(scaled.contiguous(), borders.const_data_ptr<float>());
  return {packed, absmax, table};
}

}  // namespace ferry::quant
