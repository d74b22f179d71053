#include <ATen/ATen.h>
#include <pybind11/stl.h>

#include "ferry/base/error.h"
#include "ferry/base/system_info.h"
#include "module.h"
#include "offload_client.h"

namespace ferry::python {

namespace {

io::ReadBackend backend_named(const std::string& name) {
  if (name == "auto") return io::ReadBackend::automatic;
  if (name == "io_uring") return io::ReadBackend::io_uring;
  if (name == "pread") return io::ReadBackend::pread;
  throw_error<ArgumentError>("io: got '{}', expected auto, io_uring or pread", name);
}

std::shared_ptr<OwnedEngine> make_engine(at::Device device, uint64_t weights_memory,
                                         uint64_t host_memory, bool all_move, bool read_ahead,
                                         bool replan, const std::string& io, uint64_t io_limit,
                                         std::shared_ptr<Trace> trace) {
  offload::EngineOptions options;
  options.device = device;
  options.weights_memory_bytes = weights_memory;
  options.host_memory_bytes = host_memory;
  if (all_move) options.small_slot_bytes = 0;
  options.read_ahead = read_ahead;
  options.replan = replan;
  options.read.backend = backend_named(io);
  options.read.rate_limit_bytes_per_s = io_limit;
  options.trace = trace.get();
  auto owned = std::make_shared<OwnedEngine>();
  owned->trace = std::move(trace);
  owned->engine = std::make_shared<offload::Engine>(options);
  return owned;
}

py::dict report_of(const OwnedEngine& owned) {
  offload::Report report;
  std::string reason;
  {
    py::gil_scoped_release no_gil;
    report = owned.engine->report();
    reason = owned.engine->read_engine().reason();
  }
  py::dict d;
#define FERRY_FIELD(name) d[#name] = report.name
  FERRY_FIELD(bytes_read);
  FERRY_FIELD(bytes_copied);
  FERRY_FIELD(leases);
  FERRY_FIELD(hits);
  FERRY_FIELD(misses);
  FERRY_FIELD(dropped);
  FERRY_FIELD(divergences);
  FERRY_FIELD(changed);
  FERRY_FIELD(replans);
  FERRY_FIELD(shrinks);
  FERRY_FIELD(stall_seconds);
  FERRY_FIELD(read_stall_seconds);
  FERRY_FIELD(request_stall_seconds);
  FERRY_FIELD(resident_bytes);
  FERRY_FIELD(arena_bytes);
  FERRY_FIELD(small_bytes);
  FERRY_FIELD(peak_bytes);
  FERRY_FIELD(host_peak_bytes);
#undef FERRY_FIELD
  d["read_bytes_per_s"] = report.reads.rate();
  d["io"] = reason;
  return d;
}

py::dict plan_of(const OffloadClient& client) {
  const offload::Plan& plan = client.client().plan();
  py::list groups;
  const auto names = client.group_names();
  const auto bytes = client.group_bytes();
  for (size_t i = 0; i < names.size(); ++i) {
    py::dict group;
    group["name"] = names[i];
    group["size_bytes"] = bytes[i];
    group["placement"] =
        plan.placements[i] == offload::Placement::resident ? "resident" : "streamed";
    groups.append(group);
  }
  py::dict d;
  d["groups"] = groups;
  d["arena_bytes"] = plan.arena_bytes;
  d["resident_bytes"] = plan.resident_bytes;
  d["streamed_bytes"] = plan.streamed_bytes;
  d["step_seconds"] = plan.prediction.step_s;
  d["bound"] = offload::bound_name(plan.prediction.bound);
  return d;
}

// A lease that Python holds: keeps the client.
struct HeldLease {
  explicit HeldLease(std::shared_ptr<OffloadClient> of) : client(std::move(of)) {}
  HeldLease(HeldLease&&) = default;
  HeldLease(const HeldLease&) = delete;

