#include "ferry/nn/attention_dispatch.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <fmt/ranges.h>

#include <array>
#include <cstdlib>
#include <limits>

#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/nn/attention_kernel.h"
#include "ferry/nn/linear_kernels.h"
#include "ferry/weights/stub.h"

namespace ferry::nn {

namespace {

// Arguments in the kernels' layout, [batch, heads, tokens, head_dim].
struct Call {
  at::Tensor q, k, v;
  std::optional<at::Tensor> mask;
  std::optional<double> scale;
  bool is_causal;
  bool enable_gqa;
};

bool half_precision(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16;
}

// The kernels below want an additive mask of the query's dtype; the native entry converts itself.
void make_mask_additive(Call& call) {
  if (!call.mask || call.mask->scalar_type() != at::kBool) return;
  call.mask = at::zeros_like(*call.mask, call.q.options())
                  .masked_fill_(call.mask->logical_not(), -std::numeric_limits<double>::infinity());
}

void repeat_key_heads(Call& call) {
  if (!call.enable_gqa || call.k.size(1) == call.q.size(1)) return;
  int64_t repeats = call.q.size(1) / call.k.size(1);
  call.k = call.k.repeat_interleave(repeats, 1);
  call.v = call.v.repeat_interleave(repeats, 1);
}

bool suits_bf16_attention(const Call& call) {
  return call.q.is_cpu() && call.q.scalar_type() == at::kBFloat16 && !call.mask &&
         !call.is_causal && !records_gradient(call.q, call.k, call.v) &&
         call.k.size(1) == call.q.size(1) && call.q.size(3) % 2 == 0 && call.q.numel() > 0 &&
         call.k.numel() > 0 && has_bf16_attention();
}

at::Tensor run_native(Call& call) {
  if (suits_bf16_attention(call)) return attention_on_cpu(call.q, call.k, call.v, call.scale);
  return at::scaled_dot_product_attention(call.q, call.k, call.v, call.mask, 0.0, call.is_causal,
                                          call.scale, call.enable_gqa);
}

at::Tensor run_math(Call& call) {
  make_mask_additive(call);
  return std::get<0>(at::_scaled_dot_product_attention_math(
      call.q, call.k, call.v, call.mask, 0.0, call.is_causal, {}, call.scale, call.enable_gqa));
}

at::Tensor run_flash(Call& call) {
  repeat_key_heads(call);
  if (suits_bf16_attention(call)) return attention_on_cpu(call.q, call.k, call.v, call.scale);
  if (call.q.is_cpu()) {
    make_mask_additive(call);
    return std::get<0>(at::_scaled_dot_product_flash_attention_for_cpu(
        call.q, call.k, call.v, 0.0, call.is_causal, call.mask, call.scale));
  }
  return std::get<0>(at::_scaled_dot_product_flash_attention(call.q, call.k, call.v, 0.0,
                                                             call.is_causal, false, call.scale));
}

at::Tensor run_efficient(Call& call) {
  repeat_key_heads(call);
  make_mask_additive(call);
  if (call.mask) {
    // The kernel wants a full mask whose rows start at multiples of 16 elements.
    int64_t keys = call.k.size(2);
    at::Tensor mask = call.mask->expand({call.q.size(0), call.q.size(1), call.q.size(2), keys});
    if (keys % 16 != 0) mask = at::constant_pad_nd(mask, {0, 16 - keys % 16}).slice(-1, 0, keys);
    call.mask = mask;
  }
  bool with_lse = at::GradMode::is_enabled() && call.q.requires_grad();
  return std::get<0>(at::_scaled_dot_product_efficient_attention(
      call.q, call.k, call.v, call.mask, with_lse, 0.0, call.is_causal, call.scale));
}

at::Tensor run_cudnn(Call& call) {
  repeat_key_heads(call);
  make_mask_additive(call);
  bool with_lse = at::GradMode::is_enabled() && call.q.requires_grad();
  return std::get<0>(at::_scaled_dot_product_cudnn_attention(
      call.q.contiguous(), call.k.contiguous(), call.v.contiguous(), call.mask, with_lse, 0.0,
      call.is_causal, false, call.scale));
}

// The constraints of each backend; the first that does not hold is the error's text.
struct BackendRow {
  AttentionBackend backend;
  std::string_view name;
  at::Tensor (*run)(Call&);
  bool on_cpu, on_cuda, on_other;
  bool half_only_on_cuda;
  bool mask_on_cuda;
  bool causal_with_mask;
  int64_t max_head_dim_on_cuda;  // 0: no limit
  int64_t head_dim_multiple_on_cuda;
};
constexpr std::array<BackendRow, 5> kBackends{{
    {AttentionBackend::native, "native", run_native, true, true, true, false, true, false, 0, 1},
    {AttentionBackend::math, "_native_math", run_math, true, true, true, false, true, false, 0, 1},
    {AttentionBackend::flash, "_native_flash", run_flash, true, true, false, true, false, false,
     256, 8},
    {AttentionBackend::efficient, "_native_efficient", run_efficient, false, true, false, false,
     true, false, 0, 8},
    {AttentionBackend::cudnn, "_native_cudnn", run_cudnn, false, true, false, true, true, false,
     128, 8},
}};

const BackendRow& row_of(AttentionBackend backend) {
  return kBackends[static_cast<size_t>(backend)];
}

// Empty if the backend can do it.
std::string why_not(const BackendRow& row, const AttentionFacts& facts) {
  bool cpu = facts.device == at::kCPU, cuda = facts.device == at::kCUDA;
  if (!(cpu ? row.on_cpu : cuda ? row.on_cuda : row.on_other)) {
    return fmt::format("it has no kernel for the device '{}'",
                       at::DeviceTypeName(facts.device, true));
  }
  if (facts.has_mask && facts.is_causal && !row.causal_with_mask) {
    return "a mask and is_causal exclude each other";
  }
  if (!cuda) return "";
  if (row.half_only_on_cuda && !half_precision(facts.dtype)) {
    return fmt::format("it needs bfloat16 or float16, got {}", c10::toString(facts.dtype));
  }
  if (facts.has_mask && !row.mask_on_cuda) return "it takes no mask";
  if (row.max_head_dim_on_cuda && facts.head_dim > row.max_head_dim_on_cuda) {
    return fmt::format("it takes head dimensions up to {}, got {}", row.max_head_dim_on_cuda,
                       facts.head_dim);
  }
  if (facts.head_dim % row.head_dim_multiple_on_cuda != 0) {
    return fmt::format("it takes head dimensions that are multiples of {}, got {}",
                       row.head_dim_multiple_on_cuda, facts.head_dim);
  }
  return "";
}

// Elsewhere, torch's native entry looks for kernels that the device would have to bring.
bool has_native_attention(at::DeviceType type) {
  switch (type) {
    case at::kCPU:
    case at::kCUDA:
    case at::kXPU:
    case at::kMPS:
      return true;
    case at::kPrivateUse1: {
      static const auto native =
          c10::Dispatcher::singleton().findSchemaOrThrow("aten::scaled_dot_product_attention", "");
      return native.hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1);
    }
    default:
      return false;
  }
}

std::optional<AttentionBackend> environment_backend() {
  static const std::optional<AttentionBackend> backend = []() -> std::optional<AttentionBackend> {
    const char* name = std::getenv("FERRY_ATTENTION_BACKEND");
    if (!name || !*name) return std::nullopt;
    AttentionBackend parsed = parse_attention_backend(name);
    log::debug("attention backend {} (FERRY_ATTENTION_BACKEND)", attention_backend_name(parsed));
    return parsed;
  }();
  return backend;
}

void check_shapes(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const AttentionOptions& options) {
  bool fits = q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.size(0) == k.size(0) &&
              k.size(0) == v.size(0) && q.size(3) == k.size(3) && k.size(1) == v.size(1) &&
              k.size(2) == v.size(2) &&
              (q.size(2) == k.size(2) || (options.enable_gqa && q.size(2) % k.size(2) == 0));
  if (!fits) {
    throw_error<ArgumentError>(
        "attention: query {}, key {} and value {} do not fit; expected [batch, tokens, heads, "
        "head_dim] with equal batch and head_dim",
        fmt::join(q.sizes(), "x"), fmt::join(k.sizes(), "x"), fmt::join(v.sizes(), "x"));
  }
  if (q.device() != k.device() || q.device() != v.device() || q.scalar_type() != k.scalar_type() ||
      q.scalar_type() != v.scalar_type()) {
    throw_error<ArgumentError>("attention: query, key and value differ in device or dtype");
  }
  if (options.mask.defined() && options.mask.size(-1) != k.size(1) && options.mask.size(-1) != 1) {
    throw_error<ArgumentError>("attention: mask {} does not fit {} key tokens",
                               fmt::join(options.mask.sizes(), "x"), k.size(1));
  }
}

}  // namespace

