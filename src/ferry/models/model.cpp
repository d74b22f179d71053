#include "ferry/models/model.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <span>
#include <unordered_map>
#include <unordered_set>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/hooks/layerwise_casting.h"
#include "ferry/io/read_engine.h"
#include "ferry/io/safetensors.h"
#include "ferry/models/bind_options.h"
#include "ferry/models/config.h"
#include "ferry/models/quantizing.h"
#include "ferry/models/stored_binding.h"
#include "ferry/nn/attention_dispatch.h"
#include "ferry/nn/linear.h"
#include "ferry/quant/written_weight.h"
#include "ferry/tensor/dtype.h"
#include "ferry/weights/lossless_pack.h"
#include "ferry/weights/stub.h"

namespace ferry::models {

namespace {

constexpr const char* kLoadHook = "load_weights";

// Reads the weights at the first call. Stays attached, so that a model whose offloading was removed
// loads again; a look at each slot is cheap beside a forward.
class LoadHook : public nn::ModuleHook {
 public:
  explicit LoadHook(const StopToken& stop) : stop_(stop) {}
  void before(nn::Module& module) override {
    auto& model = static_cast<Model&>(module);
    if (!model.weights_are_offloaded() && !model.weights_loaded()) model.load_weights(stop_);
  }

 private:
  const StopToken& stop_;
};

std::string class_name_of(const nlohmann::ordered_json& config, const std::string& where) {
  if (auto it = config.find("_class_name"); it != config.end() && it->is_string()) return *it;
  if (auto it = config.find("architectures");
      it != config.end() && it->is_array() && !it->empty()) {
    const auto& first = (*it)[0];
    if (first.is_string()) return first;
  }
  throw_error<FormatError>(
      "{}: has neither \"_class_name\" nor \"architectures\": not a model's config", where);
}

bool has_weights(const std::filesystem::path& folder) {
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() == ".safetensors") return true;
  }
  return false;
}

// The folder's checkpoint, or the lossless pack that stands in for it.
std::shared_ptr<const weights::Checkpoint> open_weights(const std::filesystem::path& folder,
                                                        const std::string& base,
                                                        const LoadOptions& options) {
  if (!options.pack.empty() && !has_weights(folder)) return weights::open_pack(options.pack);
  auto checkpoint = weights::Checkpoint::open_folder(folder, base, options.variant);
  if (!options.pack.empty()) return weights::open_pack(options.pack, checkpoint.get());
  return checkpoint;
}

void offer_cached_pack(weights::Binding& binding, const std::filesystem::path& folder) {
  weights::PackCache cache;
  if (auto pack = weights::find_cached_pack(cache, *binding.checkpoint)) {
    weights::offer_pack(binding, *pack);
  } else {
    log::warn("{}: there is no pack in {}, so the checkpoint is read; ferry pack makes one",
              folder.string(), cache.folder().string());
  }
}

// ---- save_pretrained ----

// One tensor of a weights file: a slot under the key that its format gives it, or, without a slot,
// the bytes that a format keeps beside its components.
struct SavedTensor {
  std::string key;
  std::optional<weights::Slot> slot = {};
  std::string bytes = {};

  uint64_t size_bytes() const { return slot ? slot->size_bytes() : bytes.size(); }
  io::SafetensorsWriter::Entry entry() const {
    if (slot) return {key, tensor::from_torch(slot->dtype()), slot->shape().vec()};
    return {key, io::Dtype::U8, {static_cast<int64_t>(bytes.size())}};
  }
};

// What a model's weights files hold, in order.
struct SavedWeights {
  std::vector<SavedTensor> tensors;
  std::map<std::string, std::string> metadata = {{"format", "pt"}};
};

