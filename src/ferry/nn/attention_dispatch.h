// The one way from a model to an attention kernel (diffusers models/attention_dispatch.py).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ferry/nn/linear.h"

namespace ferry::nn {

enum class AttentionBackend { native, math, flash, efficient, cudnn };

// Accepts diffusers' names ("native", "_native_math", "_native_flash", "_native_efficient",
// "_native_cudnn") and the same without "_native_". Throws ArgumentError listing what is known.
AttentionBackend parse_attention_backend(const std::string& name);
// diffusers' name.
std::string_view attention_backend_name(AttentionBackend backend);

// Room for a split of one attention over devices; empty for now.
struct ParallelConfig {};

struct AttentionOptions {
  // bool (true attends) or additive; [batch, key tokens], or broadcastable to
  // [batch, heads, query tokens, key tokens]. Undefined: none.
  at::Tensor mask = {};
  // Unset: 1 / sqrt(head_dim).
  std::optional<double> scale = std::nullopt;
  bool is_causal = false;
  // Fewer key and value heads than query heads.
  bool enable_gqa = false;
  // Unset: FERRY_ATTENTION_BACKEND, else native.
  std::optional<AttentionBackend> backend = std::nullopt;
  const ParallelConfig* parallel_config = nullptr;
};

// query [batch, query tokens, heads, head_dim], key and value [batch, key tokens, heads, head_dim]
// -> [batch, query tokens, heads, head_dim] (a view that may be non-contiguous).
// Throws ArgumentError if the backend that was asked for cannot do it, saying why.
at::Tensor dispatch_attention(const at::Tensor& query, const at::Tensor& key,
                              const at::Tensor& value, const AttentionOptions& options = {});

// What decides whether a backend can be used.
struct AttentionFacts {
  at::DeviceType device = at::kCPU;
  at::ScalarType dtype = at::kFloat;
  int64_t head_dim = 64;
  bool has_mask = false;
  bool is_causal = false;
};
struct AttentionChoice {
  AttentionBackend requested, effective;
  std::string reason;
};
// Pure. Unset asks for native. Native becomes math on devices that have no kernels of their own.
// Throws ArgumentError as dispatch_attention() does.
AttentionChoice choose_attention_backend(std::optional<AttentionBackend> requested,
                                         const AttentionFacts& facts);

// The base of attention modules; the model's file has the module and its processors.
class AttentionModule : public Module {
 public:
  // Overrides FERRY_ATTENTION_BACKEND for this module. Throws ArgumentError for an unknown name.
  void set_attention_backend(const std::string& backend);
  const std::optional<AttentionBackend>& attention_backend() const { return attention_backend_; }

  // Names of the processor classes that this module can use, the default first.
  virtual std::vector<std::string> available_processors() const = 0;
  virtual std::string processor_name() const = 0;
  // By name. Throws ArgumentError listing available_processors().
  virtual void set_processor(const std::string& name) = 0;

  // Joins the query, key and value projections into one each ("to_qkv", …). The single projections
  // stay, as views of the joined one. Throws ArgumentError if the weights are not loaded.
  virtual void fuse_projections() {}
  virtual void unfuse_projections() {}
  bool fused_projections() const { return fused_projections_; }

 protected:
  static Ptr<Linear> fuse_linears(const std::vector<Ptr<Linear>>& parts);
  void set_fused_projections(bool fused) { fused_projections_ = fused; }

 private:
  std::optional<AttentionBackend> attention_backend_;
  bool fused_projections_ = false;
};

}  // namespace ferry::nn
