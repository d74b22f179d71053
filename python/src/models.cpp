// ferry.models: one component in Python, on torch tensors without a copy in or out.
#include <torch/csrc/autograd/python_variable.h>

#include <ATen/core/Tensor.h>
#include <fmt/ranges.h>

#include <filesystem>
#include <mutex>
#include <optional>

#include "arguments.h"
#include "ferry/base/error.h"
#include "ferry/hooks/group_offloading.h"
#include "ferry/models/model.h"
#include "ferry/pipelines/hub.h"
#include "ferry/pipelines/stop_hook.h"
#include "ferry/tensor/device.h"
#include "ferry/tensor/dtype.h"
#include "interrupt.h"
#include "module.h"

namespace ferry::python {
namespace {

namespace fs = std::filesystem;

py::object from_json(const nlohmann::ordered_json& value) {
  return py::module_::import("json").attr("loads")(value.dump());
}

std::optional<at::ScalarType> dtype_of(const py::object& dtype) {
  if (dtype.is_none()) return std::nullopt;
  return tensor::parse_dtype(text_of(dtype));
}

// A torch.dtype.
py::object to_python(at::ScalarType dtype) {
  return py::module_::import("torch").attr(tensor::dtype_name(dtype).c_str());
}

// What a call in Python passes by name, as forward_named() takes it.
struct CallArguments {
  models::NamedTensors tensors;
  nlohmann::json others = nlohmann::json::object();

  explicit CallArguments(const py::kwargs& arguments) {
    for (const auto& [key, value] : arguments) {
      const auto name = key.cast<std::string>();
      if (value.is_none()) continue;
      if (THPVariable_Check(value.ptr())) {
        tensors[name] = value.cast<at::Tensor>();
      } else if (is_list_of_tensors(value)) {
        size_t index = 0;
        for (const py::handle item : value)
          tensors[name + "." + std::to_string(index++)] = item.cast<at::Tensor>();
      } else {
        others[name] = to_json(name, value);
      }
    }
  }

 private:
  static bool is_list_of_tensors(py::handle value) {
    if (!py::isinstance<py::list>(value) && !py::isinstance<py::tuple>(value)) return false;
    bool any = false;
    for (const py::handle item : value) {
      if (!THPVariable_Check(item.ptr())) return false;
      any = true;
    }
    return any;
  }
  static nlohmann::json to_json(const std::string& name, py::handle value) {
    try {
      const py::object text = py::module_::import("json").attr("dumps")(value);
      return nlohmann::json::parse(text.cast<std::string>());
    } catch (const py::error_already_set&) {
    } catch (const nlohmann::json::exception&) {
    }
    throw_error<ArgumentError>(
        "argument '{}': expected a tensor, a list of tensors, or what JSON can hold, got {}", name,
        py::cast<std::string>(py::str(py::type::handle_of(value))));
  }
};

// Where device and dtype of an argument stand: as torch.nn.Module.to() takes them, in any order.
struct Destination {
  std::optional<at::Device> device;
  std::optional<at::ScalarType> dtype;

  explicit Destination(const py::args& values) {
    const py::object dtype_class = py::module_::import("torch").attr("dtype");
    for (const py::handle value : values) {
      const auto text = py::cast<std::string>(py::str(value));
      if (py::isinstance(value, dtype_class)) {
        dtype = tensor::parse_dtype(text);
      } else {
        device = tensor::parse_device(text);
      }
    }
  }
};

// A model with what is attached to it. One call at a time: a second thread waits for its turn.
class LoadedModel {
 public:
  explicit LoadedModel(std::shared_ptr<models::Model> model) : model_(std::move(model)) {}

  models::Model& model() { return *model_; }

  // Runs `work` without the GIL, so that Ctrl-C ends it between two blocks. REQUIRES: the GIL.
  template <class Work>
  auto run(Work work) {
    StopSource stop;
    const InterruptWatch watch([stop] { stop.request_stop(); });
    try {
      const py::gil_scoped_release no_gil;
      std::lock_guard lock(mutex_);
      const pipelines::StopHooks hooks(*model_, stop.token());
      return work(stop.token());
    } catch (const Cancelled&) {
      check_signals();
      throw;
    }
  }

  models::NamedTensors call(const std::string& method, const py::kwargs& kwargs) {
    const CallArguments arguments(kwargs);
    return run([&](const StopToken&) {
      return model_->forward_named(method, arguments.tensors, arguments.others);
    });
  }

