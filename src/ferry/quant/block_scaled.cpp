#include "ferry/quant/block_scaled.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <functional>
#include <numeric>

#include "ferry/base/error.h"
#include "ferry/quant/float_codes.h"
#include "ferry/quant/rows.h"

namespace ferry::quant {

namespace {

bool is_float8(io::Dtype dtype) {
  return dtype == io::Dtype::F8_E4M3 || dtype == io::Dtype::F8_E5M2;
}

std::vector<Component> components_of(const std::vector<int64_t>& shape,
                                     const BlockScaledWeight::Options& options) {
  std::vector<int64_t> stored = shape;
  if (!is_float8(options.elements)) stored[1] /= 2;
  std::vector<Component> components{{"qdata", options.elements, stored},
                                    {"scale", options.scale_dtype, options.scale_shape}};
  if (options.per_tensor_scale)
    components.push_back({"per_tensor_scale", io::Dtype::F32, *options.per_tensor_scale});
  return components;
}

int64_t swizzled_offset(int64_t row, int64_t column, int64_t tiles_in_row) {
  return (row / 128 * tiles_in_row + column / 4) * 512 + row % 32 * 16 + row % 128 / 32 * 4 +
         column % 4;
}

}  // namespace

int64_t swizzled_count(int64_t rows, int64_t scale_columns) {
  return (rows + 127) / 128 * 128 * ((scale_columns + 3) / 4 * 4);
}

BlockScaledWeight::BlockScaledWeight(std::vector<int64_t> shape, Options options)
    : QuantizedWeight(shape, components_of(shape, options)), options_(std::move(options)) {
  const bool e2m1 = options_.elements == io::Dtype::U8;
  if (!e2m1 && !is_float8(options_.elements)) {
    throw_error<ArgumentError>("{}: got values of {}, expected F8_E4M3, F8_E5M2 or U8", scheme(),
                               io::name(options_.elements));
  }
  if (options_.scale_format != io::Dtype::F8_E4M3 && options_.scale_format != io::Dtype::F8_E8M0) {
    throw_error<ArgumentError>("{}: got scales of {}, expected F8_E4M3 or F8_E8M0", scheme(),
                               io::name(options_.scale_format));
  }
  if (options_.scale_dtype != options_.scale_format && options_.scale_dtype != io::Dtype::U8) {
    throw_error<ArgumentError>("{}: got scales stored as {}, expected {} or U8", scheme(),
                               io::name(options_.scale_dtype), io::name(options_.scale_format));
  }
  if (options_.block_size < 1 || columns() % options_.block_size != 0 ||
      (e2m1 && columns() % 2 != 0)) {
    throw_error<ArgumentError>("{}: {} columns are no whole blocks of {}", scheme(), columns(),
                               options_.block_size);
  }
  const std::vector<int64_t>& scale = options_.scale_shape;
  const std::vector<int64_t> plain{rows(), scale_columns()};
  if (options_.swizzled) {
    int64_t count = std::accumulate(scale.begin(), scale.end(), int64_t{1}, std::multiplies<>());
    if (count != swizzled_count(rows(), scale_columns())) {
      throw_error<ArgumentError>(
          "{}: got swizzled scales of shape [{}], expected {} in all for [{}, {}]", scheme(),
          fmt::join(scale, ", "), swizzled_count(rows(), scale_columns()), rows(), columns());
    }
  } else if (scale != plain) {
    throw_error<ArgumentError>("{}: got scales of shape [{}], expected [{}]", scheme(),
                               fmt::join(scale, ", "), fmt::join(plain, ", "));
  }
}

at::Tensor BlockScaledWeight::dequantize(ComponentTensors components, at::ScalarType dtype) const {
  at::Tensor values =
      options_.elements == io::Dtype::U8
          ? look_up(unpack_nibbles(components[0], options_.high_nibble_first), e2m1_values())
          : components[0].to(at::kFloat);
  at::Tensor bytes = components[1].view(at::kByte);
  if (options_.swizzled) {
    const int64_t row_tiles = (rows() + 127) / 128, column_tiles = (scale_columns() + 3) / 4;
    // [row tile, column tile, r % 32, r % 128 / 32, c % 4]
    bytes = bytes.reshape({row_tiles, column_tiles, 32, 4, 4})
                .permute({0, 3, 2, 1, 4})
                .reshape({row_tiles * 128, column_tiles * 4})
                .narrow(0, 0, rows())
                .narrow(1, 0, scale_columns());
  }
  at::Tensor scales = look_up(bytes.contiguous(), byte_values(options_.scale_format));
  if (options_.per_tensor_scale) scales = components[2].view({1, 1}) * scales;
  values = values.view({rows(), scale_columns(), options_.block_size}) * scales.unsqueeze(2);
  return values.view(shape()).to(dtype);
}

void BlockScaledWeight::dequantize_rows(ComponentTensors components, int64_t first, int64_t count,
                                        at::ScalarType dtype, void* into) const {
  const auto* in = static_cast<const uint8_t*>(components[0].const_data_ptr());
  const auto* scale_bytes = static_cast<const uint8_t*>(components[1].const_data_ptr());
  const float* tensor_scale =
      options_.per_tensor_scale ? components[2].const_data_ptr<float>() : nullptr;
  const auto scale_values = byte_values(options_.scale_format);
  const bool e2m1 = options_.elements == io::Dtype::U8;
  const auto codes = e2m1_values();
  const auto bytes = byte_values(e2m1 ? io::Dtype::F8_E4M3 : options_.elements);
  const int64_t tiles_in_row = (scale_columns() + 3) / 4;
  auto value = [&](int64_t element) {
    if (!e2m1) return bytes[in[element]];
    const bool high = (element % 2 == 0) == options_.high_nibble_first;
    return codes[high ? in[element / 2] >> 4 : in[element / 2] & 15];
  };
  write_rows(first, count, columns(), dtype, into, [&](int64_t row, float* out) {
    for (int64_t block = 0; block < scale_columns(); ++block) {
      const int64_t offset = options_.swizzled ? swizzled_offset(row, block, tiles_in_row)
                                               : row * scale_columns() + block;
      float scale = scale_values[scale_bytes[offset]];
      if (tensor_scale) scale = *tensor_scale * scale;
      for (int64_t k = block * options_.block_size; k < (block + 1) * options_.block_size; ++k)
        out[k] = value(row * columns() + k) * scale;
    }
  });
}

std::shared_ptr<const QuantizedWeight> BlockScaledWeight::with_rows(int64_t rows) const {
  if (options_.swizzled) return nullptr;
  Options options = options_;
  options.scale_shape[0] = rows;
  return std::make_shared<BlockScaledWeight>(std::vector<int64_t>{rows, columns()},
                                             std::move(options));
}

}  // namespace ferry::quant
