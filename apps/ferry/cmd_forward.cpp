// ferry forward: one component on named tensors; for parity checks and timing from any language.
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <atomic>
#include <chrono>
#include <regex>
#include <set>

#include "command.h"
#include "ferry/base/error.h"
#include "ferry/base/system_info.h"
#include "ferry/base/trace.h"
#include "ferry/base/units.h"
#include "ferry/hooks/group_offloading.h"
#include "ferry/io/atomic_file.h"
#include "ferry/models/cast_inputs.h"
#include "ferry/models/model.h"
#include "ferry/pipelines/stop_hook.h"
#include "ferry/tensor/device.h"
#include "ferry/tensor/dtype.h"
#include "measure.h"
#include "quantizing_bar.h"
#include "tensor_file.h"

namespace ferry::cli {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct ForwardOptions {
  std::string folder, inputs, output, dtype, device, method = "forward", variant, class_name, dump,
                                                     stats, trace;
  std::string offload_type = "leaf_level";
  std::vector<std::string> arguments;
  std::optional<uint64_t> weights_memory, host_memory, io_limit;
  std::optional<int> threads;
  int repeat = 1;
  std::string pack, quantize;
  bool cold = false, use_packs = false;
};

// Collects the outputs of one submodule: `path`, `path.N` where there are several tensors, and
// `path#k` for the k-th call after the first.
class DumpHook : public nn::ModuleHook {
 public:
  DumpHook(std::string path, models::NamedTensors& into) : path_(std::move(path)), into_(into) {}
  bool wants_outputs() const override { return true; }
  void outputs(nn::Module&, const std::vector<at::Tensor>& tensors) override {
    std::string call = calls_ == 0 ? "" : fmt::format("#{}", calls_);
    ++calls_;
    for (size_t i = 0; i < tensors.size(); ++i) {
      std::string part = tensors.size() == 1 ? "" : fmt::format(".{}", i);
      into_[path_ + part + call] = tensors[i].clone();
    }
  }

 private:
  std::string path_;
  models::NamedTensors& into_;
  int calls_ = 0;
};

// Notes when the first leaf starts to compute.
class FirstComputeHook : public nn::ModuleHook {
 public:
  explicit FirstComputeHook(std::optional<double>& at) : at_(at) {}
  void before(nn::Module&) override {
    if (!at_) at_ = seconds_since_process_start();
  }

