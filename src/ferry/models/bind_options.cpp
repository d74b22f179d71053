#include "ferry/models/bind_options.h"

#include <algorithm>

namespace ferry::models {

bool has_part(const std::string& name, const std::vector<std::string>& parts) {
  size_t begin = 0;
  while (begin <= name.size()) {
    size_t end = std::min(name.find('.', begin), name.size());
    if (std::find(parts.begin(), parts.end(), name.substr(begin, end - begin)) != parts.end())
      return true;
    begin = end + 1;
  }
  return false;
}

namespace {

// diffusers keeps them in float32 for every dtype, transformers for float16 only.
bool stays_float32(const Model& model, const Traits& traits, const std::string& slot,
                   at::ScalarType wanted) {
  if (model.library() == "transformers" && wanted != at::kHalf) return false;
  return has_part(slot, traits.keep_in_fp32_modules);
}

}  // namespace

weights::BindOptions bind_options(const Model& model, std::optional<at::ScalarType> dtype) {
  auto traits = std::make_shared<Traits>(model.traits());
  weights::BindOptions options;
  options.map_key = [&model](const std::string& key) { return model.map_key(key); };
  if (dtype) {
    options.dtype = [&model, traits, wanted = *dtype](const std::string& slot,
                                                      at::ScalarType stored) {
      if (!at::isFloatingType(stored)) return stored;
      return stays_float32(model, *traits, slot, wanted) ? at::kFloat : wanted;
    };
  }
  options.may_be_missing = [traits](const std::string& slot) {
    return traits->tied_keys.contains(slot);
  };
  return options;
}

}  // namespace ferry::models