  std::shared_ptr<OffloadClient> client;
  std::vector<offload::Lease> leases;
};

}  // namespace

void add_engine(py::module_& module) {
  py::class_<Trace, std::shared_ptr<Trace>>(module, "Trace", "Spans of time.")
      .def(py::init<>())
      .def("__len__", &Trace::size)
      .def("to_json", &Trace::to_json, NoGil());

  py::class_<OwnedEngine, std::shared_ptr<OwnedEngine>>(module, "Engine", "Streams weights.")
      .def(py::init(&make_engine), py::arg("device"), py::kw_only(), py::arg("weights_memory") = 0,
           py::arg("host_memory") = 0, py::arg("all_move") = false, py::arg("read_ahead") = true,
           py::arg("replan") = true, py::arg("io") = "auto", py::arg("io_limit") = 0,
           py::arg("trace") = nullptr)
      .def_property_readonly("device",
                             [](const OwnedEngine& one) { return one.engine->options().device; })
      .def("report", &report_of)
      .def(
          "unload", [](OwnedEngine& one) { one.engine->unload(); }, NoGil())
      .def(
          "set_trace",
          [](OwnedEngine& one, std::shared_ptr<Trace> trace) {
            {
              py::gil_scoped_release no_gil;
              one.engine->set_trace(trace.get());
            }
            one.trace = std::move(trace);
          },
          py::arg("trace"))
      .def(
          "set_weights_memory",
          [](OwnedEngine& one, uint64_t bytes) { one.engine->set_weights_memory(bytes); },
          py::arg("bytes"), NoGil())
      .def(
          "announce",
          [](OwnedEngine& one,
             const std::vector<std::pair<std::shared_ptr<OffloadClient>, int64_t>>& next) {
            std::vector<offload::Engine::Announced> announced;
            for (const auto& [client, passes] : next)
              announced.push_back({&client->client(), passes});
            one.engine->announce(std::move(announced));
          },
          py::arg("next"), NoGil());
  module.attr("ALL_WEIGHTS") = offload::EngineOptions::kAllWeights;

  py::class_<HeldLease>(module, "Lease", "Holds groups where compute happens.")
      .def(
          "release", [](HeldLease& held) { held.leases.clear(); }, NoGil())
      .def(
          "__enter__", [](HeldLease& held) -> HeldLease& { return held; },
          py::return_value_policy::reference)
      .def("__exit__", [](HeldLease& held, const py::args&) {
        py::gil_scoped_release no_gil;
        held.leases.clear();
      });

  py::
      class_<OffloadClient, std::shared_ptr<OffloadClient>>(module, "Client",
                                                            "One component's groups.")
          .def(
              py::init(
                  [](std::shared_ptr<OwnedEngine> engine, const std::string& name,
                     const std::vector<
                         std::tuple<std::string,
                                    std::vector<std::tuple<std::string, at::Tensor,
                                                           std::optional<weights::StoredTensor>>>,
                                    bool>>& described,
                     std::
                         vector<size_t>
                             first_order,
                     bool
                         read_ahead,
                     bool
                         wrap_around,
                     bool
                         in_memory,
                     std::
                         optional<at::Device>
                             idle_device) {
                    std::vector<GroupDescription> groups;
                    for (const auto& [group_name, slots, keep] : described) {
                      GroupDescription group;
                      group.name = group_name;
                      group.keep_resident = keep;
                      for (const auto& [slot, tensor, source] : slots) {
                        group.slots.emplace_back(slot, tensor);
                        group.sources.push_back(source);
                      }
                      groups.push_back(std::move(group));
                    }
                    py::gil_scoped_release no_gil;
                    return std::make_shared<OffloadClient>(
                        std::move(engine), name, std::move(groups),
                        offload::ClientOptions{.wrap_around = wrap_around,
                                               .read_ahead = read_ahead,
                                               .host_homes = true,
                                               .first_order = std::move(first_order),
                                               .idle_device = idle_device,
                                               .source_changed = {}},
                        in_memory ? weights::PrivateHome::memory : weights::PrivateHome::disk);
                  }),
              py::arg("engine"), py::arg("name"), py::arg("groups"), py::kw_only(),
              py::arg("first_order") = std::vector<size_t>(), py::arg("read_ahead") = true,
              py::arg("wrap_around") = true, py::arg("in_memory") = false,
              py::arg("idle_device") = std::nullopt)
          .def(
              "lease",
              [](std::shared_ptr<OffloadClient> client, const std::vector<size_t>& groups) {
                HeldLease held(client);
                for (size_t group : groups) held.leases.push_back(client->client().lease(group));
                return held;
              },
              py::arg("groups"), NoGil())
          .def(
              "begin_pass", [](OffloadClient& one) { one.client().begin_pass(); }, NoGil())
          .def(
              "end_pass",
              [](OffloadClient& one, bool completed) { one.client().end_pass(completed); },
              py::arg("completed"), NoGil())
          .def(
              "unload", [](OffloadClient& one) { one.client().unload(); }, NoGil())
          .def("remove", &OffloadClient::remove, NoGil())
          .def("withdraw", &OffloadClient::withdraw, NoGil())
          .def("plan", &plan_of)
          .def_property_readonly("removed", &OffloadClient::removed)
          .def_property_readonly("engine", &OffloadClient::engine)
          .def_property_readonly("total_bytes", &OffloadClient::total_bytes)
          .def_property_readonly("bound_bytes", &OffloadClient::bound_bytes);

  module.def("usable_memory_bytes", [] { return memory_info().usable_bytes(); });
  module.def("current_rss_bytes", &current_rss_bytes);
  module.def("peak_rss_bytes", &peak_rss_bytes);
  module.def("reset_peak_rss", &reset_peak_rss);
}

}  // namespace ferry::python
