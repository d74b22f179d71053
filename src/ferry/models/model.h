// What every model is (diffusers' ModelMixin and ConfigMixin): a module with a config, traits,
// named inputs and outputs, and a way from and to a folder.
#pragma once

#include <nlohmann/json.hpp>

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ferry/base/stop_token.h"
#include "ferry/io/safetensors.h"
#include "ferry/nn/module.h"
#include "ferry/weights/binding.h"

namespace ferry::nn {
class AttentionModule;
}

namespace ferry::models {

// Named tensors in and out of forward_named(); names are the reference's argument and output names.
using NamedTensors = std::map<std::string, at::Tensor>;

// Writes the bytes of one slot, in any portions.
using WriteSlot = std::function<void(const weights::Slot& slot, io::SafetensorsWriter& writer)>;

// What the Python class declares; tools/parity/traits.py compares.
struct Traits {
  // Modules (path parts) that stay float32 when a model is cast to another dtype.
  std::vector<std::string> keep_in_fp32_modules;
  // Class names of modules that are never split over devices.
  std::vector<std::string> no_split_modules;
  std::vector<std::string> skip_layerwise_casting_patterns;
  // Class names of the blocks that repeat: the groups of block_level offloading are found through
  // ModuleLists, as diffusers does.
  std::vector<std::string> repeated_blocks;
  // checkpoint key -> the parameter it shares memory with.
  std::map<std::string, std::string> tied_keys;
  bool supports_gradient_checkpointing = false;
};

struct Workload;
struct Costs;

// Thread-safety: one forward at a time.
class Model : public nn::Module {
 public:
  // The Python class name ("FluxTransformer2DModel"), and the library it belongs to: "diffusers" or
  // "transformers" (decides file names and the spelling of config.json).
  virtual std::string class_name() const = 0;
  virtual std::string library() const { return "diffusers"; }
  virtual nlohmann::ordered_json config_json() const = 0;
  virtual Traits traits() const { return {}; }

  // Entries besides "forward" that forward_named() takes ("encode", "decode").
  virtual std::vector<std::string> methods() const { return {"forward"}; }
  // Runs `method` on named tensors. Arguments that are no tensors come as JSON under their Python
  // names. Throws ArgumentError for a missing or unknown input, naming those expected.
  virtual NamedTensors forward_named(const std::string& method, const NamedTensors& inputs,
                                     const nlohmann::json& arguments) = 0;

  // Modules (dotted) that `method` with these arguments does not call, so that their weights need
  // not be read.
  virtual std::vector<std::string> unused_modules(const std::string& method,
                                                  const nlohmann::json& arguments) const {
    return {};
  }

  // What a run costs beside its weights (models/costs.h), for planning. Needs no weights. The
  // default is rough: every weight meets every token, and a token is alive as often as sixteen
  // times the narrower side of the largest matrix.
  virtual Costs costs(const Workload& workload) const;

  // Checkpoint key -> parameter name; empty drops the key silently. The default keeps it.
  virtual std::string map_key(const std::string& checkpoint_key) const { return checkpoint_key; }

  // dtype of the first floating-point parameter (diffusers' `dtype`); float8 is no such.
  at::ScalarType dtype() const;
  at::Device device() const;

  // Where the weights come from; null for a model made in memory. Set by from_pretrained().
  const std::shared_ptr<weights::Binding>& binding() const { return binding_; }
  void set_binding(std::shared_ptr<weights::Binding> binding);
  // Reads all weights that are still stubs into memory of their own. A model from from_pretrained()
  // does this by itself at its first call unless offloading was enabled before. Throws IoError, and
  // Cancelled between two tensors after a stop; what was read by then stays, a further call reads
  // the rest.
  void load_weights(const StopToken& stop = {});
  bool weights_loaded() const;
  // What stops the load of a first call.
  void set_load_stop(StopToken stop) { load_stop_ = std::move(stop); }

  // Attention backend of every attention module below: "native", "math", …
  // (nn/attention_dispatch.h)
  void set_attention_backend(const std::string& backend);
  // The processor of every attention module, by the module's dotted path (diffusers'
  // `attn_processors`).
  std::map<std::string, std::string> attn_processors() const;
  // The same for all. Throws ArgumentError, and changes nothing, if a module does not have it.
  void set_attn_processor(const std::string& name);
  // Joins query, key and value projections of all attention modules, or parts them again. Throws
  // ArgumentError if the weights are not loaded.
  void fuse_qkv_projections();
  void unfuse_qkv_projections();

