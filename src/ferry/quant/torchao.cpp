#include "ferry/quant/torchao.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "ferry/base/error.h"
#include "ferry/io/json_file.h"
#include "ferry/quant/block_scaled.h"
#include "ferry/quant/float8.h"
#include "ferry/quant/pre_scaled.h"
#include "ferry/quant/tensor_pool.h"
#include "ferry/quant/torchao_int4.h"
#include "ferry/quant/torchao_int4_tile_packed.h"
#include "ferry/quant/torchao_int8.h"
#include "ferry/quant/torchao_intx.h"

namespace ferry::quant {

namespace {

using Json = nlohmann::json;
using Weight = std::shared_ptr<const QuantizedWeight>;
using Extents = std::vector<int64_t>;

// A member of an object, or null.
const Json* member(const Json& json, const char* name) {
  auto found = json.is_object() ? json.find(name) : json.end();
  return found == json.end() || found->is_null() ? nullptr : &*found;
}

// The "_data" of {"_type": ..., "_data": "bfloat16"}: a torch.dtype or an enum; else the string.
std::string word(const Json* json) {
  if (json && json->is_object()) json = member(*json, "_data");
  return json && json->is_string() ? json->get<std::string>() : "";
}

std::string type_of(const Json* json) {
  const Json* type = json ? member(*json, "_type") : nullptr;
  return type && type->is_string() ? type->get<std::string>() : "";
}

// One quantized parameter: its attributes, and the tensors it has.
class Entry {
 public:
  Entry(const TensorPool& pool, std::string name, const Json& json)
      : pool_(pool), name_(std::move(name)), data_(member(json, "_data")) {
    size_t dot = name_.rfind('.');
    prefix_ = dot == std::string::npos
                  ? "_" + name_ + "_"
                  : name_.substr(0, dot + 1) + "_" + name_.substr(dot + 1) + "_";
    const Json* names = member(json, "_tensor_data_names");
    if (!data_ || !data_->is_object() || !names || !names->is_array()) {
      fail("its metadata lacks \"_data\" or \"_tensor_data_names\"");
    }
    for (const Json& component : *names) {
      if (!component.is_string()) fail("\"_tensor_data_names\" holds {}", component.dump());
      present_.push_back(component.get<std::string>());
    }
  }

  const std::string& name() const { return name_; }
  std::string key(const std::string& component) const { return prefix_ + component; }
  const std::vector<std::string>& present() const { return present_; }
  bool has(const std::string& component) const {
    return std::find(present_.begin(), present_.end(), component) != present_.end();
  }
  const weights::StoredTensor& tensor(const std::string& component) const {
    return pool_.get(key(component), name_);
  }
  std::string where() const { return pool_.where(key("qdata")); }

  const Json* attribute(const char* name) const { return member(*data_, name); }
  bool flag(const char* name) const {
    const Json* value = attribute(name);
    if (value && !value->is_boolean())
      fail("\"{}\" is {}, expected true or false", name, value->dump());
    return value && value->get<bool>();
  }
  int64_t number(const char* name, int64_t otherwise) const {
    const Json* value = attribute(name);
    if (!value) return otherwise;
    if (!value->is_number_integer()) fail("\"{}\" is {}, expected a number", name, value->dump());
    return value->get<int64_t>();
  }
  // Nothing where the attribute is not there.
  std::optional<Extents> extents(const char* name) const {
    const Json* value = attribute(name);
    if (!value) return std::nullopt;
    Extents extents;
    if (!value->is_array()) fail("\"{}\" is {}, expected numbers", name, value->dump());
    for (const Json& extent : *value) {
      if (!extent.is_number_integer() || extent.get<int64_t>() < 1) {
        fail("\"{}\" is {}, expected positive numbers", name, value->dump());
      }
      extents.push_back(extent.get<int64_t>());
    }
    return extents;
  }
  // Of a class that has to have it, one a dimension.
  Extents block_size() const {
    std::optional<Extents> block = extents("block_size");
    if (!block || block->size() != 2) fail("\"block_size\" is missing or not of two numbers");
    return *block;
  }
  // The shape of a matrix whose values are stored `per_element` to an element of "qdata".
  Extents matrix(int64_t per_element = 1) const {
    Extents shape = tensor("qdata").shape;
    check_matrix(shape, where(), name_);
    shape[1] *= per_element;
    return shape;
  }

  template <class... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) const {
    throw_error<FormatError>("{}: quantized parameter '{}': {}", where(), name_,
                             fmt::format(format, std::forward<Args>(args)...));
  }

