// ferry_fake._fake: the fake accelerator's controls for Python. Every call that may wait releases
// the GIL.
#include <torch/csrc/utils/pybind.h>

#include "ferry/testing/fake_accelerator.h"

namespace {

namespace py = pybind11;
using ferry::testing::FakeAccelerator;
using ferry::testing::FakeAcceleratorOptions;

// Calls visit(name, member) for each option.
template <typename Visit>
void each_option(FakeAcceleratorOptions& options, Visit visit) {
  visit("capacity_bytes", options.capacity_bytes);
  visit("pinned_capacity_bytes", options.pinned_capacity_bytes);
  visit("quarantine_bytes", options.quarantine_bytes);
  visit("host_to_device_bytes_per_second", options.host_to_device_bytes_per_second);
  visit("device_to_host_bytes_per_second", options.device_to_host_bytes_per_second);
  visit("copy_delay_ms", options.copy_delay_ms);
  visit("op_delay_ms", options.op_delay_ms);
  visit("random_delay_ms", options.random_delay_ms);
  visit("seed", options.seed);
  visit("asynchronous_compute", options.asynchronous_compute);
  visit("record_log", options.record_log);
}

// What is not named keeps its default.
FakeAcceleratorOptions options_from(const py::kwargs& named) {
  FakeAcceleratorOptions options;
  size_t known = 0;
  each_option(options, [&](const char* name, auto& member) {
    if (!named.contains(name)) return;
    member = named[name].template cast<std::decay_t<decltype(member)>>();
    ++known;
  });
  if (known == named.size()) return options;
  for (const auto& [key, value] : named) {
    const std::string name = key.cast<std::string>();
    bool found = false;
    each_option(options, [&](const char* option, auto&) { found = found || name == option; });
    if (!found) throw py::type_error("the fake accelerator has no option '" + name + "'");
  }
  return options;
}

py::dict options_dict() {
  FakeAcceleratorOptions options = FakeAccelerator::options();
  py::dict named;
  each_option(options, [&](const char* name, auto& member) { named[name] = member; });
  return named;
}

py::dict counters_dict() {
  const auto counters = FakeAccelerator::counters();
  py::dict named;
  named["host_to_device_copies"] = counters.host_to_device_copies;
  named["host_to_device_bytes"] = counters.host_to_device_bytes;
  named["device_to_host_copies"] = counters.device_to_host_copies;
  named["device_to_host_bytes"] = counters.device_to_host_bytes;
  named["operations"] = counters.operations;
  named["host_synchronizations"] = counters.host_synchronizations;
  return named;
}

// [(stream_id, name, bytes, begin_ms, end_ms)]
py::list log_list() {
  py::list entries;
  for (const auto& entry : FakeAccelerator::log())
    entries.append(
        py::make_tuple(entry.stream_id, entry.name, entry.bytes, entry.begin_ms, entry.end_ms));
  return entries;
}

}  // namespace

PYBIND11_MODULE(_fake, module) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  module.def("install", [](const py::kwargs& named) {
    const FakeAcceleratorOptions options = options_from(named);
    py::gil_scoped_release no_gil;
    FakeAccelerator::install(options);
  });
  module.def("set_options", [](const py::kwargs& named) {
    const FakeAcceleratorOptions options = options_from(named);
    py::gil_scoped_release no_gil;
    FakeAccelerator::set_options(options);
  });
  module.def("options", &options_dict);
  module.def("counters", &counters_dict);
  module.def("reset_counters", &FakeAccelerator::reset_counters);
  module.def("log", &log_list);
  module.def("clear_log", &FakeAccelerator::clear_log);
  module.def("live_bytes", &FakeAccelerator::live_bytes);
  module.def("peak_bytes", &FakeAccelerator::peak_bytes);
  module.def("reset_peak", &FakeAccelerator::reset_peak);
  module.def("pinned_bytes", &FakeAccelerator::pinned_bytes);
  module.def("drain", &FakeAccelerator::drain, NoGil());
}