SavedWeights saved_weights(const Model& model) {
  struct Place {
    std::string parameter;
    const nn::Linear* layer;
    size_t component;
  };
  std::unordered_map<std::string, Place> components;  // by slot name
  for (const auto& entry : model.named_modules("", /*include_self=*/false)) {
    const auto* layer = dynamic_cast<const nn::Linear*>(entry.value().get());
    if (!layer || !layer->quantized_weight()) continue;
    const quant::QuantizedWeight& weight = *layer->quantized_weight();
    const std::string parameter = entry.key() + ".weight";
    for (size_t i = 0; i < weight.components().size(); ++i)
      components.emplace(parameter + "_" + weight.components()[i].name, Place{parameter, layer, i});
  }
  SavedWeights saved;
  std::vector<std::pair<std::string, std::string>> entries;  // TorchAO's, by parameter
  std::map<std::string, quant::WrittenWeight> written;
  bool is_torchao = false;
  const at::ScalarType dtype = model.dtype();
  for (weights::Slot& slot : weights::collect_slots(model)) {
    auto place = components.find(slot.name());
    if (place == components.end()) {
      entries.emplace_back(slot.name(), "");
      saved.tensors.push_back({slot.name(), std::move(slot)});
      continue;
    }
    const auto& [parameter, layer, index] = place->second;
    auto [as, is_first] = written.try_emplace(parameter);
    if (is_first) {
      as->second = quant::written_weight(parameter, *layer->quantized_weight(), dtype);
      entries.emplace_back(parameter, as->second.metadata);
      is_torchao = is_torchao || !as->second.metadata.empty();
    }
    for (quant::WrittenTensor& tensor : as->second.tensors) {
      if (tensor.component == index) saved.tensors.push_back({tensor.key, std::move(slot)});
      if (is_first && !tensor.component)
        saved.tensors.push_back({tensor.key, std::nullopt, tensor.bytes});
    }
  }
  if (is_torchao) saved.metadata = quant::torchao_metadata(entries);
  return saved;
}

void write_file(io::SafetensorsWriter& writer, const std::vector<SavedTensor>& tensors,
                const WriteSlot& write) {
  for (const SavedTensor& tensor : tensors) {
    if (tensor.slot) {
      write(*tensor.slot, writer);
    } else {
      writer.write(std::as_bytes(std::span(tensor.bytes)));
    }
  }
  writer.finish();
}

std::vector<io::SafetensorsWriter::Entry> entries_of(const std::vector<SavedTensor>& tensors) {
  std::vector<io::SafetensorsWriter::Entry> entries;
  for (const SavedTensor& tensor : tensors) entries.push_back(tensor.entry());
  return entries;
}

struct Shard {
  std::string file;
  std::vector<SavedTensor> tensors;
};

// As huggingface_hub: in order, a new shard where the next tensor would not fit.
std::vector<Shard> split_into_shards(const std::vector<SavedTensor>& tensors, uint64_t max_bytes,
                                     const std::string& stem) {
  std::vector<Shard> shards(1);
  uint64_t bytes = 0;
  for (const SavedTensor& tensor : tensors) {
    if (bytes > 0 && bytes + tensor.size_bytes() > max_bytes) {
      shards.emplace_back();
      bytes = 0;
    }
    shards.back().tensors.push_back(tensor);
    bytes += tensor.size_bytes();
  }
  for (size_t i = 0; i < shards.size(); ++i) {
    shards[i].file = shards.size() == 1 ? stem + ".safetensors"
                                        : fmt::format("{}-{:05d}-of-{:05d}.safetensors", stem,
                                                      i + 1, shards.size());
  }
  return shards;
}

// Weight files of an earlier save that the new ones do not replace; they would be read instead.
std::vector<std::filesystem::path> stale_files(const std::filesystem::path& folder,
                                               const std::string& stem, const std::string& index,
                                               const std::vector<Shard>& shards) {
  std::unordered_set<std::string> written;
  for (const Shard& shard : shards) written.insert(shard.file);
  if (shards.size() > 1) written.insert(index);
  auto is_weights = [&](const std::string& file) {
    if (file == index || file == stem + ".safetensors") return true;
    // stem-00001-of-00002.safetensors
    constexpr size_t kTail = std::string_view("-00001-of-00002.safetensors").size();
    return file.size() == stem.size() + kTail && file.starts_with(stem + "-") &&
           file.ends_with(".safetensors") && file.compare(stem.size() + 6, 4, "-of-") == 0;
  };
  std::vector<std::filesystem::path> stale;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    std::string file = entry.path().filename().string();
    if (is_weights(file) && !written.contains(file)) stale.push_back(entry.path());
  }
  return stale;
}

const ModelClass& find_class(const std::string& class_name, const std::string& where) {
  std::vector<std::string_view> known;
  for (const ModelClass& entry : model_classes()) {
    if (entry.name == class_name) return entry;
    known.push_back(entry.name);
  }
  throw_error<ArgumentError>("{}: ferry has no model class '{}'; it has {}", where, class_name,
                             fmt::join(known, ", "));
}

}  // namespace

