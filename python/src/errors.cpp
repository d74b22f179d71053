// C++ exceptions as Python's. The classes live as long as the process: the translator is asked
// until the interpreter ends.
#include <c10/util/Exception.h>

#include <array>
#include <new>

#include "ferry/base/error.h"
#include "module.h"

namespace ferry::python {
namespace {

struct Classes {
  PyObject *error, *argument, *format, *io, *device, *budget, *cancelled;
};
Classes classes;

PyObject* new_class(py::module_& module, const char* name, const char* doc, PyObject* bases) {
  const std::string full = std::string("ferry.") + name;
  PyObject* made = PyErr_NewExceptionWithDoc(full.c_str(), doc, bases, nullptr);
  if (made == nullptr) throw py::error_already_set();
  module.attr(name) = py::reinterpret_borrow<py::object>(made);
  return made;
}

// The narrowest first: all are caught as ferry::Error, too.
void translate(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const ArgumentError& error) {
    PyErr_SetString(classes.argument, error.what());
  } catch (const FormatError& error) {
    PyErr_SetString(classes.format, error.what());
  } catch (const IoError& error) {
    PyErr_SetString(classes.io, error.what());
  } catch (const DeviceError& error) {
    PyErr_SetString(classes.device, error.what());
  } catch (const BudgetError& error) {
    PyErr_SetString(classes.budget, error.what());
  } catch (const Cancelled& error) {
    PyErr_SetString(classes.cancelled, error.what());
  } catch (const Error& error) {
    PyErr_SetString(classes.error, error.what());
  } catch (const c10::OutOfMemoryError& error) {
    const py::object out_of_memory = py::module_::import("torch").attr("OutOfMemoryError");
    PyErr_SetString(out_of_memory.ptr(), error.what_without_backtrace());
  } catch (const c10::Error& error) {  // what() would add the stack
    PyErr_SetString(PyExc_RuntimeError, error.what_without_backtrace());
  }
}

}  // namespace

void add_errors(py::module_& module) {
  classes.error =
      new_class(module, "Error", "What ferry raises; the classes below it say what kind it is.",
                PyExc_RuntimeError);
  const py::tuple argument_bases =
      py::make_tuple(py::handle(classes.error), py::handle(PyExc_ValueError));
  classes.argument = new_class(
      module, "ArgumentError",
      "The caller passed something that cannot work: an unknown option, a shape that does not fit.",
      argument_bases.ptr());
  classes.format =
      new_class(module, "FormatError",
                "Bytes from outside do not follow their format: a header that lies, broken JSON.",
                classes.error);
  classes.io = new_class(
      module, "IoError",
      "The operating system refused or failed: a missing file, a short read, a full disk.",
      classes.error);
  classes.device =
      new_class(module, "DeviceError", "The accelerator or its memory failed.", classes.error);
  classes.budget = new_class(
      module, "BudgetError",
      "A budget that cannot be kept; the message states the smallest one that can.", classes.error);
  classes.cancelled = new_class(module, "Cancelled",
                                "The work was stopped on request. Not a failure.", classes.error);
  py::register_local_exception_translator(translate);
}

}  // namespace ferry::python