  // Keeps weights in `storage_dtype` and computes in the dtype of the activations, as diffusers'
  // method of this name (hooks/layerwise_casting.h). skip: patterns in place of diffusers' default
  // ones; those that the model declares are skipped in any case. Returns how many layers were cast.
  size_t enable_layerwise_casting(at::ScalarType storage_dtype = at::kFloat8_e4m3fn,
                                  std::optional<std::vector<std::string>> skip = {});

  // Writes config.json and the weights, sharded above `max_shard_size_bytes`, so that Python reads
  // them back. Offloaded weights are read as they go. Files appear whole or not at all, config.json
  // last. Throws IoError, ArgumentError (a weight that is nowhere).
  void save_pretrained(const std::filesystem::path& folder,
                       uint64_t max_shard_size_bytes = kMaxShardSizeBytes,
                       const std::string& variant = "");
  // The same with weights from elsewhere: `write` passes the bytes of each slot to the writer.
  // Returns how many files hold the weights.
  size_t save_pretrained_from(const WriteSlot& write, const std::filesystem::path& folder,
                              uint64_t max_shard_size_bytes = kMaxShardSizeBytes,
                              const std::string& variant = "");
  // All weights as one safetensors file for whoever keeps its bytes; `where` names that place in
  // errors.
  void write_safetensors(const WriteSlot& write, io::SafetensorsWriter::Sink sink,
                         const std::string& where);
  // "diffusion_pytorch_model" or "model": how the weights' file names begin.
  std::string weights_base() const;

  // huggingface_hub's default.
  static constexpr uint64_t kMaxShardSizeBytes = 10'000'000'000;

 protected:
  // Throws ArgumentError unless `method` is one of methods().
  void check_method(const std::string& method) const;

 private:
  std::vector<std::pair<std::string, nn::AttentionModule*>> attention_modules() const;

  std::shared_ptr<weights::Binding> binding_;
  StopToken load_stop_;
};

// One layer, after it was quantized.
struct QuantizedLayer {
  std::string name;
  uint64_t bytes_before = 0, bytes_after = 0;
  // Signal-to-quantization-noise ratio in decibels: 10 log10(sum w^2 / sum (w - dequantized)^2).
  double sqnr_db = 0;
};

// How to quantize a model that is not (quantizing.h).
struct QuantizeOptions {
  std::string scheme;      // quant/registry.h: "int8wo"
  int64_t group_size = 0;  // 0: the scheme's
  // Layers that stay as they are: a layer's dotted name, or dotted parts of it, as diffusers'
  // modules_to_not_convert ("proj_out", "transformer_blocks.0.attn").
  std::vector<std::string> skip = {};
  StopToken stop = {};
  // Called after each of `layer_count` layers.
  std::function<void(const QuantizedLayer& layer, size_t layer_count)> on_layer = {};
};

struct LoadOptions {
  // Unset keeps each tensor's stored dtype; set casts all but keep_in_fp32_modules.
  std::optional<at::ScalarType> dtype = {};
  // "fp16" reads diffusion_pytorch_model.fp16.safetensors.
  std::string variant = {};
  // Read all weights now rather than at the first call.
  bool load_now = false;
  // Read the weights from this lossless pack of the checkpoint (weights/lossless_pack.h). A pack of
  // another checkpoint is refused; a folder without weights of its own takes any that fits.
  std::filesystem::path pack = {};
  // Read them from the checkpoint's pack in the pack cache, if there is one; streaming goes back to
  // the checkpoint where that turns out faster.
  bool use_packs = false;
  // Quantize the linear layers' weights; kept in the pack cache, so that it is done once.
  std::optional<QuantizeOptions> quantize = {};
};

// Makes the model that `folder`/config.json names and binds it to the checkpoint beside it. Reads
// headers only. `class_name` overrides the config's (`_class_name`, or `architectures` of
// transformers). Throws FormatError (config, header; all missing, unexpected and mis-shaped keys at
// once; sizes that do not fit), IoError, ArgumentError (a class ferry does not have, naming those
// it has).
std::shared_ptr<Model> load_model(const std::filesystem::path& folder,
                                  const LoadOptions& options = {},
                                  const std::string& class_name = "");

// The registry: an explicit table in registry.cpp, a line a class.
struct ModelClass {
  std::string_view name;
  std::function<std::shared_ptr<Model>(const nlohmann::ordered_json& config,
                                       const std::string& where)>
      make;
};
const std::vector<ModelClass>& model_classes();
// Without weights: all parameters are stubs. Throws FormatError (values of a wrong type),
// ArgumentError (a class ferry does not have, sizes that do not fit), both naming `where`.
std::shared_ptr<Model> make_model(const std::string& class_name,
                                  const nlohmann::ordered_json& config,
                                  const std::string& where = "config");

}  // namespace ferry::models
