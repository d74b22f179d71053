#include "ferry/models/autoencoders/autoencoder_kl.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>

#include "ferry/models/costs.h"
#include "ferry/models/named_inputs.h"

namespace ferry::models {

namespace {

VaeBlockOptions block_options(const AutoencoderKLConfig& config) {
  return {.norm_num_groups = config.norm_num_groups,
          .eps = 1e-6,
          .act = nn::get_activation(config.act_fn)};
}

nn::Ptr<nn::Conv2d> conv(int64_t in, int64_t out, int64_t kernel_size) {
  return nn::make<nn::Conv2d>(
      in, out, nn::Conv2dOptions{.kernel_size = kernel_size, .padding = kernel_size / 2});
}

void check_blocks(const char* key, const std::vector<std::string>& types, const char* known,
                  size_t count) {
  if (types.size() != count) {
    throw_error<ArgumentError>("AutoencoderKL: {} has {} entries, but block_out_channels {}", key,
                               types.size(), count);
  }
  for (const std::string& type : types) {
    if (type != known) {
      throw_error<ArgumentError>("AutoencoderKL: {} has '{}'; supported is {}", key, type, known);
    }
  }
}

int64_t sample_size_of(const AutoencoderKLConfig& config) {
  const nlohmann::ordered_json& value = config.sample_size;
  const nlohmann::ordered_json& number = value.is_array() && !value.empty() ? value[0] : value;
  if (!number.is_number_integer()) {
    throw_error<ArgumentError>("AutoencoderKL: sample_size: got {}, expected a positive number",
                               value.dump());
  }
  check_size("AutoencoderKL", "sample_size", number.get<int64_t>());
  return number.get<int64_t>();
}

// Fades the first rows (dim 2) or columns (dim 3) of `b` in over the last ones of `a`, in place.
void blend(const at::Tensor& a, const at::Tensor& b, int64_t dim, int64_t extent) {
  extent = std::min({a.size(dim), b.size(dim), extent});
  for (int64_t i = 0; i < extent; ++i) {
    double weight = static_cast<double>(i) / static_cast<double>(extent);
    at::Tensor from = a.select(dim, a.size(dim) - extent + i), into = b.select(dim, i);
    into.copy_(from * (1 - weight) + into * weight);
  }
}

struct Tiles {
  int64_t size;          // of a tile of the input
  int64_t step;          // between the tiles of the input
  int64_t blend_extent;  // of the output
  int64_t row_limit;     // what remains of a tile of the output
};

// Keeps two rows of tiles at a time. `run` gives a tile of its own, which is blended in place.
template <class Run>
at::Tensor run_tiled(const at::Tensor& x, const Tiles& tiles, Run run) {
  auto cut = [](const at::Tensor& t, int64_t begin_h, int64_t begin_w, int64_t size) {
    return t.slice(2, begin_h, begin_h + size).slice(3, begin_w, begin_w + size);
  };
  std::vector<at::Tensor> above, finished;
  for (int64_t i = 0; i < x.size(2); i += tiles.step) {
    std::vector<at::Tensor> row, parts;
    for (int64_t j = 0; j < x.size(3); j += tiles.step) {
      at::Tensor tile = run(cut(x, i, j, tiles.size));
      if (!above.empty()) blend(above[row.size()], tile, 2, tiles.blend_extent);
      if (!row.empty()) blend(row.back(), tile, 3, tiles.blend_extent);
      parts.push_back(cut(tile, 0, 0, tiles.row_limit));
      row.push_back(std::move(tile));
    }
    finished.push_back(at::cat(parts, 3));
    above = std::move(row);
  }
  return at::cat(finished, 2);
}

// One sample of the batch after another.
template <class Run>
at::Tensor run_sliced(const at::Tensor& x, bool sliced, Run run) {
  if (!sliced || x.size(0) <= 1) return run(x);
  std::vector<at::Tensor> parts;
  for (const at::Tensor& part : x.split(1)) parts.push_back(run(part));
  return at::cat(parts);
}

}  // namespace

DiagonalGaussianDistribution::DiagonalGaussianDistribution(at::Tensor parameters)
    : parameters_(std::move(parameters)) {
  auto parts = parameters_.chunk(2, 1);
  mean_ = parts[0];
  logvar_ = at::clamp(parts[1], -30.0, 20.0);
}

at::Tensor DiagonalGaussianDistribution::std() const {
  return at::exp(logvar_ * 0.5);
}
at::Tensor DiagonalGaussianDistribution::var() const {
  return at::exp(logvar_);
}

at::Tensor DiagonalGaussianDistribution::sample(
    const std::vector<tensor::Generator>& generators) const {
  at::Tensor noise = tensor::randn_tensor(mean_.sizes(), generators, parameters_.scalar_type(),
                                          parameters_.device());
  return mean_ + std() * noise;
}

Encoder::Encoder(const AutoencoderKLConfig& config) {
  VaeBlockOptions options = block_options(config);
  const auto& channels = config.block_out_channels;
  conv_in = register_module("conv_in", conv(config.in_channels, channels.front(), 3));
  down_blocks = register_module("down_blocks", nn::make<nn::ModuleList<DownEncoderBlock2D>>());
  for (size_t i = 0; i < channels.size(); ++i) {
    down_blocks->push_back(nn::make<DownEncoderBlock2D>(channels[i == 0 ? 0 : i - 1], channels[i],
                                                        config.layers_per_block,
                                                        i + 1 < channels.size(), options));
  }
  mid_block = register_module(
      "mid_block",
      nn::make<UNetMidBlock2D>(channels.back(), config.mid_block_add_attention, options));
  conv_norm_out = register_module(
      "conv_norm_out", nn::make<nn::GroupNorm>(config.norm_num_groups, channels.back(), 1e-6));
  conv_out = register_module("conv_out", conv(channels.back(), 2 * config.latent_channels, 3));
}

at::Tensor Encoder::forward(const at::Tensor& sample) {
  at::Tensor x = conv_in(sample);
  for (const auto& block : *down_blocks) x = block(x);
  x = mid_block(x);
  x = conv_norm_out(x);
  x = at::silu(x);
  return conv_out(x);
}

Decoder::Decoder(const AutoencoderKLConfig& config) {
  VaeBlockOptions options = block_options(config);
  std::vector<int64_t> channels(config.block_out_channels.rbegin(),
                                config.block_out_channels.rend());
  conv_in = register_module("conv_in", conv(config.latent_channels, channels.front(), 3));
  up_blocks = register_module("up_blocks", nn::make<nn::ModuleList<UpDecoderBlock2D>>());
  for (size_t i = 0; i < channels.size(); ++i) {
    up_blocks->push_back(nn::make<UpDecoderBlock2D>(channels[i == 0 ? 0 : i - 1], channels[i],
                                                    config.layers_per_block + 1,
                                                    i + 1 < channels.size(), options));
  }
  mid_block = register_module(
      "mid_block",
      nn::make<UNetMidBlock2D>(channels.front(), config.mid_block_add_attention, options));
  conv_norm_out = register_module(
      "conv_norm_out", nn::make<nn::GroupNorm>(config.norm_num_groups, channels.back(), 1e-6));
  conv_out = register_module("conv_out", conv(channels.back(), config.out_channels, 3));
}

at::Tensor Decoder::forward(const at::Tensor& sample) {
  at::Tensor x = conv_in(sample);
  x = mid_block(x);
  for (const auto& block : *up_blocks) x = block(x);
  x = conv_norm_out(x);
  x = at::silu(x);
  return conv_out(x);
}

AutoencoderKL::AutoencoderKL(Config config) : config_(std::move(config)) {
  size_t blocks = config_.block_out_channels.size();
  if (blocks == 0 || blocks > 16) {
    throw_error<ArgumentError>("AutoencoderKL: block_out_channels has {} entries, expected 1 to 16",
                               blocks);
  }
  check_blocks("down_block_types", config_.down_block_types, "DownEncoderBlock2D", blocks);
  check_blocks("up_block_types", config_.up_block_types, "UpDecoderBlock2D", blocks);
  auto size = [](const char* key, int64_t value, int64_t least = 1, int64_t most = kMostChannels) {
    check_size("AutoencoderKL", key, value, least, most);
  };
  size("in_channels", config_.in_channels);
  size("out_channels", config_.out_channels);
  size("latent_channels", config_.latent_channels);
  size("layers_per_block", config_.layers_per_block, 1, kMostLayers);
  size("norm_num_groups", config_.norm_num_groups);
  for (int64_t channels : config_.block_out_channels) size("block_out_channels", channels);
  int64_t latent = config_.latent_channels;
  encoder = register_module("encoder", nn::make<Encoder>(config_));
  decoder = register_module("decoder", nn::make<Decoder>(config_));
  if (config_.use_quant_conv) {
    quant_conv = register_module("quant_conv", conv(2 * latent, 2 * latent, 1));
  }
  if (config_.use_post_quant_conv) {
    post_quant_conv = register_module("post_quant_conv", conv(latent, latent, 1));
  }
  tile_sample_min_size_ = sample_size_of(config_);
  tile_latent_min_size_ = tile_sample_min_size_ / scale_factor();
}

void AutoencoderKL::enable_tiling(const TilingOptions& options) {
  int64_t sample = options.tile_sample_min_size.value_or(sample_size_of(config_));
  int64_t latent = options.tile_latent_min_size.value_or(sample / scale_factor());
  double overlap = options.tile_overlap_factor;
  if (sample < 1 || latent < 1 || !(overlap >= 0 && overlap < 1) ||
      static_cast<int64_t>(latent * (1 - overlap)) < 1) {
    throw_error<ArgumentError>(
        "AutoencoderKL: tiles of {} pixels, {} latent values and an overlap of {} are too small "
        "(sample_size is {})",
        sample, latent, overlap, config_.sample_size.dump());
  }
  tile_sample_min_size_ = sample;
  tile_latent_min_size_ = latent;
  tile_overlap_factor_ = overlap;
  use_tiling_ = true;
}

at::Tensor AutoencoderKL::encode_tile(const at::Tensor& x) {
  at::Tensor moments = encoder(x);
  return quant_conv ? quant_conv(moments) : moments;
}

at::Tensor AutoencoderKL::decode_tile(const at::Tensor& z) {
  return decoder(post_quant_conv ? post_quant_conv(z) : z);
}

at::Tensor AutoencoderKL::encode_moments(const at::Tensor& x) {
  return run_in_parts(x, tile_sample_min_size_, tile_latent_min_size_,
                      [&](const at::Tensor& part) { return encode_tile(part); });
}

at::Tensor AutoencoderKL::decode_sample(const at::Tensor& z) {
  return run_in_parts(z, tile_latent_min_size_, tile_sample_min_size_,
                      [&](const at::Tensor& part) { return decode_tile(part); });
}

at::Tensor AutoencoderKL::run_in_parts(const at::Tensor& x, int64_t from, int64_t into,
                                       const std::function<at::Tensor(const at::Tensor&)>& run) {
  return run_sliced(x, use_slicing_, [&](const at::Tensor& part) {
    if (!use_tiling_ || (part.size(3) <= from && part.size(2) <= from)) return run(part);
    int64_t extent = static_cast<int64_t>(into * tile_overlap_factor_);
    Tiles tiles{from, static_cast<int64_t>(from * (1 - tile_overlap_factor_)), extent,
                into - extent};
    return run_tiled(part, tiles, run);
  });
}

DiagonalGaussianDistribution AutoencoderKL::encode(const at::Tensor& x) {
  return call([&] { return DiagonalGaussianDistribution(encode_moments(x)); });
}

at::Tensor AutoencoderKL::decode(const at::Tensor& z) {
  return call([&] { return decode_sample(z); });
}

at::Tensor AutoencoderKL::forward(const at::Tensor& sample) {
  return decode_sample(DiagonalGaussianDistribution(encode_moments(sample)).mode());
}

Traits AutoencoderKL::traits() const {
  Traits traits;
  traits.no_split_modules = {"BasicTransformerBlock", "ResnetBlock2D"};
  traits.supports_gradient_checkpointing = true;
  return traits;
}

NamedTensors AutoencoderKL::forward_named(const std::string& method, const NamedTensors& inputs,
                                          const nlohmann::json& arguments) {
  check_method(method);
  NamedInputs in("AutoencoderKL." + method, inputs, arguments);
  in.argument("return_dict", true);
  if (method == "encode") {
    at::Tensor sample = in.required("sample");
    in.finish();
    DiagonalGaussianDistribution latent_dist = encode(sample);
    return {{"mean", latent_dist.mean()}, {"logvar", latent_dist.logvar()}};
  }
  if (method == "decode") {
    at::Tensor z = in.required("z");
    in.finish();
    return {{"sample", decode(z)}};
  }
  at::Tensor sample = in.required("sample");
  if (in.argument("sample_posterior", false)) {
    throw_error<ArgumentError>("AutoencoderKL.forward: sample_posterior is not supported here");
  }
  in.finish();
  return {{"sample", call([&] { return forward(sample); })}};
}

std::vector<std::string> AutoencoderKL::unused_modules(const std::string& method,
                                                       const nlohmann::json&) const {
  std::vector<std::string> unused;
  auto half = [&](const char* name, const nn::Ptr<nn::Conv2d>& conv, const char* conv_name) {
    unused.emplace_back(name);
    if (conv) unused.emplace_back(conv_name);
  };
  if (method == "decode") half("encoder", quant_conv, "quant_conv");
  if (method == "encode") half("decoder", post_quant_conv, "post_quant_conv");
  return unused;
}

std::string AutoencoderKL::map_key(const std::string& checkpoint_key) const {
  static constexpr std::array<std::pair<std::string_view, std::string_view>, 4> kOldNames{
      {{".query.", ".to_q."},
       {".key.", ".to_k."},
       {".value.", ".to_v."},
       {".proj_attn.", ".to_out.0."}}};
  if (checkpoint_key.find(".attentions.") == std::string::npos) return checkpoint_key;
  for (auto [old_name, name] : kOldNames) {
    size_t at = checkpoint_key.find(old_name);
    if (at == std::string::npos) continue;
    return checkpoint_key.substr(0, at) + std::string(name) +
           checkpoint_key.substr(at + old_name.size());
  }
  return checkpoint_key;
}

// ---- for planning: a decode ----

namespace {

struct DecodeShape {
  int64_t latent_height, latent_width;  // of one tile
  double tiles;                         // of that size, as a number of operations
};

DecodeShape decode_shape(const AutoencoderKL& vae, const Workload& w) {
  const int64_t f = vae.scale_factor();
  int64_t height = (w.height + f - 1) / f, width = (w.width + f - 1) / f;
  const int64_t tile = vae.tile_latent_min_size();
  if (!w.tiled || (height <= tile && width <= tile)) return {height, width, 1};
  const auto step = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(tile) * 0.75));
  double pixels = 0;  // the last tiles of a row and column are cut
  for (int64_t i = 0; i < height; i += step) {
    for (int64_t j = 0; j < width; j += step)
      pixels += static_cast<double>(std::min(tile, height - i) * std::min(tile, width - j));
  }
  const int64_t tile_height = std::min(tile, height), tile_width = std::min(tile, width);
  return {tile_height, tile_width, pixels / static_cast<double>(tile_height * tile_width)};
}

