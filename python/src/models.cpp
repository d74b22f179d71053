#include "module.h"

namespace ferry::python {

void add_models(py::module_& module) {}

}  // namespace ferry::python
