// The extension's parts; each adds its classes to the module. Every call that may wait releases the
// GIL.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace ferry::python {

namespace py = pybind11;
using NoGil = py::call_guard<py::gil_scoped_release>;

void add_errors(py::module_& module);        // ferry::Error and those below it as exceptions
void add_checkpoint(py::module_& module);    // files and what they hold
void add_engine(py::module_& module);        // engine, clients, leases, trace
void add_generate(py::module_& module);      // the facade's pipeline
void add_models(py::module_& module);        // models by folder
void add_command_line(py::module_& module);  // `python -m ferry`

}  // namespace ferry::python