LayerLoad decoder_load(const AutoencoderKLConfig& config, const DecodeShape& shape,
                       const std::string& name, const Workload& w) {
  if (!name.starts_with("decoder.") && name != "post_quant_conv") return {};
  auto name_has = [&](const char* part) { return name.find(part) != std::string::npos; };
  const size_t blocks = config.block_out_channels.size();
  size_t doublings = 0;
  const std::string up = "decoder.up_blocks.";
  if (name.starts_with(up)) {
    doublings = static_cast<size_t>(std::stoul(name.substr(up.size())));
    if (name_has("upsamplers")) ++doublings;
  } else if (name == "decoder.conv_norm_out" || name == "decoder.conv_out") {
    doublings = blocks - 1;
  }
  const double latents = static_cast<double>(w.batch * shape.latent_height * shape.latent_width);
  const double rows = latents * std::pow(4.0, static_cast<double>(doublings)) * shape.tiles;
  double attention = 0;
  if (name_has("attentions.0.to_out")) {
    const double tokens = static_cast<double>(shape.latent_height * shape.latent_width);
    attention = 4.0 * latents * tokens * shape.tiles *
                static_cast<double>(config.block_out_channels.back());
  }
  return {rows, attention};
}

double decoder_values(const AutoencoderKLConfig& config, const DecodeShape& shape,
                      const Workload& w) {
  double pixels = static_cast<double>(w.batch * shape.latent_height * shape.latent_width);
  const auto& channels = config.block_out_channels;
  double most = 0, in = static_cast<double>(channels.back());
  for (size_t i = 0; i < channels.size(); ++i) {
    const double out = static_cast<double>(channels[channels.size() - 1 - i]);
    // A residual block: its input and what is normed and activated; then what a convolution reads
    // and writes, which the CPU's kernels do on reordered copies.
    const double convolution = w.on_cpu ? 2 : 1;
    double block = in + std::max(2 * in, convolution * (in + out));
    block = std::max(block, in + out + convolution * 2 * out);
    most = std::max(most, pixels * block);
    if (i + 1 == channels.size()) break;
    most = std::max(most, pixels * (in + out) + 4 * pixels * out * 2 * convolution);
    pixels *= 4;
    in = out;
  }
  // The picture, and in tiles two rows of them and the finished ones.
  const double picture = static_cast<double>(w.batch * w.height * w.width * config.out_channels);
  // Each thread of a CPU has buffers of its own for narrow types.
  const bool narrow = w.on_cpu && c10::elementSize(w.dtype) < 4;
  return most * (narrow ? 1.08 : 1) + (w.tiled ? 4 : 2) * picture;
}

}  // namespace

Costs AutoencoderKL::costs(const Workload& w) const {
  const DecodeShape shape = decode_shape(*this, w);
  return {.load = [config = config_, shape,
                   w](const std::string& layer) { return decoder_load(config, shape, layer, w); },
          .values = decoder_values(config_, shape, w)};
}

}  // namespace ferry::models
