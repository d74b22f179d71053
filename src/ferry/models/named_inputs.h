// Checks the arguments of Model::forward_named().
#pragma once

#include <fmt/ranges.h>

#include <set>
#include <string>
#include <vector>

#include "ferry/base/error.h"
#include "ferry/models/model.h"

namespace ferry::models {

// Asks for every argument by name, then finish() refuses what nobody asked for.
class NamedInputs {
 public:
  NamedInputs(std::string where, const NamedTensors& tensors, const nlohmann::json& arguments)
      : where_(std::move(where)), tensors_(tensors), arguments_(arguments) {}

  // Throws ArgumentError in finish() if it is missing (so that all names are known by then).
  at::Tensor required(const std::string& name) {
    at::Tensor tensor = optional(name);
    if (!tensor.defined()) missing_.push_back(name);
    return tensor;
  }
  // Undefined if it is missing.
  at::Tensor optional(const std::string& name) {
    known_.insert(name);
    auto it = tensors_.find(name);
    return it == tensors_.end() ? at::Tensor() : it->second;
  }
  // The tensors `name`.0, `name`.1, …
  std::vector<at::Tensor> list(const std::string& name) {
    std::vector<at::Tensor> found;
    while (true) {
      std::string item = fmt::format("{}.{}", name, found.size());
      if (!tensors_.contains(item)) break;
      found.push_back(optional(item));
    }
    known_.insert(name + ".0");
    return found;
  }
  // Null counts as missing. Throws ArgumentError for another type.
  template <class T>
  T argument(const std::string& name, T missing) {
    known_.insert(name);
    if (!arguments_.is_object()) return missing;
    auto it = arguments_.find(name);
    if (it == arguments_.end() || it->is_null()) return missing;
    try {
      return it->get<T>();
    } catch (const nlohmann::json::exception& error) {
      throw_error<ArgumentError>("{}: argument '{}' is {}: {}", where_, name, it->dump(),
                                 error.what());
    }
  }

  void finish() const {
    std::vector<std::string> unknown;
    for (const auto& [name, tensor] : tensors_) {
      if (!known_.contains(name)) unknown.push_back(name);
    }
    if (arguments_.is_object()) {
      for (const auto& [name, value] : arguments_.items()) {
        if (!known_.contains(name)) unknown.push_back(name);
      }
    }
    if (missing_.empty() && unknown.empty()) return;
    throw_error<ArgumentError>("{}: missing inputs [{}], unknown inputs [{}]; known are {}", where_,
                               fmt::join(missing_, ", "), fmt::join(unknown, ", "),
                               fmt::join(known_, ", "));
  }

 private:
  std::string where_;
  const NamedTensors& tensors_;
  const nlohmann::json& arguments_;
  std::set<std::string> known_;
  std::vector<std::string> missing_;
};

}  // namespace ferry::models