AttentionBackend parse_attention_backend(const std::string& name) {
  std::string known;
  for (const BackendRow& row : kBackends) {
    if (name == row.name || "_native_" + name == row.name) return row.backend;
    known += known.empty() ? "" : ", ";
    known += row.name;
  }
  throw_error<ArgumentError>("attention backend '{}' is unknown; known are {}", name, known);
}

std::string_view attention_backend_name(AttentionBackend backend) {
  return row_of(backend).name;
}

AttentionChoice choose_attention_backend(std::optional<AttentionBackend> requested,
                                         const AttentionFacts& facts) {
  AttentionBackend backend = requested.value_or(AttentionBackend::native);
  std::string obstacle = why_not(row_of(backend), facts);
  if (!obstacle.empty()) {
    throw_error<ArgumentError>("attention backend {} cannot be used: {}; 'native' always can",
                               attention_backend_name(backend), obstacle);
  }
  if (backend == AttentionBackend::native && !has_native_attention(facts.device)) {
    return {backend, AttentionBackend::math, "the device has no attention kernels of its own"};
  }
  return {backend, backend, requested ? "as asked for" : "the default"};
}

at::Tensor dispatch_attention(const at::Tensor& query, const at::Tensor& key,
                              const at::Tensor& value, const AttentionOptions& options) {
  check_shapes(query, key, value, options);
  AttentionFacts facts{query.device().type(), query.scalar_type(), query.size(3),
                       options.mask.defined(), options.is_causal};
  AttentionChoice choice =
      choose_attention_backend(options.backend ? options.backend : environment_backend(), facts);

  Call call{query.permute({0, 2, 1, 3}),
            key.permute({0, 2, 1, 3}),
            value.permute({0, 2, 1, 3}),
            optional_tensor(options.mask),
            options.scale,
            options.is_causal,
            options.enable_gqa};
  if (call.mask && call.mask->dim() == 2 && call.mask->size(0) == query.size(0) &&
      call.mask->size(1) == key.size(1)) {
    call.mask = call.mask->unsqueeze(1).unsqueeze(1);  // [batch, 1, 1, key tokens]
  }
  // Where half precision is slow in linear layers, it is in attention: the products go to float32.
  bool upcast =
      choose_linear_kernel(query.device(), facts.dtype).kernel == LinearKernel::upcast_blocks;
  if (upcast) {
    for (at::Tensor* tensor : {&call.q, &call.k, &call.v}) *tensor = tensor->to(at::kFloat);
    if (call.mask && call.mask->is_floating_point()) call.mask = call.mask->to(at::kFloat);
  }
  at::Tensor out = row_of(choice.effective).run(call);
  if (upcast) out = out.to(facts.dtype);
  return out.permute({0, 2, 1, 3});
}