 private:
  const TensorPool& pool_;
  std::string name_;
  const Json* data_;
  std::string prefix_;
  std::vector<std::string> present_;
};

// --- one function a class ---

Activation float8_activation(const Json* kwargs) {
  const Json* data = kwargs ? member(*kwargs, "_data") : nullptr;
  std::string granularity = type_of(data ? member(*data, "granularity") : nullptr);
  if (granularity == "PerRow") return Activation::float8_per_token;
  if (granularity == "PerTensor") return Activation::float8_per_tensor;
  return Activation::as_is;
}

Weight make_float8(const Entry& entry) {
  Extents shape = entry.matrix(), scale = entry.tensor("scale").shape;
  // The reference goes by the scale's shape; the block size must not say otherwise.
  if (std::optional<Extents> block = entry.extents("block_size"); block && scale.size() == 2) {
    if (block->size() != 2 || shape[0] / (*block)[0] != scale[0] ||
        shape[1] / (*block)[1] != scale[1]) {
      entry.fail("\"block_size\" does not make scales of [{}, {}] of a weight of [{}, {}]",
                 scale[0], scale[1], shape[0], shape[1]);
    }
  }
  return std::make_shared<Float8Weight>(
      shape,
      Float8Weight::Options{.dtype = entry.tensor("qdata").dtype,
                            .scale_shape = scale,
                            .activation = float8_activation(entry.attribute("act_quant_kwargs"))});
}

Weight make_int8(const Entry& entry) {
  Extents shape = entry.matrix(), block = entry.block_size();
  bool dynamic = entry.attribute("act_quant_kwargs") && block[1] == shape[1];
  return std::make_shared<Int8Weight>(shape, block, entry.has("zero_point"),
                                      entry.tensor("scale").dtype,
                                      dynamic ? Activation::int8_per_token : Activation::as_is);
}

// "shape", which packed classes need not have stored values for in full.
void check_shape(const Entry& entry, const Extents& expected) {
  std::optional<Extents> shape = entry.extents("shape");
  if (shape && *shape != expected) {
    entry.fail("\"shape\" is {}, but its values make [{}, {}]", entry.attribute("shape")->dump(),
               expected[0], expected[1]);
  }
}

Weight make_int4(const Entry& entry) {
  Extents shape = entry.matrix(2), block = entry.block_size();
  check_shape(entry, shape);
  if (block[0] != 1) entry.fail("blocks of {} rows, expected groups of one row", block[0]);
  bool float8 = word(entry.attribute("activation_dtype")) == "float8_e4m3fn";
  return std::make_shared<Int4Weight>(shape, block[1], entry.tensor("scale").dtype,
                                      float8 ? Activation::float8_per_token : Activation::as_is);
}

Weight make_int4_tile_packed(const Entry& entry) {
  std::optional<Extents> shape = entry.extents("shape");
  if (!shape) entry.fail("\"shape\" is missing");
  check_matrix(*shape, entry.where(), entry.name());
  Extents block = entry.block_size();
  if (block[0] != 1) entry.fail("blocks of {} rows, expected groups of one row", block[0]);
  return std::make_shared<Int4TilePackedWeight>(*shape, block[1]);
}

Weight make_intx(const Entry& entry) {
  return std::make_shared<IntxWeight>(entry.matrix(), entry.block_size(),
                                      entry.tensor("scale").dtype,
                                      entry.tensor("zero_point").dtype);
}

Weight make_nvfp4(const Entry& entry) {
  BlockScaledWeight::Options options{.block_size = entry.number("block_size", 16),
                                     .scale_dtype = entry.tensor("scale").dtype,
                                     .swizzled = entry.flag("is_swizzled_scales"),
                                     .scale_shape = entry.tensor("scale").shape};
  if (entry.has("per_tensor_scale"))
    options.per_tensor_scale = entry.tensor("per_tensor_scale").shape;
  return std::make_shared<BlockScaledWeight>(entry.matrix(2), std::move(options));
}

Weight make_mx(const Entry& entry) {
  std::string elements = word(entry.attribute("elem_dtype"));
  BlockScaledWeight::Options options{.block_size = entry.number("block_size", 32),
                                     .scale_format = io::Dtype::F8_E8M0,
                                     .scale_dtype = entry.tensor("scale").dtype,
                                     .swizzled = entry.flag("is_swizzled_scales"),
                                     .scale_shape = entry.tensor("scale").shape};
  if (elements == "float8_e4m3fn") {
    options.elements = io::Dtype::F8_E4M3;
    options.scheme = "TorchAO MXFP8";
  } else if (elements == "float8_e5m2") {
    options.elements = io::Dtype::F8_E5M2;
    options.scheme = "TorchAO MXFP8";
  } else if (elements == "float4_e2m1fn_x2") {
    options.scheme = "TorchAO MXFP4";
  } else {
    entry.fail("elements of \"{}\", expected float8_e4m3fn, float8_e5m2 or float4_e2m1fn_x2",
               elements);
  }
  int64_t per_element = options.elements == io::Dtype::U8 ? 2 : 1;
  return std::make_shared<BlockScaledWeight>(entry.matrix(per_element), std::move(options));
}

struct Class {
  std::string_view name;
  std::vector<std::string> components;  // in the order of the weight's; optional ones too
  std::vector<std::string> ignored;     // for the input only, in ways that ferry computes without
  Weight (*make)(const Entry&);
};

const std::vector<Class>& classes() {
  static const std::vector<Class> all = {
      {"Float8Tensor", {"qdata", "scale"}, {}, make_float8},
      {"Int8Tensor", {"qdata", "scale", "zero_point"}, {}, make_int8},
      {"Int4Tensor", {"qdata", "scale", "zero_point"}, {}, make_int4},
      {"Int4TilePackedTo4dTensor", {"qdata", "scale_and_zero"}, {}, make_int4_tile_packed},
      {"IntxUnpackedToInt8Tensor", {"qdata", "scale", "zero_point"}, {}, make_intx},
      {"NVFP4Tensor", {"qdata", "scale", "per_tensor_scale"}, {"act_per_tensor_scale"}, make_nvfp4},
      {"MXTensor", {"qdata", "scale"}, {}, make_mx},
  };
  return all;
}

const Class& class_of(const std::string& type, const std::string& where, const std::string& name) {
  std::string known;
  for (const Class& entry : classes()) {
    if (entry.name == type) return entry;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", entry.name);
  }
  throw_error<FormatError>(
      "{}: parameter '{}' is a \"{}\" of torchao, which ferry does not read; it reads {}. Quantize "
      "the model anew in one of these",
      where, name, type, known);
}

void join(TensorPool& pool, const std::string& name, const std::string& type, const Json& json) {
  Entry entry(pool, name, json);
  const Class& description = class_of(type, entry.where(), name);
  std::vector<std::string> keys, unread = entry.present();
  auto take = [&](const std::string& component) {
    std::erase(unread, component);
    keys.push_back(entry.key(component));
  };
  for (const std::string& component : description.components) {
    if (entry.has(component)) take(component);
  }
  const bool pre_scaled = entry.has("act_pre_scale");
  if (pre_scaled) take("act_pre_scale");
  for (const std::string& component : description.ignored) {
    std::erase(unread, component);
    pool.drop(entry.key(component));
  }
  if (!unread.empty()) {
    entry.fail(
        "{} with the component \"{}\" is not read by ferry: inputs that are quantized by stored "
        "scales are not supported; quantize with dynamic activations, or weight-only",
        type, unread.front());
  }
  Weight weight = make_weight(entry.where(), name, [&]() -> Weight {
    Weight made = description.make(entry);
    if (!pre_scaled) return made;
    const weights::StoredTensor& scale = entry.tensor("act_pre_scale");
    return std::make_shared<PreScaledWeight>(made, scale.dtype, scale.shape);
  });
  if (weight->components().size() != keys.size()) {
    entry.fail("{} of {} components, expected {}", type, keys.size(), weight->components().size());
  }
  pool.join(name, std::move(weight), keys);
}

}  // namespace

