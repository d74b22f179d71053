#include "module.h"

namespace ferry::python {

void add_checkpoint(py::module_& module) {}

}  // namespace ferry::python