at::ScalarType Model::dtype() const {
  std::vector<std::string> kept = traits().keep_in_fp32_modules;
  std::optional<at::ScalarType> any;
  for (const auto& entry : named_parameters()) {
    at::ScalarType type = entry.value().scalar_type();
    // A float8 is how a weight is stored (layerwise casting), nothing computes in it.
    if (!at::isFloatingType(type) || at::isFloat8Type(type)) continue;
    if (!has_part(entry.key(), kept)) return type;
    any = type;
  }
  return any.value_or(at::kFloat);
}

at::Device Model::device() const {
  std::vector<at::Tensor> all = parameters();
  return all.empty() ? at::Device(at::kCPU) : all.front().device();
}

void Model::set_binding(std::shared_ptr<weights::Binding> binding) {
  binding_ = std::move(binding);
  remove_hook(kLoadHook);
  if (binding_) add_hook(kLoadHook, std::make_shared<LoadHook>(load_stop_));
}

void Model::load_weights(const StopToken& stop) {
  if (!binding_) {
    if (weights_loaded()) return;
    throw_error<ArgumentError>("{}: has no checkpoint to read its weights from", class_name());
  }
  std::unique_ptr<io::ReadEngine> engine = io::make_read_engine();
  weights::load_resident(*binding_, *engine, stop);
}

bool Model::weights_loaded() const {
  for (const at::Tensor& parameter : parameters()) {
    if (weights::is_stub(parameter)) return false;
  }
  for (const at::Tensor& buffer : buffers()) {
    if (weights::is_stub(buffer)) return false;
  }
  return true;
}

std::string Model::weights_base() const {
  return library() == "transformers" ? "model" : "diffusion_pytorch_model";
}

void Model::check_method(const std::string& method) const {
  std::vector<std::string> known = methods();
  if (std::find(known.begin(), known.end(), method) != known.end()) return;
  throw_error<ArgumentError>("{}: method '{}' is unknown; known: {}", class_name(), method,
                             fmt::join(known, ", "));
}

std::vector<std::pair<std::string, nn::AttentionModule*>> Model::attention_modules() const {
  std::vector<std::pair<std::string, nn::AttentionModule*>> found;
  for (const auto& entry : named_modules()) {
    if (auto* attention = dynamic_cast<nn::AttentionModule*>(entry.value().get()))
      found.emplace_back(entry.key(), attention);
  }
  return found;
}

void Model::set_attention_backend(const std::string& backend) {
  nn::parse_attention_backend(backend);  // an unknown name changes nothing
  for (const auto& [path, attention] : attention_modules())
    attention->set_attention_backend(backend);
}

std::map<std::string, std::string> Model::attn_processors() const {
  std::map<std::string, std::string> processors;
  for (const auto& [path, attention] : attention_modules())
    processors.emplace(path, attention->processor_name());
  return processors;
}

void Model::set_attn_processor(const std::string& name) {
  for (const auto& [path, attention] : attention_modules()) {
    std::vector<std::string> available = attention->available_processors();
    if (std::find(available.begin(), available.end(), name) != available.end()) continue;
    throw_error<ArgumentError>("{}: {} has no processor '{}'; it has {}", class_name(), path, name,
                               fmt::join(available, ", "));
  }
  for (const auto& [path, attention] : attention_modules()) attention->set_processor(name);
}

size_t Model::enable_layerwise_casting(at::ScalarType storage_dtype,
                                       std::optional<std::vector<std::string>> skip) {
  hooks::LayerwiseCastingConfig config{.storage_dtype = storage_dtype, .compute_dtype = dtype()};
  if (skip) config.skip_modules_pattern = std::move(*skip);
  const Traits own = traits();
  for (const auto* patterns : {&own.keep_in_fp32_modules, &own.skip_layerwise_casting_patterns}) {
    config.skip_modules_pattern.insert(config.skip_modules_pattern.end(), patterns->begin(),
                                       patterns->end());
  }
  return hooks::apply_layerwise_casting(*this, config);
}

void Model::fuse_qkv_projections() {
  for (const auto& [path, attention] : attention_modules()) attention->fuse_projections();
}

void Model::unfuse_qkv_projections() {
  for (const auto& [path, attention] : attention_modules()) attention->unfuse_projections();
}