  void load_weights() {
    run([&](const StopToken& stop) {
      if (!offloading_) model_->load_weights(stop);
    });
  }

  py::dict state_dict() {
    std::vector<std::pair<std::string, at::Tensor>> values;
    run([&](const StopToken& stop) {
      if (!offloading_ && !model_->weights_loaded()) model_->load_weights(stop);
      for (const weights::Slot& slot : weights::collect_slots(*model_)) {
        stop.throw_if_stopped();
        at::Tensor value = slot.tensor.detach();
        if (offloading_) {
          const offload::Lease lease = offloading_->lease(slot.name());
          value = slot.tensor.detach().clone();
        }
        for (const std::string& name : slot.names) values.emplace_back(name, value);
      }
    });
    py::dict state;
    for (const auto& [name, value] : values) state[py::str(name)] = value;
    return state;
  }

  void to(const py::args& arguments) {
    const Destination destination(arguments);
    run([&](const StopToken&) {
      if (destination.device && destination.dtype) {
        model_->to(*destination.device, *destination.dtype);
      } else if (destination.device) {
        model_->to(*destination.device);
      } else if (destination.dtype) {
        model_->to(*destination.dtype);
      }
    });
  }

  void save_pretrained(const py::object& folder, const py::object& max_shard_size,
                       const std::string& variant) {
    const fs::path path = path_of(folder);
    const uint64_t bytes =
        bytes_of(max_shard_size, "max_shard_size").value_or(models::Model::kMaxShardSizeBytes);
    run([&](const StopToken&) { model_->save_pretrained(path, bytes, variant); });
  }

  // `memory` unset: an engine that holds no more than it must.
  void enable_group_offload(const hooks::GroupOffloadingConfig& config,
                            std::optional<offload::EngineOptions> options) {
    run([&](const StopToken&) {
      // The engine's stop is a call's, which StopHooks bring.
      if (options) {
        offloading_ = hooks::apply_group_offloading(*model_, model_->binding(),
                                                    std::make_shared<offload::Engine>(*options),
                                                    config, model_->class_name());
      } else {
        offloading_ =
            hooks::apply_group_offloading(*model_, model_->binding(), config, model_->class_name());
      }
    });
  }

  void disable_group_offload() {
    run([&](const StopToken&) {
      if (offloading_) offloading_->remove();
      offloading_.reset();
    });
  }

  bool offloads() const { return offloading_ != nullptr; }
  offload::Report report() const {
    return offloading_ ? offloading_->engine()->report() : offload::Report{};
  }