 private:
  std::optional<double>& at_;
};

template <class Visit>
void for_each_module(nn::Module& root, Visit visit) {
  for (const auto& entry : root.named_modules()) {
    if (auto* module = dynamic_cast<nn::Module*>(entry.value().get())) visit(entry.key(), *module);
  }
}

void attach_dump(models::Model& model, const std::string& pattern, models::NamedTensors& into) {
  std::regex expression;
  try {
    expression = std::regex(pattern);
  } catch (const std::regex_error& error) {
    throw_error<ArgumentError>("--dump {}: not a regular expression: {}", pattern, error.what());
  }
  size_t matches = 0;
  for_each_module(model, [&](const std::string& path, nn::Module& module) {
    if (path.empty() || !std::regex_search(path, expression)) return;
    module.add_hook("dump", std::make_shared<DumpHook>(path, into));
    ++matches;
  });
  if (matches == 0)
    throw_error<ArgumentError>("--dump {}: no submodule of {} matches", pattern,
                               model.class_name());
}

int run_forward(const ForwardOptions& options, Context& context) {
  check_writable_parent(options.output);
  check_writable_parent(options.stats);
  check_writable_parent(options.trace);
  set_threads(options.threads);
  at::NoGradGuard no_grad;
  at::Device device = tensor::parse_device(options.device);

  models::NamedTensors inputs = load_tensors(options.inputs);
  nlohmann::json arguments = parse_arguments(options.arguments);
  Trace trace;

  models::LoadOptions load;
  if (!options.dtype.empty()) load.dtype = tensor::parse_dtype(options.dtype);
  load.variant = options.variant;
  load.pack = options.pack;
  load.use_packs = options.use_packs;
  QuantizingBar bar("quantizing, layers", context);
  if (!options.quantize.empty()) {
    load.quantize.emplace().scheme = options.quantize;
    bar.attach(*load.quantize);
  }
  auto start = Clock::now();
  std::shared_ptr<models::Model> model =
      models::load_model(options.folder, load, options.class_name);
  bar.finish();
  std::set<std::shared_ptr<const io::File>> files;
  for (const weights::BoundSlot& bound : model->binding()->slots) {
    files.insert(bound.source.file);
    if (bound.packed) files.insert(bound.packed->file);
  }
  auto drop_cache = [&] {
    for (const auto& file : files) file->drop_cache();
  };
  if (options.cold) drop_cache();

  std::shared_ptr<offload::Engine> engine;
  std::shared_ptr<hooks::GroupOffloading> offloading;
  if (options.weights_memory) {
    offload::EngineOptions engine_options;
    engine_options.device = device;
    engine_options.weights_memory_bytes = *options.weights_memory;
    engine_options.host_memory_bytes = options.host_memory.value_or(0);
    engine_options.read.rate_limit_bytes_per_s = options.io_limit.value_or(0);
    engine_options.stop = context.stop;
    if (!options.trace.empty()) engine_options.trace = &trace;
    engine = std::make_shared<offload::Engine>(engine_options);
    hooks::GroupOffloadingConfig config;
    config.unused = model->unused_modules(options.method, arguments);
    if (options.offload_type == "block_level")
      config.offload_type = hooks::OffloadType::block_level;
    offloading = hooks::apply_group_offloading(*model, model->binding(), engine, config,
                                               model->class_name());
  } else {
    model->to(device);  // stubs: each weight is then read to where it belongs
    model->load_weights(context.stop);
    tensor::synchronize(device);
  }
  double load_seconds = seconds_since(start);

  pipelines::StopHooks stop_hooks(*model, context.stop);
  std::optional<double> first_compute;
  for_each_module(*model, [&](const std::string&, nn::Module& module) {
    if (module.children().empty())
      module.add_hook("first_compute", std::make_shared<FirstComputeHook>(first_compute));
  });
  models::cast_inputs(inputs, model->dtype());
  for (auto& entry : inputs) entry.second = entry.second.to(device);

  models::NamedTensors outputs, dumped;
  std::vector<double> forward_seconds;
  std::vector<uint64_t> bytes_read;
  std::vector<double> stall_seconds;
  for (int i = 0; i < options.repeat; ++i) {
    context.stop.throw_if_stopped();
    if (options.cold && i > 0) drop_cache();
    bool last = i + 1 == options.repeat;
    if (i == 1) {
      for_each_module(*model, [](const std::string&, nn::Module& module) {
        module.remove_hook("first_compute");
      });
    }
    if (last && !options.dump.empty()) attach_dump(*model, options.dump, dumped);
    offload::Report before = engine ? engine->report() : offload::Report{};
    auto begin = Clock::now();
    outputs = model->forward_named(options.method, inputs, arguments);
    tensor::synchronize(device);
    forward_seconds.push_back(seconds_since(begin));
    offload::Report after = engine ? engine->report() : offload::Report{};
    bytes_read.push_back(after.bytes_read - before.bytes_read);
    stall_seconds.push_back(after.stall_seconds - before.stall_seconds);
    if (!context.quiet) {
      fmt::print(stderr, "forward {}/{}: {}{}\n", i + 1, options.repeat,
                 format_duration(forward_seconds.back()),
                 engine ? fmt::format(", {} read", format_bytes(bytes_read.back())) : "");
    }
  }
  outputs.merge(dumped);
  save_tensors(options.output, outputs);
  if (!options.trace.empty()) io::write_file(options.trace, trace.to_json());
  if (!options.stats.empty()) {
    nlohmann::ordered_json stats = {
        {"class", model->class_name()},
        {"load_seconds", load_seconds},
        {"forward_seconds", forward_seconds},
        {"bytes_read", bytes_read},
        {"peak_rss_bytes", peak_rss_bytes()},
        {"process_start_to_first_compute_seconds",
         first_compute ? nlohmann::json(*first_compute) : nullptr},
        {"weight_bytes", weights::total_bytes(weights::collect_slots(*model))},
        {"dtype", tensor::dtype_name(model->dtype())},
        {"threads", at::get_num_threads()},
        {"device", device.str()},
    };
    if (!device.is_cpu()) stats["peak_device_bytes"] = peak_device_bytes(device);
    if (engine) {
      offload::Report report = engine->report();
      stats["stall_seconds"] = stall_seconds;
      stats["weights_memory_bytes"] = *options.weights_memory;
      stats["offload"] = {{"reader", engine->read_engine().reason()},
                          {"resident_bytes", report.resident_bytes},
                          {"arena_bytes", report.arena_bytes},
                          {"small_bytes", report.small_bytes},
                          {"peak_weights_bytes", report.peak_bytes},
                          {"leases", report.leases},
                          {"hits", report.hits},
                          {"misses", report.misses},
                          {"reads_packs", report.reads_packs},
                          {"dropped", report.dropped}};
    }
    write_json(options.stats, stats);
  }
  return 0;
}

}  // namespace

