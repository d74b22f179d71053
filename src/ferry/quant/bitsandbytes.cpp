#include "ferry/quant/bitsandbytes.h"

#include <nlohmann/json.hpp>

#include "ferry/base/error.h"
#include "ferry/io/json_file.h"
#include "ferry/quant/bitsandbytes_4bit.h"
#include "ferry/quant/bitsandbytes_int8.h"

namespace ferry::quant {

namespace {

using Json = nlohmann::json;

constexpr std::string_view kState = ".quant_state.bitsandbytes__";
constexpr std::string_view kScale = ".SCB";
constexpr uint64_t kMaxStateBytes = 1 << 16;

int64_t number(const Json& state, const char* name, const std::string& where) {
  auto found = state.find(name);
  if (found == state.end() || !found->is_number_integer())
    throw_error<FormatError>("{}: \"{}\" is no whole number", where, name);
  return found->get<int64_t>();
}

std::vector<int64_t> shape_of(const Json& state, const std::string& where) {
  auto found = state.find("shape");
  std::vector<int64_t> shape;
  if (found == state.end() || !found->is_array())
    throw_error<FormatError>("{}: \"shape\" is missing", where);
  for (const Json& extent : *found) {
    if (!extent.is_number_integer())
      throw_error<FormatError>("{}: \"shape\" is {}", where, found->dump());
    shape.push_back(extent.get<int64_t>());
  }
  return shape;
}

void join_4bit(TensorPool& pool, const std::string& key, const ReadText& read_text) {
  const size_t split = key.find(kState);
  const std::string parameter = key.substr(0, split);
  const weights::StoredTensor& state_tensor = pool.get(key, parameter);
  const std::string where = fmt::format("{}: '{}'", pool.where(key), key);
  if (state_tensor.dtype != io::Dtype::U8 || state_tensor.plain_bytes() > kMaxStateBytes)
    throw_error<FormatError>("{}: expected at most {} bytes of JSON", where, kMaxStateBytes);
  const Json state = io::parse_json(read_text(state_tensor), where);
  if (!state.is_object()) throw_error<FormatError>("{}: expected an object", where);

  const weights::StoredTensor& qdata = pool.get(parameter, parameter);
  std::vector<int64_t> shape = shape_of(state, where);
  check_matrix(shape, pool.where(key), parameter);
  BitsAndBytes4bitWeight::Options options{.quant_type = key.substr(split + kState.size()),
                                          .block_size = number(state, "blocksize", where),
                                          .storage = qdata.dtype,
                                          .qdata_shape = qdata.shape};
  std::vector<std::string> keys{parameter, parameter + ".absmax", parameter + ".quant_map"};
  if (pool.find(parameter + ".nested_absmax")) {
    auto offset = state.find("nested_offset");
    if (offset == state.end() || !offset->is_number())
      throw_error<FormatError>("{}: \"nested_offset\" is no number", where);
    options.nested = {.block_size = number(state, "nested_blocksize", where),
                      .offset = offset->get<float>()};
    keys.push_back(parameter + ".nested_absmax");
    keys.push_back(parameter + ".nested_quant_map");
  }
  auto weight = make_weight(pool.where(key), parameter, [&] {
    return std::make_shared<BitsAndBytes4bitWeight>(shape, std::move(options));
  });
  pool.join(parameter, weight, keys);
  pool.drop(key);
}

void join_int8(TensorPool& pool, const std::string& key, const ReadText& read_text) {
  const std::string layer = key.substr(0, key.size() - kScale.size());
  const std::string parameter = layer + ".weight", format_key = layer + ".weight_format";
  const weights::StoredTensor& qdata = pool.get(parameter, parameter);
  if (const weights::StoredTensor* format = pool.find(format_key)) {
    const std::string value = format->plain_bytes() == 1 ? read_text(*format) : "";
    if (value != std::string(1, '\0')) {
      throw_error<FormatError>(
          "{}: '{}' says that the weight is not stored by rows, which alone ferry reads; save the "
          "model anew with bitsandbytes 0.43 or newer",
          pool.where(format_key), format_key);
    }
  }
  check_matrix(qdata.shape, pool.where(key), parameter);
  pool.join(parameter, std::make_shared<BitsAndBytesInt8Weight>(qdata.shape), {parameter, key});
  pool.drop(format_key);
}

}  // namespace

bool read_bitsandbytes(StoredWeights& weights, const ReadText& read_text) {
  std::vector<std::string> states, scales;
  for (const weights::StoredTensor& tensor : weights.plain) {
    if (tensor.key.find(kState) != std::string::npos) states.push_back(tensor.key);
    if (tensor.key.ends_with(kScale)) scales.push_back(tensor.key);
  }
  if (states.empty() && scales.empty()) return false;
  TensorPool pool(weights);
  for (const std::string& key : states) join_4bit(pool, key, read_text);
  for (const std::string& key : scales) join_int8(pool, key, read_text);
  pool.commit();
  return true;
}

bool read_bitsandbytes_checkpoint(const weights::Checkpoint&, const nlohmann::ordered_json&,
                                  StoredWeights& weights) {
  return read_bitsandbytes(weights, read_bytes);
}

}  // namespace ferry::quant
