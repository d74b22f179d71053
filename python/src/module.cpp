#include "module.h"

#include <cstdlib>

#include "ferry/base/log.h"

PYBIND11_MODULE(_C, module) {
  module.attr("__version__") = FERRY_VERSION;
  module.attr("torch_version") = FERRY_TORCH_VERSION;
  // As the command line: what a program did not ask for is said only if it is a warning.
  if (std::getenv("FERRY_LOG") == nullptr) ferry::log::set_level(ferry::log::Level::warn);
  ferry::python::add_errors(module);  // first, so that the others' errors have classes
  module.def(
      "set_log_level",
      [](const std::string& level) { ferry::log::set_level(ferry::log::parse_level(level)); },
      pybind11::arg("level"),
      "What is logged to standard error: \"trace\", \"debug\", \"info\", \"warn\" (the default, "
      "unless FERRY_LOG says otherwise), \"error\" or \"off\".");
  ferry::python::add_checkpoint(module);
  ferry::python::add_engine(module);
  ferry::python::add_generate(module);
  ferry::python::add_models(module);
  ferry::python::add_command_line(module);
}
