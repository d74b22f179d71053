#include "ferry/models/key_maps.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>

#include "ferry/base/error.h"

namespace ferry::models {

namespace {

using quant::StoredQuantized;
using quant::StoredWeights;
using weights::StoredTensor;

struct Range {
  uint64_t offset, size;
};

// Some ranges of a tensor's bytes, one behind the other, as a tensor of their own.
class Ranges : public weights::Encoding {
 public:
  // `whole_bytes`: of the tensor that the ranges are of, decoded.
  Ranges(std::shared_ptr<const weights::Encoding> inner, uint64_t whole_bytes,
         std::vector<Range> ranges)
      : inner_(std::move(inner)), whole_bytes_(whole_bytes), ranges_(std::move(ranges)) {}

  std::string_view name() const override {
    return inner_ ? inner_->name() : "rows in another order";
  }

  void decode(std::span<const std::byte> stored, std::span<std::byte> into) const override {
    std::vector<std::byte> whole;
    if (inner_) {
      whole.resize(whole_bytes_);
      inner_->decode(stored, whole);
      stored = whole;
    }
    for (const Range& range : ranges_) {
      std::memcpy(into.data(), stored.data() + range.offset, range.size);
      into = into.subspan(range.size);
    }
  }

 private:
  std::shared_ptr<const weights::Encoding> inner_;
  uint64_t whole_bytes_;
  std::vector<Range> ranges_;
};

// A weight under its name in the file: plain, or quantized.
struct Weight {
  std::string name;
  const StoredTensor* plain = nullptr;
  const StoredQuantized* quantized = nullptr;

  at::IntArrayRef shape() const {
    return plain ? at::IntArrayRef(plain->shape) : quantized->weight->shape();
  }
  int64_t rows() const { return shape().empty() ? 0 : shape()[0]; }
  const StoredTensor& any() const { return plain ? *plain : quantized->components.front(); }
};

// Collects weights under their new names.
class Mapped {
 public:
  void put(const Weight& weight, const std::string& name) {
    if (weight.plain) {
      put(*weight.plain, name);
    } else {
      put(*weight.quantized, name);
    }
  }
  void put_rows(const Weight& weight, const std::string& name, int64_t first, int64_t count) {
    if (weight.plain) return put(rows_of(*weight.plain, first, count), name);
    const StoredQuantized& whole = *weight.quantized;
    put(whole.weight->rows_of(whole.components, first, count), name);
  }
  // In equal parts, one a name.
  void put_parts(const Weight& weight, const std::vector<std::string>& names) {
    const auto parts = static_cast<int64_t>(names.size());
    if (weight.rows() % parts != 0) {
      throw_error<FormatError>("{}: '{}' has {} rows, expected a multiple of {}",
                               weight.any().file->path().string(), weight.name, weight.rows(),
                               parts);
    }
    const int64_t count = weight.rows() / parts;
    for (int64_t i = 0; i < parts; ++i) put_rows(weight, names[i], i * count, count);
  }
  void put_swapped(const Weight& weight, const std::string& name) {
    if (weight.plain) return put(swap_halves(*weight.plain), name);
    StoredQuantized swapped = *weight.quantized;
    for (size_t i = 0; i < swapped.components.size(); ++i) {
      const std::vector<int64_t>& shape = swapped.weight->components()[i].shape;
      int64_t elements = 1;
      for (int64_t extent : shape) elements *= extent;
      if (elements == 1) continue;  // of the whole weight
      if (shape.empty() || shape[0] != weight.rows()) {
        throw_error<FormatError>("{}: '{}' is stored as {}, whose rows ferry cannot reorder",
                                 weight.any().file->path().string(), weight.name,
                                 swapped.weight->scheme());
      }
      swapped.components[i] = swap_halves(swapped.components[i]);
    }
    put(std::move(swapped), name);
  }

  StoredWeights take() { return std::move(weights_); }

