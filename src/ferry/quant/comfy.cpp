#include "ferry/quant/comfy.h"

#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>

#include "ferry/base/error.h"
#include "ferry/io/json_file.h"
#include "ferry/quant/block_scaled.h"
#include "ferry/quant/float8.h"
#include "ferry/quant/pre_scaled.h"
#include "ferry/quant/torchao_int8.h"

namespace ferry::quant {

namespace {

using Json = nlohmann::json;
using Weight = std::shared_ptr<const QuantizedWeight>;
using Extents = std::vector<int64_t>;

constexpr std::string_view kDescription = ".comfy_quant";
constexpr std::string_view kWeight = ".weight";
constexpr std::string_view kMarker = "scaled_fp8";
constexpr uint64_t kMaxDescriptionBytes = 1 << 16;

bool is_float8(io::Dtype dtype) {
  return dtype == io::Dtype::F8_E4M3 || dtype == io::Dtype::F8_E5M2;
}

int64_t count_of(const Extents& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

// A layer, and how its weight is stored.
struct Layer {
  std::string name;    // with the prefix that the keys have
  std::string format;  // ComfyUI's word
  Json description;
};

class Reader {
 public:
  explicit Reader(TensorPool& pool) : pool_(pool) {}

  void join(const Layer& layer) {
    const std::string parameter = layer.name + std::string(kWeight);
    const std::string where = pool_.where(parameter);
    Extents shape = pool_.get(parameter, parameter).shape;
    check_matrix(shape, where, parameter);
    keys_ = {parameter};
    const std::string pre_scale = layer.name + ".pre_quant_scale";
    Weight weight = make_weight(where, parameter, [&]() -> Weight {
      Weight made = make(layer, where);
      const weights::StoredTensor* scale = pool_.find(pre_scale);
      if (!scale) return made;
      keys_.push_back(pre_scale);
      return std::make_shared<PreScaledWeight>(made, scale->dtype, scale->shape);
    });
    pool_.join(parameter, weight, keys_);
    for (const char* unused : {".comfy_quant", ".input_scale", ".scale_input"})
      pool_.drop(layer.name + unused);
  }

 private:
  Weight make(const Layer& layer, const std::string& where) {
    const std::string parameter = layer.name + std::string(kWeight);
    const weights::StoredTensor& values = pool_.get(parameter, parameter);
    if (layer.format == "float8_e4m3fn" || layer.format == "float8_e5m2")
      return make_float8(layer, values);
    if (layer.format == "nvfp4") return make_nvfp4(layer, values);
    if (layer.format == "mxfp8") return make_mxfp8(layer, values);
    if (layer.format == "int8_tensorwise") {
      if (layer.description.value("convrot", Json()) == Json(true)) {
        throw_error<FormatError>(
            "{}: layer '{}' is int8_tensorwise with \"convrot\" (rotated weights), which ferry "
            "does not read",
            where, layer.name);
      }
      return make_int8(layer, values);
    }
    if (layer.format == "int8_blockwise") return make_int8(layer, values);
    throw_error<FormatError>(
        "{}: layer '{}' has the format \"{}\", which ferry does not read; it reads float8_e4m3fn, "
        "float8_e5m2, nvfp4, mxfp8, int8_tensorwise and int8_blockwise",
        where, layer.name, layer.format);
  }

  // The scale's key: today's, or that beside a scaled_fp8 marker.
  std::string scale_key(const Layer& layer) const {
    std::string key = layer.name + ".weight_scale", old = layer.name + ".scale_weight";
    return !pool_.find(key) && pool_.find(old) ? old : key;
  }
  const weights::StoredTensor& take(const Layer& layer, const std::string& key) {
    keys_.push_back(key);
    return pool_.get(key, layer.name + std::string(kWeight));
  }

  Weight make_float8(const Layer& layer, const weights::StoredTensor& values) {
    const std::string key = scale_key(layer);
    Float8Weight::Options options{.dtype = values.dtype, .scheme = "ComfyUI fp8"};
    if (pool_.find(key)) options.scale_shape = take(layer, key).shape;
    return std::make_shared<Float8Weight>(values.shape, std::move(options));
  }

  Weight make_nvfp4(const Layer& layer, const weights::StoredTensor& values) {
    const weights::StoredTensor& scale = take(layer, layer.name + ".weight_scale");
    BlockScaledWeight::Options options{
        .high_nibble_first = true,
        .scale_dtype = scale.dtype,
        .swizzled = true,
        .scale_shape = scale.shape,
        .per_tensor_scale = take(layer, layer.name + ".weight_scale_2").shape,
        .scheme = "ComfyUI NVFP4"};
    return std::make_shared<BlockScaledWeight>(Extents{values.shape[0], values.shape[1] * 2},
                                               std::move(options));
  }

  Weight make_mxfp8(const Layer& layer, const weights::StoredTensor& values) {
    const weights::StoredTensor& scale = take(layer, layer.name + ".weight_scale");
    return std::make_shared<BlockScaledWeight>(
        values.shape, BlockScaledWeight::Options{.elements = values.dtype,
                                                 .block_size = 32,
                                                 .scale_format = io::Dtype::F8_E8M0,
                                                 .scale_dtype = scale.dtype,
                                                 .swizzled = true,
                                                 .scale_shape = scale.shape,
                                                 .scheme = "ComfyUI MXFP8"});
  }

  Weight make_int8(const Layer& layer, const weights::StoredTensor& values) {
    const std::string key = layer.name + ".weight_scale";
    Extents blocks = take(layer, key).shape;
    if (count_of(blocks) == 1) blocks = {1, 1};
    if (blocks.size() == 1) blocks.push_back(1);
    pool_.reshape(key, blocks);
    if (blocks.size() != 2 || blocks[0] < 1 || blocks[1] < 1 || values.shape[0] % blocks[0] != 0 ||
        values.shape[1] % blocks[1] != 0) {
      throw_error<ArgumentError>("its scales do not divide [{}, {}]", values.shape[0],
                                 values.shape[1]);
    }
    return std::make_shared<Int8Weight>(
        values.shape, Extents{values.shape[0] / blocks[0], values.shape[1] / blocks[1]},
        /*has_zero_point=*/false);
  }

  TensorPool& pool_;
  std::vector<std::string> keys_;
};

Layer layer_of(const std::string& name, const Json& description, const std::string& where) {
  auto format = description.is_object() ? description.find("format") : description.end();
  if (!description.is_object() || format == description.end() || !format->is_string()) {
    throw_error<FormatError>("{}: layer '{}': expected an object with \"format\", got {}", where,
                             name, description.dump());
  }
  return {name, format->get<std::string>(), description};
}

// `name` with the prefix under which its weight is stored, if any.
std::string with_prefix(const TensorPool& pool, const std::string& name) {
  for (const char* prefix : {"", "model.diffusion_model.", "diffusion_model.", "model."}) {
    std::string candidate = prefix + name;
    if (pool.find(candidate + std::string(kWeight))) return candidate;
  }
  return name;
}

// By name, so that a layer that is described twice is read by the description that comes first.
std::map<std::string, Layer> find_layers(const std::map<std::string, std::string>& metadata,
                                         const StoredWeights& weights, const TensorPool& pool,
                                         const ReadText& read_text) {
  std::map<std::string, Layer> layers;
  if (auto entry = metadata.find("_quantization_metadata"); entry != metadata.end()) {
    const std::string where = pool.where("") + ": metadata \"_quantization_metadata\"";
    const Json json = io::parse_json(entry->second, where);
    auto described = json.is_object() ? json.find("layers") : json.end();
    if (!json.is_object() || described == json.end() || !described->is_object())
      throw_error<FormatError>("{}: expected an object with \"layers\"", where);
    for (const auto& [name, description] : described->items()) {
      Layer layer = layer_of(with_prefix(pool, name), description, where);
      layers.emplace(layer.name, std::move(layer));
    }
  }
  for (const weights::StoredTensor& tensor : weights.plain) {
    const std::string& key = tensor.key;
    if (key.ends_with(kDescription)) {
      const std::string name = key.substr(0, key.size() - kDescription.size());
      const std::string where = fmt::format("{}: '{}'", pool.where(key), key);
      if (tensor.dtype != io::Dtype::U8 || tensor.plain_bytes() > kMaxDescriptionBytes)
        throw_error<FormatError>("{}: expected at most {} bytes of JSON", where,
                                 kMaxDescriptionBytes);
      layers.emplace(name, layer_of(name, io::parse_json(read_text(tensor), where), where));
    }
  }
  for (const weights::StoredTensor& tensor : weights.plain) {
    if (!tensor.key.ends_with(kWeight) || tensor.shape.size() != 2 || !is_float8(tensor.dtype))
      continue;
    const std::string name = tensor.key.substr(0, tensor.key.size() - kWeight.size());
    layers.emplace(name, Layer{name, "float8_e4m3fn", Json::object()});
  }
  return layers;
}

}  // namespace

bool read_comfy(const std::map<std::string, std::string>& metadata, StoredWeights& weights,
                const ReadText& read_text) {
  TensorPool pool(weights);
  const std::map<std::string, Layer> layers = find_layers(metadata, weights, pool, read_text);
  if (layers.empty()) return false;
  Reader reader(pool);
  for (const auto& [name, layer] : layers) reader.join(layer);
  for (const weights::StoredTensor& tensor : weights.plain) {
    if (tensor.key == kMarker || tensor.key.ends_with("." + std::string(kMarker)))
      pool.drop(tensor.key);
  }
  pool.commit();
  return true;
}

bool read_comfy_checkpoint(const weights::Checkpoint& checkpoint, const nlohmann::ordered_json&,
                           StoredWeights& weights) {
  return read_comfy(checkpoint.metadata(), weights, read_bytes);
}

}  // namespace ferry::quant
