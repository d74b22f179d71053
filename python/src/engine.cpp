#include "module.h"

namespace ferry::python {

void add_engine(py::module_& module) {}

}  // namespace ferry::python