bool read_torchao(const std::map<std::string, std::string>& metadata, StoredWeights& weights) {
  auto list = metadata.find("tensor_names");
  if (list == metadata.end() || !list->second.starts_with('[')) return false;
  TensorPool pool(weights);
  const std::string where = pool.where("");
  const Json names = io::parse_json(list->second, where + ": metadata \"tensor_names\"");
  if (!names.is_array() || names.empty()) return false;
  for (const Json& name : names) {
    if (!name.is_string() || !metadata.contains(name.get<std::string>())) {
      throw_error<FormatError>("{}: \"tensor_names\" lists {}, of which the metadata says nothing",
                               where, name.dump());
    }
  }
  for (const auto& [name, text] : metadata) {
    if (!text.starts_with('{')) continue;  // "format": "pt"
    const Json entry = io::parse_json(text, fmt::format("{}: metadata of '{}'", where, name));
    std::string type = type_of(&entry);
    if (type.empty() || type == "Tensor") continue;  // plain, or not of torchao
    join(pool, name, type, entry);
  }
  pool.commit();
  return true;
}

bool read_torchao_checkpoint(const weights::Checkpoint& checkpoint, const nlohmann::ordered_json&,
                             StoredWeights& weights) {
  return read_torchao(checkpoint.metadata(), weights);
}

}  // namespace ferry::quant
