// Key maps: from the names that single files use to diffusers' and transformers' parameter names.
// A parameter may be some rows of a stored tensor (query, key and value in one), and nothing is
// read to cut it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "ferry/quant/stored_weights.h"

namespace ferry::models {

// A way to name a model's tensors.
struct KeyMap {
  std::string_view name;  // for messages: "Flux, Black Forest Labs' names"
  std::string_view class_name;
  // Names that a file of this kind has, all of them, behind one of `prefixes`.
  std::vector<std::string_view> markers;
  std::vector<std::string_view> prefixes;  // "" among them: names without any
  // Names without their prefix -> parameter names. A name it does not know is kept.
  quant::StoredWeights (*map)(const quant::StoredWeights& weights);
};

// In the order in which they are tried.
const std::vector<KeyMap>& key_maps();

// Rows `first` to `first + count` of a stored tensor, without reading where its bytes are its own.
weights::StoredTensor rows_of(const weights::StoredTensor& stored, int64_t first, int64_t count);
// The lower half of the rows before the upper one: done by whoever reads.
weights::StoredTensor swap_halves(const weights::StoredTensor& stored);

// Black Forest Labs' Flux -> FluxTransformer2DModel (diffusers'
// convert_flux_transformer_checkpoint_to_diffusers).
quant::StoredWeights map_flux(const quant::StoredWeights& weights);
// Latent diffusion's autoencoder, as Black Forest Labs' ae.safetensors -> AutoencoderKL (diffusers'
// convert_ldm_vae_checkpoint).
quant::StoredWeights map_autoencoder(const quant::StoredWeights& weights);
// llama.cpp's T5 -> T5EncoderModel (gguf's tensor names, transformers' GGUF loader).
quant::StoredWeights map_t5(const quant::StoredWeights& weights);

// Where a parameter is in a single file, the other way round.
struct FilePlace {
  std::string name;             // of the file's tensor
  int64_t part = 0;             // of those that the tensor joins along its rows
  bool halves_swapped = false;  // the upper half of the rows first
  bool has_kernel = false;      // a 1x1 convolution there, [out, in, 1, 1]
};

// FluxTransformer2DModel: Black Forest Labs' names; T5EncoderModel: llama.cpp's; AutoencoderKL with
// `up_blocks` blocks in its decoder: latent diffusion's. Throws ArgumentError for another class or
// a parameter that has no place.
FilePlace place_in_file(const std::string& class_name, const std::string& parameter,
                        int64_t up_blocks = 0);

}  // namespace ferry::models