void Model::save_pretrained(const std::filesystem::path& folder, uint64_t max_shard_size_bytes,
                            const std::string& variant) {
  std::unordered_map<std::string, const weights::BoundSlot*> bound;
  if (binding_) {
    for (const auto& entry : binding_->slots) bound.emplace(entry.slot.name(), &entry);
  }
  auto write = [&](const weights::Slot& slot, io::SafetensorsWriter& writer) {
    at::Tensor tensor = slot.tensor.detach();
    if (weights::is_stub(tensor)) {
      auto it = bound.find(slot.name());
      if (it == bound.end()) {
        throw_error<ArgumentError>("{}: cannot save: '{}' has no weight", class_name(),
                                   slot.name());
      }
      tensor = weights::read_tensor(*it->second);
    }
    tensor = tensor.to(at::kCPU).contiguous();
    writer.write({static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()});
  };
  save_pretrained_from(write, folder, max_shard_size_bytes, variant);
}

size_t Model::save_pretrained_from(const WriteSlot& write, const std::filesystem::path& folder,
                                   uint64_t max_shard_size_bytes, const std::string& variant) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error)
    throw_error<IoError>("{}: cannot create the folder: {}", folder.string(), error.message());
  std::string base = weights_base();
  std::string stem = variant.empty() ? base : base + "." + variant;
  std::string index =
      base + ".safetensors.index" + (variant.empty() ? "" : "." + variant) + ".json";

  const SavedWeights saved = saved_weights(*this);
  std::vector<Shard> shards = split_into_shards(saved.tensors, max_shard_size_bytes, stem);
  nlohmann::json weight_map = nlohmann::json::object();
  uint64_t total_bytes = 0;
  for (const Shard& shard : shards) {
    for (const SavedTensor& tensor : shard.tensors) {
      weight_map[tensor.key] = shard.file;
      total_bytes += tensor.size_bytes();
    }
    io::SafetensorsWriter writer(folder / shard.file, entries_of(shard.tensors), saved.metadata);
    write_file(writer, shard.tensors, write);
  }
  if (shards.size() > 1) {
    nlohmann::ordered_json metadata = {{"total_size", total_bytes}};
    for (const auto& [key, value] : saved.metadata) {
      if (saved.metadata.contains("tensor_names")) metadata[key] = value;
    }
    write_config(folder / index, {{"metadata", metadata}, {"weight_map", weight_map}});
  }
  nlohmann::ordered_json config = config_json();
  if (library() == "transformers") {
    config["architectures"] = {class_name()};
  } else {
    config["_class_name"] = class_name();
    if (!config.contains("_diffusers_version")) config["_diffusers_version"] = "0.42.1";
  }
  write_config(folder / "config.json", config);
  for (const auto& path : stale_files(folder, stem, index, shards)) std::filesystem::remove(path);
  return shards.size();
}

void Model::write_safetensors(const WriteSlot& write, io::SafetensorsWriter::Sink sink,
                              const std::string& where) {
  const SavedWeights saved = saved_weights(*this);
  io::SafetensorsWriter writer(std::move(sink), where, entries_of(saved.tensors), saved.metadata);
  write_file(writer, saved.tensors, write);
}

std::shared_ptr<Model> make_model(const std::string& class_name,
                                  const nlohmann::ordered_json& config, const std::string& where) {
  const ModelClass& found = find_class(class_name, where);
  try {
    return found.make(config, where);
  } catch (const ArgumentError& error) {
    throw_error<ArgumentError>("{}: {}", where, error.what());
  }
}

std::shared_ptr<Model> load_model(const std::filesystem::path& folder, const LoadOptions& options,
                                  const std::string& class_name) {
  std::filesystem::path config_path = folder / "config.json";
  std::string where = config_path.string();
  nlohmann::ordered_json config = read_config(config_path);
  const ModelClass& found =
      find_class(class_name.empty() ? class_name_of(config, where) : class_name, where);
  std::shared_ptr<Model> model;
  try {
    model = found.make(config, where);
  } catch (const ArgumentError& error) {  // the file is at fault, not the caller
    throw_error<FormatError>("{}: {}", where, error.what());
  }

  auto checkpoint = open_weights(folder, model->weights_base(), options);
  auto binding = bind_checkpoint(*model, checkpoint, options.dtype);
  model->set_binding(std::move(binding));
  if (options.quantize) model = quantize_through_cache(*model, *options.quantize, options.dtype);
  if (options.use_packs && options.pack.empty() && !options.quantize)
    offer_cached_pack(*model->binding(), folder);
  model->eval();
  if (options.load_now) model->load_weights();
  return model;
}

}  // namespace ferry::models