void AttentionModule::set_attention_backend(const std::string& backend) {
  attention_backend_ = parse_attention_backend(backend);
}

Ptr<Linear> AttentionModule::fuse_linears(const std::vector<Ptr<Linear>>& parts) {
  at::NoGradGuard no_grad;
  int64_t out = 0;
  bool with_bias = parts.front()->bias.defined();
  std::vector<at::Tensor> weights, biases;
  for (const auto& part : parts) {
    if (part->quantized_weight()) {
      throw_error<ArgumentError>(
          "fuse_projections: got weights stored as {}, expected plain ones: quantized projections "
          "stay apart",
          part->quantized_weight()->scheme());
    }
    if (weights::is_stub(part->weight)) {
      throw_error<ArgumentError>(
          "fuse_projections: the weights are not loaded; call load_weights() first, and fuse "
          "before "
          "offloading is enabled");
    }
    out += part->out_features();
    weights.push_back(part->weight);
    if (with_bias) biases.push_back(part->bias);
  }
  auto fused = make<Linear>(parts.front()->in_features(), out, with_bias);
  fused->weight.set_data(at::cat(weights));
  if (with_bias) fused->bias.set_data(at::cat(biases));
  int64_t begin = 0;
  for (const auto& part : parts) {
    part->weight.set_data(fused->weight.detach().narrow(0, begin, part->out_features()));
    if (with_bias) part->bias.set_data(fused->bias.detach().narrow(0, begin, part->out_features()));
    begin += part->out_features();
  }
  return fused;
}

}  // namespace ferry::nn
