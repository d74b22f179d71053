#include "module.h"

namespace ferry::python {

void add_generate(py::module_& module) {}

}  // namespace ferry::python