 private:
  std::shared_ptr<models::Model> model_;
  std::shared_ptr<hooks::GroupOffloading> offloading_;  // ends before the model does
  std::mutex mutex_;
};

std::shared_ptr<LoadedModel> load(const py::object& folder, const py::object& subfolder,
                                  const py::object& dtype, const py::object& device,
                                  const py::object& weights_memory, const py::object& host_memory,
                                  const std::optional<std::string>& variant,
                                  const std::optional<std::string>& quantize,
                                  const std::optional<std::string>& class_name) {
  models::LoadOptions options;
  options.dtype = dtype_of(dtype);
  options.variant = variant.value_or("");
  if (quantize) options.quantize.emplace().scheme = *quantize;
  offload::EngineOptions engine;
  const std::optional<uint64_t> budget = bytes_of(weights_memory, "weights_memory");
  engine.weights_memory_bytes = budget.value_or(0);
  engine.host_memory_bytes = bytes_of(host_memory, "host_memory").value_or(0);
  if (engine.host_memory_bytes > 0 && !budget)
    throw ArgumentError("host_memory is for weights that are streamed: give weights_memory, too");
  const std::string name = path_of(folder), below = path_of(subfolder);
  const std::string device_name = text_of(device);

  StopSource stop;
  if (options.quantize) options.quantize->stop = stop.token();
  const InterruptWatch watch([stop] { stop.request_stop(); });
  std::shared_ptr<LoadedModel> loaded;
  try {
    const py::gil_scoped_release no_gil;
    tensor::open_accelerator();  // before anything else asks torch for one
    engine.device = tensor::parse_device(device_name);
    const fs::path path = pipelines::resolve_folder(name) / below;
    loaded =
        std::make_shared<LoadedModel>(models::load_model(path, options, class_name.value_or("")));
  } catch (const Cancelled&) {
    check_signals();
    throw;
  }
  if (budget) {
    loaded->enable_group_offload({}, engine);
  } else {
    loaded->model().to(engine.device);  // stubs: each weight is then read to where it belongs
  }
  return loaded;
}

hooks::OffloadType offload_type_of(const std::string& name) {
  if (name == "block_level") return hooks::OffloadType::block_level;
  if (name == "leaf_level") return hooks::OffloadType::leaf_level;
  throw_error<ArgumentError>("offload_type: expected \"block_level\" or \"leaf_level\", got \"{}\"",
                             name);
}

LoadedModel& enable_group_offload(LoadedModel& self, const py::object& onload_device,
                                  const py::object& offload_device, const std::string& offload_type,
                                  int64_t num_blocks_per_group, bool non_blocking, bool use_stream,
                                  bool record_stream, bool low_cpu_mem_usage,
                                  const py::object& offload_to_disk_path,
                                  std::vector<std::string> block_modules,
                                  std::vector<std::string> exclude, std::vector<std::string> unused,
                                  bool gather_embeddings, const py::object& weights_memory,
                                  const py::object& host_memory) {
  hooks::GroupOffloadingConfig config;
  config.offload_type = offload_type_of(offload_type);
  config.num_blocks_per_group = num_blocks_per_group;
  if (!onload_device.is_none()) config.onload_device = tensor::parse_device(text_of(onload_device));
  config.offload_device = tensor::parse_device(text_of(offload_device));
  config.use_stream = use_stream;
  config.non_blocking = non_blocking;
  config.record_stream = record_stream;
  config.low_cpu_mem_usage = low_cpu_mem_usage;
  if (!offload_to_disk_path.is_none()) config.offload_to_disk_path = path_of(offload_to_disk_path);
  config.block_modules = std::move(block_modules);
  config.exclude = std::move(exclude);
  config.unused = std::move(unused);
  config.gather_embeddings = gather_embeddings;
  std::optional<offload::EngineOptions> engine;
  if (!weights_memory.is_none() || !host_memory.is_none()) {
    engine.emplace();
    engine->device = config.onload_device.value_or(self.model().device());
    engine->weights_memory_bytes = bytes_of(weights_memory, "weights_memory").value_or(0);
    engine->host_memory_bytes = bytes_of(host_memory, "host_memory").value_or(0);
  }
  self.enable_group_offload(config, engine);
  return self;
}

py::object get_attribute(const py::object& self, const std::string& name) {
  auto& loaded = self.cast<LoadedModel&>();
  const std::vector<std::string> methods = loaded.model().methods();
  if (std::find(methods.begin(), methods.end(), name) == methods.end()) {
    PyErr_SetString(PyExc_AttributeError,
                    fmt::format("{} has no attribute or method '{}'; its methods are {}",
                                loaded.model().class_name(), name, fmt::join(methods, ", "))
                        .c_str());
    throw py::error_already_set();
  }
  return py::cpp_function(
      [self, name](const py::kwargs& arguments) {
        return self.cast<LoadedModel&>().call(name, arguments);
      },
      py::name(name.c_str()));
}

py::list named(const torch::OrderedDict<std::string, at::Tensor>& tensors) {
  py::list list;
  for (const auto& entry : tensors) list.append(py::make_tuple(entry.key(), entry.value()));
  return list;
}

void add_methods(py::class_<LoadedModel, std::shared_ptr<LoadedModel>>& model) {
  const auto none = py::none();
  model
      .def(
          "forward",
          [](LoadedModel& self, const py::kwargs& arguments) {
            return self.call("forward", arguments);
          },
          R"(Runs the model on named arguments: dict[str, torch.Tensor], under the names of the
diffusers (or transformers) output class: {"sample": ...}.

Tensors, lists of tensors, numbers, text and None have the names of the Python class's forward().
Tensors share their memory with the model's, in and out. They must be on the model's device, and of its
dtype where the model in Python asks for that. The first call reads the weights.
Raises ArgumentError (naming missing, unknown and known arguments), IoError.)")
      .def("__call__", [](LoadedModel& self,
                          const py::kwargs& arguments) { return self.call("forward", arguments); })
      .def("__getattr__", &get_attribute)
      .def(
          "unused_modules",
          [](LoadedModel& self, const std::string& method, const py::kwargs& kwargs) {
            const CallArguments arguments(kwargs);
            return self.model().unused_modules(method, arguments.others);
          },
          py::arg("method") = "forward",
          "Names of modules (dotted) that a call with these arguments does not use: list[str], for "
          "enable_group_offload(unused=...).")
      .def("load_weights", &LoadedModel::load_weights,
           "Reads the weights now rather than at the first call. Does nothing while they are "
           "offloaded.")
      .def("state_dict", &LoadedModel::state_dict,
           R"(All weights by name: dict[str, torch.Tensor].

They share the model's memory; while offloading is enabled they are copies, read one by one.)")
      .def(
          "named_parameters",
          [](LoadedModel& self) { return named(self.model().named_parameters()); },
          R"(list[tuple[str, torch.Tensor]]: the registered tensors themselves.

Shape and dtype are right at any time; values are only where the weights are loaded (NaN elsewhere).)")
      .def(
          "named_buffers", [](LoadedModel& self) { return named(self.model().named_buffers()); },
          "As named_parameters().")
      .def(
          "to",
          [](const py::object& self, const py::args& arguments) {
            self.cast<LoadedModel&>().to(arguments);
            return self;
          },
          "to(device), to(dtype) or to(device, dtype), as torch.nn.Module's: returns the model. "
          "Raises ArgumentError while offloading is enabled.")
      .def("save_pretrained", &LoadedModel::save_pretrained, py::arg("folder"), py::kw_only(),
           py::arg("max_shard_size") = none, py::arg("variant") = "",
           R"(Writes config.json and the weights so that diffusers reads them.

max_shard_size: bytes of a weights file, as int or text. None: 10 GB.
Files appear whole or not at all. Raises IoError.)")
      .def("enable_group_offload", &enable_group_offload,
           py::return_value_policy::reference_internal, py::kw_only(),
           py::arg("onload_device") = none, py::arg("offload_device") = "cpu",
           py::arg("offload_type") = "leaf_level", py::arg("num_blocks_per_group") = 1,
           py::arg("non_blocking") = true, py::arg("use_stream") = true,
           py::arg("record_stream") = false, py::arg("low_cpu_mem_usage") = false,
           py::arg("offload_to_disk_path") = none,
           py::arg("block_modules") = std::vector<std::string>(),
           py::arg("exclude") = std::vector<std::string>(),
           py::arg("unused") = std::vector<std::string>(), py::arg("gather_embeddings") = true,
           py::arg("weights_memory") = none, py::arg("host_memory") = none,
           R"(Streams the weights from the checkpoint while the model computes; returns the model.

The arguments are diffusers' enable_group_offload()'s, and:
exclude: names of modules (dotted) whose weights stay in memory.
unused: names of modules that the calls to come do not use (unused_modules()).
gather_embeddings: read the rows that are used of embedding tables instead of the tables.
weights_memory: bytes that all weights may take where compute happens, as int or text. None: as little
    as the model can do with, and as much again to read ahead.
host_memory: bytes of pinned host memory on an accelerator, likewise. None: staging.
Raises BudgetError stating the least budget, ArgumentError (it is enabled already), IoError.)")
      .def("disable_group_offload", &LoadedModel::disable_group_offload,
           "Ends offloading; the next call reads the weights into memory.")
      .def(
          "set_attention_backend",
          [](LoadedModel& self, const std::string& name) {
            self.model().set_attention_backend(name);
          },
          py::arg("backend"),
          "\"native\", \"_native_math\", \"_native_flash\", \"_native_efficient\" or "
          "\"_native_cudnn\" for every attention module. Raises ArgumentError.")
      .def(
          "set_attn_processor",
          [](LoadedModel& self, const std::string& name) { self.model().set_attn_processor(name); },
          py::arg("processor"),
          "A processor class, by name, for every attention module. Raises ArgumentError.")
      .def(
          "fuse_qkv_projections", [](LoadedModel& self) { self.model().fuse_qkv_projections(); },
          "Joins query, key and value projections. Raises ArgumentError if the weights are not "
          "loaded.")
      .def("unfuse_qkv_projections",
           [](LoadedModel& self) { self.model().unfuse_qkv_projections(); })
      .def(
          "enable_layerwise_casting",
          [](LoadedModel& self, const py::object& storage_dtype,
             std::optional<std::vector<std::string>> skip_modules_pattern) {
            const at::ScalarType dtype = dtype_of(storage_dtype).value_or(at::kFloat8_e4m3fn);
            return self.run([&](const StopToken&) {
              return self.model().enable_layerwise_casting(dtype, std::move(skip_modules_pattern));
            });
          },
          py::arg("storage_dtype") = none, py::arg("skip_modules_pattern") = none,
          R"(Keeps weights in a narrow dtype and computes in the dtype of the activations; returns how
many layers were cast: int.

storage_dtype: a float8; None: torch.float8_e4m3fn.
skip_modules_pattern: regular expressions in place of diffusers' default ones.
Raises ArgumentError.)");
}

}  // namespace

void add_models(py::module_& module) {
  const auto none = py::none();
  py::class_<LoadedModel, std::shared_ptr<LoadedModel>> model(
      module, "Model", py::dynamic_attr(),
      R"(One component (transformer, vae, text encoder) that runs in ferry itself.

Call it as diffusers' model, with named arguments only; besides forward() it has the methods that
`methods` names: encode(), decode(). Ctrl-C stops a call between two blocks.
Thread-safety: one call at a time; a second thread waits for its turn.)");
  model
      .def_property_readonly(
          "class_name", [](LoadedModel& self) { return self.model().class_name(); },
          "\"FluxTransformer2DModel\".")
      .def_property_readonly(
          "config", [](LoadedModel& self) { return from_json(self.model().config_json()); },
          "What config.json holds: dict.")
      .def_property_readonly(
          "methods", [](LoadedModel& self) { return self.model().methods(); },
          "Names of the methods that can be called: list[str].")
      .def_property_readonly(
          "dtype", [](LoadedModel& self) { return to_python(self.model().dtype()); },
          "torch.dtype of the first floating-point parameter.")
      .def_property_readonly(
          "device", [](LoadedModel& self) { return self.model().device(); }, "torch.device.")
      .def_property_readonly(
          "weights_loaded", [](LoadedModel& self) { return self.model().weights_loaded(); },
          "Whether all weights are in memory.")
      .def_property_readonly(
          "group_offload_enabled", [](LoadedModel& self) { return self.offloads(); },
          "Whether the weights are streamed.")
      .def_property_readonly(
          "bytes_streamed", [](LoadedModel& self) { return self.report().bytes_read; },
          "Bytes read from disk for streamed weights since offloading was enabled.")
      .def_property_readonly(
          "peak_weights_bytes", [](LoadedModel& self) { return self.report().peak_bytes; },
          "The most bytes that weights took since offloading was enabled.")
      .def_property_readonly(
          "attn_processors", [](LoadedModel& self) { return self.model().attn_processors(); },
          "Processor class of each attention module: dict[str, str].")
      .def("__repr__", [](LoadedModel& self) {
        return fmt::format("<ferry.models.Model {}>", self.model().class_name());
      });
  add_methods(model);
  module.def("load_model", &load, py::arg("folder"), py::kw_only(), py::arg("subfolder") = none,
             py::arg("dtype") = none, py::arg("device") = none, py::arg("weights_memory") = none,
             py::arg("host_memory") = none, py::arg("variant") = none, py::arg("quantize") = none,
             py::arg("class_name") = none,
             R"(Makes the model that folder/config.json names. Reads headers only.

folder: the component's folder, the pipeline's with subfolder ("transformer"), or
    "org/repo[@revision]" in the local Hugging Face cache.
dtype: torch.bfloat16 or "bf16"; None: as stored.
device: "cpu", "cuda", torch.device, or "auto"; None: $FERRY_DEVICE, else the CPU.
weights_memory: bytes that the weights may take there, as int or text ("2GiB"): they are streamed. None:
    all in memory, read at the first call.
host_memory: bytes of pinned host memory on an accelerator: weights that fit in it need no disk.
variant: of the weight files, e.g. "fp16".
quantize: a scheme, "int8wo"; done once, into the pack cache.
class_name: in place of config.json's.

Raises FormatError (all missing, unexpected and mis-shaped keys at once), IoError, ArgumentError (a
class that ferry does not have), BudgetError, DeviceError.)");
}

}  // namespace ferry::python
