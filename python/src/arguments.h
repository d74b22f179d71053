// What people pass in Python for what C++ takes as text. All need the GIL.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "ferry/base/error.h"
#include "ferry/base/units.h"
#include "module.h"

namespace ferry::python {

// str, or anything whose str() is meant: a torch.dtype ("torch.bfloat16"), a torch.device
// ("cuda:0"), a path. None is "".
inline std::string text_of(const py::object& value) {
  return value.is_none() ? std::string() : py::cast<std::string>(py::str(value));
}

// A path: str or os.PathLike. None is "".
inline std::string path_of(const py::object& value) {
  if (value.is_none()) return {};
  return py::cast<std::string>(py::module_::import("os").attr("fspath")(value));
}

// "bf16", torch.bfloat16, or {"transformer": torch.bfloat16, "vae": "fp32"} as
// "transformer=torch.bfloat16,vae=fp32".
inline std::string by_component(const py::object& value) {
  if (!py::isinstance<py::dict>(value)) return text_of(value);
  std::string text;
  for (const auto& [name, item] : value.cast<py::dict>()) {
    text += (text.empty() ? "" : ",") + py::cast<std::string>(py::str(name)) + "=" +
            py::cast<std::string>(py::str(item));
  }
  return text;
}

// An int, or text for parse_bytes() ("6GiB"). None is nothing. Throws ArgumentError.
inline std::optional<uint64_t> bytes_of(const py::object& value, const char* what) {
  if (value.is_none()) return std::nullopt;
  if (!py::isinstance<py::str>(value) && !PyIndex_Check(value.ptr())) {
    throw_error<ArgumentError>("{}: expected bytes as int, or text such as \"6GiB\", got {}", what,
                               py::cast<std::string>(py::repr(value)));
  }
  return parse_bytes(text_of(value), what);
}

}  // namespace ferry::python
