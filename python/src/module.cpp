#include "module.h"

PYBIND11_MODULE(_C, module) {
  module.attr("__version__") = FERRY_VERSION;
  module.attr("torch_version") = FERRY_TORCH_VERSION;
  ferry::python::add_checkpoint(module);
  ferry::python::add_engine(module);
  ferry::python::add_generate(module);
  ferry::python::add_models(module);
}