Command add_forward(CLI::App& app) {
  auto options = std::make_shared<ForwardOptions>();
  CLI::App* command = app.add_subcommand("forward", "Run one component on named tensors");
  command->footer(
      "Runs one component folder (transformer, vae, text_encoder, ...) on named tensors.\n"
      "Inputs carry the names of the forward arguments in diffusers or transformers, outputs those "
      "of the\n"
      "output class (sample, last_hidden_state, pooler_output, ...).");
  command->add_option("component", options->folder, "folder with config.json and weights")
      ->required()
      ->type_name("DIR");
  add_tensor_files(command, options->inputs, options->output);
  add_bytes(command, "--weights-memory", options->weights_memory,
            "stream the weights under this budget, e.g. 512MiB [default: all in memory]");
  add_bytes(command, "--host-memory", options->host_memory,
            "pinned host memory on an accelerator, for staging and for weights that then need no "
            "disk");
  command->add_option("--dtype", options->dtype, "fp32, bf16 or fp16 [default: as stored]")
      ->type_name("DTYPE");
  add_device(command, options->device);
  command->add_option("--threads", options->threads, "compute threads")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  command->add_option("--method", options->method, "forward, or encode or decode of an autoencoder")
      ->type_name("NAME")
      ->capture_default_str();
  command->add_option("--arg", options->arguments, "argument that is no tensor, repeatable")
      ->type_name("NAME=VALUE");
  command->add_option("--repeat", options->repeat, "run this many times")
      ->check(CLI::PositiveNumber)
      ->type_name("N")
      ->capture_default_str();
  command->add_flag("--cold", options->cold,
                    "drop the checkpoint from the page cache before each run");
  command
      ->add_option("--dump", options->dump,
                   "also write the outputs of submodules whose path matches")
      ->type_name("REGEX");
  command->add_option("--stats", options->stats, "write times, bytes and peak memory as JSON")
      ->type_name("FILE");
  command
      ->add_option("--trace", options->trace,
                   "write a Chrome/Perfetto trace (with --weights-memory)")
      ->type_name("FILE");
  command->add_option("--variant", options->variant, "weights variant, e.g. fp16")
      ->type_name("NAME");
  command->add_option("--class", options->class_name, "class to use instead of config.json's")
      ->type_name("CLASS");
  command->add_option("--offload-type", options->offload_type, "leaf_level or block_level")
      ->check(CLI::IsMember({"leaf_level", "block_level"}))
      ->capture_default_str();
  auto* pack = command
                   ->add_option("--pack", options->pack,
                                "read the weights from this lossless pack (ferry pack)")
                   ->type_name("FILE");
  command
      ->add_flag("--use-packs", options->use_packs, "read the weights' pack in the cache, if any")
      ->excludes(pack);
  command
      ->add_option("--quantize", options->quantize,
                   "quantize as it is loaded, once, into the pack cache, e.g. int8wo")
      ->type_name("SCHEME");
  add_rate(command, "--io-limit", options->io_limit, "read no faster than this, e.g. 500MB/s");
  return {command, [options](Context& context) { return run_forward(*options, context); }};
}

}  // namespace ferry::cli