 private:
  void put(StoredTensor tensor, const std::string& name) {
    tensor.key = name;
    weights_.plain.push_back(std::move(tensor));
  }
  void put(StoredQuantized weight, const std::string& name) {
    if (weights_.quantized.contains(name)) {
      throw_error<FormatError>("{}: two tensors are '{}'",
                               weight.components.front().file->path().string(), name);
    }
    for (size_t i = 0; i < weight.components.size(); ++i)
      weight.components[i].key = name + "_" + weight.weight->components()[i].name;
    weights_.quantized.emplace(name, std::move(weight));
  }

  StoredWeights weights_;
};

void each_weight(const StoredWeights& weights, const std::function<void(const Weight&)>& visit) {
  for (const StoredTensor& tensor : weights.plain) visit({tensor.key, &tensor, nullptr});
  for (const auto& [name, quantized] : weights.quantized) visit({name, nullptr, &quantized});
}

// "double_blocks.3.img_mod.lin.weight" with "double_blocks." -> "3" and "img_mod.lin.weight".
struct Numbered {
  std::string number, rest;
};
std::optional<Numbered> numbered(std::string_view name, std::string_view prefix) {
  if (!name.starts_with(prefix)) return std::nullopt;
  name.remove_prefix(prefix.size());
  size_t digits = name.find_first_not_of("0123456789");
  if (digits == 0 || digits == std::string_view::npos || digits > 9 || name[digits] != '.')
    return std::nullopt;
  return Numbered{std::string(name.substr(0, digits)), std::string(name.substr(digits + 1))};
}

using Renames = std::vector<std::pair<std::string_view, std::string_view>>;

// Replaces the beginning of `name` by the first of `renames` that it has, up to a dot or the end.
std::optional<std::string> renamed(const std::string& name, const Renames& renames) {
  for (const auto& [from, to] : renames) {
    if (!name.starts_with(from)) continue;
    std::string_view rest = std::string_view(name).substr(from.size());
    if (rest.empty() || rest.front() == '.') return std::string(to) + std::string(rest);
  }
  return std::nullopt;
}

// ---- Flux ----

const Renames kFlux = {
    {"time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"},
    {"time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"},
    {"vector_in.in_layer", "time_text_embed.text_embedder.linear_1"},
    {"vector_in.out_layer", "time_text_embed.text_embedder.linear_2"},
    {"guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"},
    {"guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"},
    {"txt_in", "context_embedder"},
    {"img_in", "x_embedder"},
    {"final_layer.linear", "proj_out"},
};
const Renames kFluxDouble = {
    {"img_mod.lin", "norm1.linear"},
    {"txt_mod.lin", "norm1_context.linear"},
    {"img_attn.norm.query_norm.scale", "attn.norm_q.weight"},
    {"img_attn.norm.key_norm.scale", "attn.norm_k.weight"},
    {"txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight"},
    {"txt_attn.norm.key_norm.scale", "attn.norm_added_k.weight"},
    {"img_mlp.0", "ff.net.0.proj"},
    {"img_mlp.2", "ff.net.2"},
    {"txt_mlp.0", "ff_context.net.0.proj"},
    {"txt_mlp.2", "ff_context.net.2"},
    {"img_attn.proj", "attn.to_out.0"},
    {"txt_attn.proj", "attn.to_add_out"},
};
const Renames kFluxSingle = {
    {"modulation.lin", "norm.linear"},
    {"norm.query_norm.scale", "attn.norm_q.weight"},
    {"norm.key_norm.scale", "attn.norm_k.weight"},
    {"linear2", "proj_out"},
};

// ".weight" of "img_attn.qkv.weight" for "img_attn.qkv".
std::optional<std::string> suffix_of(const std::string& name, std::string_view stem) {
  if (!name.starts_with(stem) || name.size() == stem.size() || name[stem.size()] != '.')
    return std::nullopt;
  return name.substr(stem.size());
}

void map_double_block(const Weight& weight, const Numbered& block, Mapped& out) {
  const std::string prefix = "transformer_blocks." + block.number + ".";
  if (auto suffix = suffix_of(block.rest, "img_attn.qkv")) {
    out.put_parts(weight, {prefix + "attn.to_q" + *suffix, prefix + "attn.to_k" + *suffix,
                           prefix + "attn.to_v" + *suffix});
  } else if (auto suffix = suffix_of(block.rest, "txt_attn.qkv")) {
    out.put_parts(weight,
                  {prefix + "attn.add_q_proj" + *suffix, prefix + "attn.add_k_proj" + *suffix,
                   prefix + "attn.add_v_proj" + *suffix});
  } else if (auto name = renamed(block.rest, kFluxDouble)) {
    out.put(weight, prefix + *name);
  } else {
    out.put(weight, weight.name);
  }
}

// linear1 is query, key, value and the feed-forward's first layer.
void map_single_block(const Weight& weight, const Numbered& block, int64_t inner_dim, Mapped& out) {
  const std::string prefix = "single_transformer_blocks." + block.number + ".";
  if (auto suffix = suffix_of(block.rest, "linear1")) {
    if (weight.rows() <= 3 * inner_dim) {
      throw_error<FormatError>("{}: '{}' has {} rows, expected more than three times {}",
                               weight.any().file->path().string(), weight.name, weight.rows(),
                               inner_dim);
    }
    int64_t first = 0;
    for (const char* part : {"attn.to_q", "attn.to_k", "attn.to_v"}) {
      out.put_rows(weight, prefix + part + *suffix, first, inner_dim);
      first += inner_dim;
    }
    out.put_rows(weight, prefix + "proj_mlp" + *suffix, first, weight.rows() - first);
  } else if (auto name = renamed(block.rest, kFluxSingle)) {
    out.put(weight, prefix + *name);
  } else {
    out.put(weight, weight.name);
  }
}

// ---- autoencoder ----

const Renames kAutoencoder = {
    {"encoder.norm_out", "encoder.conv_norm_out"},
    {"decoder.norm_out", "decoder.conv_norm_out"},
    {"encoder.mid.block_1", "encoder.mid_block.resnets.0"},
    {"encoder.mid.block_2", "encoder.mid_block.resnets.1"},
    {"decoder.mid.block_1", "decoder.mid_block.resnets.0"},
    {"decoder.mid.block_2", "decoder.mid_block.resnets.1"},
    {"encoder.mid.attn_1", "encoder.mid_block.attentions.0"},
    {"decoder.mid.attn_1", "decoder.mid_block.attentions.0"},
};
const Renames kAutoencoderAttention = {
    {"norm", "group_norm"}, {"q", "to_q"}, {"k", "to_k"}, {"v", "to_v"}, {"proj_out", "to_out.0"},
};

// The parts of "encoder.down.1.block.0.norm1.weight" behind "encoder.down.1.".
std::string autoencoder_block(const std::string& rest) {
  if (auto resnet = numbered(rest, "block.")) {
    std::string name = "resnets." + resnet->number + "." + resnet->rest;
    if (size_t at = name.find("nin_shortcut"); at != std::string::npos)
      name.replace(at, std::strlen("nin_shortcut"), "conv_shortcut");
    return name;
  }
  return renamed(rest, {{"downsample.conv", "downsamplers.0.conv"},
                        {"upsample.conv", "upsamplers.0.conv"}})
      .value_or(rest);
}

// 1x1 convolutions of the attention are linear layers in diffusers.
Weight without_kernel(const Weight& weight, StoredTensor& holder) {
  if (!weight.plain || weight.plain->shape.size() < 3) return weight;
  holder = *weight.plain;
  while (holder.shape.size() > 2 && holder.shape.back() == 1) holder.shape.pop_back();
  return {weight.name, &holder, nullptr};
}

// ---- T5 ----

const Renames kT5 = {
    {"token_embd", "shared"},
    {"enc.output_norm", "encoder.final_layer_norm"},
};
const Renames kT5Block = {
    {"attn_q", "layer.0.SelfAttention.q"},
    {"attn_k", "layer.0.SelfAttention.k"},
    {"attn_v", "layer.0.SelfAttention.v"},
    {"attn_o", "layer.0.SelfAttention.o"},
    {"attn_rel_b", "layer.0.SelfAttention.relative_attention_bias"},
    {"attn_norm", "layer.0.layer_norm"},
    {"ffn_gate", "layer.1.DenseReluDense.wi_0"},
    {"ffn_down", "layer.1.DenseReluDense.wo"},
    {"ffn_norm", "layer.1.layer_norm"},
};

StoredWeights as_it_is(const StoredWeights& weights) {
  Mapped out;
  each_weight(weights, [&](const Weight& weight) { out.put(weight, weight.name); });
  return out.take();
}

uint64_t row_bytes(const StoredTensor& stored) {
  return stored.shape.empty() || stored.shape[0] == 0
             ? 0
             : stored.plain_bytes() / static_cast<uint64_t>(stored.shape[0]);
}

}  // namespace

StoredTensor rows_of(const StoredTensor& stored, int64_t first, int64_t count) {
  const uint64_t bytes = row_bytes(stored);
  StoredTensor rows = stored;
  rows.shape.at(0) = count;
  if (!stored.encoding) {
    rows.offset += static_cast<uint64_t>(first) * bytes;
    rows.size_bytes = static_cast<uint64_t>(count) * bytes;
    return rows;
  }
  rows.encoding =
      std::make_shared<Ranges>(stored.encoding, stored.plain_bytes(),
                               std::vector<Range>{{static_cast<uint64_t>(first) * bytes,
                                                   static_cast<uint64_t>(count) * bytes}});
  return rows;
}

StoredTensor swap_halves(const StoredTensor& stored) {
  if (stored.shape.empty() || stored.shape[0] % 2 != 0) {
    throw_error<FormatError>("{}: '{}': expected an even number of rows",
                             stored.file->path().string(), stored.key);
  }
  const uint64_t half = static_cast<uint64_t>(stored.shape[0]) / 2 * row_bytes(stored);
  StoredTensor swapped = stored;
  swapped.encoding = std::make_shared<Ranges>(stored.encoding, stored.plain_bytes(),
                                              std::vector<Range>{{half, half}, {0, half}});
  return swapped;
}

StoredWeights map_flux(const StoredWeights& weights) {
  int64_t inner_dim = 0;
  each_weight(weights, [&](const Weight& weight) {
    if (weight.name == "img_in.weight") inner_dim = weight.rows();
  });
  Mapped out;
  each_weight(weights, [&](const Weight& weight) {
    if (auto block = numbered(weight.name, "double_blocks.")) {
      map_double_block(weight, *block, out);
    } else if (auto single = numbered(weight.name, "single_blocks.")) {
      map_single_block(weight, *single, inner_dim, out);
    } else if (auto suffix = suffix_of(weight.name, "final_layer.adaLN_modulation.1")) {
      // Shift and scale here, scale and shift in diffusers.
      out.put_swapped(weight, "norm_out.linear" + *suffix);
    } else {
      out.put(weight, renamed(weight.name, kFlux).value_or(weight.name));
    }
  });
  return out.take();
}

StoredWeights map_autoencoder(const StoredWeights& weights) {
  int64_t up_blocks = 0;
  each_weight(weights, [&](const Weight& weight) {
    if (auto block = numbered(weight.name, "decoder.up."))
      up_blocks = std::max<int64_t>(up_blocks, std::stoll(block->number) + 1);
  });
  Mapped out;
  each_weight(weights, [&](const Weight& weight) {
    StoredTensor holder;
    if (auto down = numbered(weight.name, "encoder.down.")) {
      out.put(weight, "encoder.down_blocks." + down->number + "." + autoencoder_block(down->rest));
      return;
    }
    if (auto up = numbered(weight.name, "decoder.up.")) {
      // Counted from the picture here, from the latents in diffusers.
      const int64_t block = up_blocks - 1 - std::stoll(up->number);
      out.put(weight, fmt::format("decoder.up_blocks.{}.{}", block, autoencoder_block(up->rest)));
      return;
    }
    for (std::string part : {"encoder", "decoder"}) {
      const std::string attention = part + ".mid.attn_1.";
      if (!weight.name.starts_with(attention)) continue;
      std::string rest = weight.name.substr(attention.size());
      out.put(
          without_kernel(weight, holder),
          part + ".mid_block.attentions.0." + renamed(rest, kAutoencoderAttention).value_or(rest));
      return;
    }
    std::string name = renamed(weight.name, kAutoencoder).value_or(weight.name);
    out.put(weight, name);
  });
  return out.take();
}

StoredWeights map_t5(const StoredWeights& weights) {
  bool is_gated = false;
  each_weight(weights,
              [&](const Weight& weight) { is_gated |= weight.name.ends_with(".ffn_gate.weight"); });
  Mapped out;
  each_weight(weights, [&](const Weight& weight) {
    auto block = numbered(weight.name, "enc.blk.");
    if (!block) {
      out.put(weight, renamed(weight.name, kT5).value_or(weight.name));
      return;
    }
    const std::string prefix = "encoder.block." + block->number + ".";
    if (auto suffix = suffix_of(block->rest, "ffn_up")) {
      out.put(weight, prefix + "layer.1.DenseReluDense." + (is_gated ? "wi_1" : "wi") + *suffix);
    } else if (auto name = renamed(block->rest, kT5Block)) {
      out.put(weight, prefix + *name);
    } else {
      out.put(weight, weight.name);
    }
  });
  return out.take();
}

namespace {

std::optional<std::string> renamed_back(const std::string& name, const Renames& renames) {
  Renames back;
  for (const auto& [from, to] : renames) back.emplace_back(to, from);
  return renamed(name, back);
}

// "attn.to_k.bias" among {"attn.to_q", "attn.to_k", …} -> part 1 of "<whole>.bias".
std::optional<FilePlace> part_of(const std::string& name, const std::string& whole,
                                 const std::vector<std::string_view>& parts) {
  for (size_t i = 0; i < parts.size(); ++i) {
    if (auto suffix = suffix_of(name, parts[i]))
      return FilePlace{whole + *suffix, static_cast<int64_t>(i)};
  }
  return std::nullopt;
}

std::optional<FilePlace> prefixed(const std::string& prefix, std::optional<std::string> name) {
  if (!name) return std::nullopt;
  return FilePlace{prefix + *name};
}

std::optional<FilePlace> place_in_flux(const std::string& name) {
  if (auto block = numbered(name, "transformer_blocks.")) {
    const std::string prefix = "double_blocks." + block->number + ".";
    if (auto place =
            part_of(block->rest, prefix + "img_attn.qkv", {"attn.to_q", "attn.to_k", "attn.to_v"}))
      return place;
    if (auto place = part_of(block->rest, prefix + "txt_attn.qkv",
                             {"attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"}))
      return place;
    return prefixed(prefix, renamed_back(block->rest, kFluxDouble));
  }
  if (auto block = numbered(name, "single_transformer_blocks.")) {
    const std::string prefix = "single_blocks." + block->number + ".";
    if (auto place = part_of(block->rest, prefix + "linear1",
                             {"attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"}))
      return place;
    return prefixed(prefix, renamed_back(block->rest, kFluxSingle));
  }
  if (auto suffix = suffix_of(name, "norm_out.linear"))
    return FilePlace{"final_layer.adaLN_modulation.1" + *suffix, 0, /*halves_swapped=*/true};
  return prefixed("", renamed_back(name, kFlux));
}

std::optional<FilePlace> place_in_t5(const std::string& name) {
  if (name == "encoder.embed_tokens.weight") return FilePlace{"token_embd.weight"};
  auto block = numbered(name, "encoder.block.");
  if (!block) return prefixed("", renamed_back(name, kT5));
  const std::string prefix = "enc.blk." + block->number + ".";
  for (std::string_view up : {"layer.1.DenseReluDense.wi_1", "layer.1.DenseReluDense.wi"}) {
    if (auto suffix = suffix_of(block->rest, up)) return FilePlace{prefix + "ffn_up" + *suffix};
  }
  return prefixed(prefix, renamed_back(block->rest, kT5Block));
}

// The inverse of autoencoder_block().
std::optional<std::string> autoencoder_block_back(const std::string& rest) {
  if (auto resnet = numbered(rest, "resnets.")) {
    std::string name = "block." + resnet->number + "." + resnet->rest;
    if (size_t at = name.find("conv_shortcut"); at != std::string::npos)
      name.replace(at, std::strlen("conv_shortcut"), "nin_shortcut");
    return name;
  }
  return renamed(
      rest, {{"downsamplers.0.conv", "downsample.conv"}, {"upsamplers.0.conv", "upsample.conv"}});
}

std::optional<FilePlace> place_in_autoencoder(const std::string& name, int64_t up_blocks) {
  if (auto down = numbered(name, "encoder.down_blocks."))
    return prefixed("encoder.down." + down->number + ".", autoencoder_block_back(down->rest));
  if (auto up = numbered(name, "decoder.up_blocks.")) {
    return prefixed(fmt::format("decoder.up.{}.", up_blocks - 1 - std::stoll(up->number)),
                    autoencoder_block_back(up->rest));
  }
  for (std::string part : {"encoder", "decoder"}) {
    const std::string attention = part + ".mid_block.attentions.0.";
    if (!name.starts_with(attention)) continue;
    auto place = prefixed(part + ".mid.attn_1.",
                          renamed_back(name.substr(attention.size()), kAutoencoderAttention));
    if (place) place->has_kernel = name.ends_with(".weight") && !name.ends_with("norm.weight");
    return place;
  }
  return FilePlace{renamed_back(name, kAutoencoder).value_or(name)};
}

}  // namespace

FilePlace place_in_file(const std::string& class_name, const std::string& parameter,
                        int64_t up_blocks) {
  std::optional<FilePlace> place;
  if (class_name == "FluxTransformer2DModel") {
    place = place_in_flux(parameter);
  } else if (class_name == "T5EncoderModel") {
    place = place_in_t5(parameter);
  } else if (class_name == "AutoencoderKL") {
    place = place_in_autoencoder(parameter, up_blocks);
  } else {
    throw_error<ArgumentError>(
        "{}: ferry writes single files of FluxTransformer2DModel, T5EncoderModel and AutoencoderKL",
        class_name);
  }
  if (place) return *place;
  throw_error<ArgumentError>("{}: '{}' has no place in a single file", class_name, parameter);
}

const std::vector<KeyMap>& key_maps() {
  static const std::vector<KeyMap> maps = {
      {"Flux, Black Forest Labs' names",
       "FluxTransformer2DModel",
       {"double_blocks.0.img_attn.qkv.weight", "img_in.weight"},
       {"", "model.diffusion_model."},
       map_flux},
      {"Flux, diffusers' names",
       "FluxTransformer2DModel",
       {"single_transformer_blocks.0.proj_mlp.weight", "x_embedder.weight"},
       {"", "model.diffusion_model."},
       as_it_is},
      {"T5, llama.cpp's names",
       "T5EncoderModel",
       {"enc.blk.0.attn_q.weight", "token_embd.weight"},
       {""},
       map_t5},
      {"T5, transformers' names",
       "T5EncoderModel",
       {"encoder.block.0.layer.0.SelfAttention.q.weight"},
       {"", "text_encoders.t5xxl.transformer."},
       as_it_is},
      {"CLIP, transformers' names",
       "CLIPTextModel",
       {"text_model.encoder.layers.0.self_attn.q_proj.weight"},
       {"", "text_encoders.clip_l.transformer."},
       as_it_is},
      {"CLIP, transformers' names without text_model",
       "CLIPTextModel",
       {"encoder.layers.0.self_attn.q_proj.weight", "embeddings.token_embedding.weight"},
       {""},
       as_it_is},
      {"autoencoder, latent diffusion's names",
       "AutoencoderKL",
       {"decoder.up.0.block.0.norm1.weight", "decoder.conv_in.weight"},
       {"", "first_stage_model.", "vae."},
       map_autoencoder},
      {"autoencoder, diffusers' names",
       "AutoencoderKL",
       {"decoder.up_blocks.0.resnets.0.norm1.weight", "decoder.conv_in.weight"},
       {"", "vae."},
       as_it_is},
  };
  return maps;
}

}  // namespace ferry::models
