#include "ferry/models/single_file_writer.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <map>

#include "ferry/base/error.h"
#include "ferry/io/gguf.h"
#include "ferry/models/key_maps.h"
#include "ferry/models/text_encoders/t5_encoder_model.h"
#include "ferry/quant/gguf_blocks.h"
#include "ferry/tensor/dtype.h"

namespace ferry::models {

namespace {

using io::GgmlType;
using io::GgufType;

// A tensor of the file and the slots that it joins.
struct FileTensor {
  std::string name;
  std::vector<const weights::BoundSlot*> parts;
  bool halves_swapped = false, has_kernel = false;

  std::vector<int64_t> shape() const {
    std::vector<int64_t> shape = parts.front()->slot.shape().vec();
    for (size_t i = 1; i < parts.size(); ++i) shape[0] += parts[i]->slot.shape()[0];
    if (has_kernel) shape.insert(shape.end(), {1, 1});
    return shape;
  }

  at::Tensor read() const {
    std::vector<at::Tensor> tensors;
    for (const weights::BoundSlot* part : parts) tensors.push_back(weights::read_tensor(*part));
    at::Tensor whole = tensors.size() == 1 ? tensors[0] : at::cat(tensors);
    if (halves_swapped) {
      std::vector<at::Tensor> halves = whole.chunk(2);
      whole = at::cat({halves[1], halves[0]});
    }
    return whole.contiguous();
  }
};

int64_t up_blocks_of(const Model& model) {
  const nlohmann::ordered_json config = model.config_json();
  auto types = config.find("up_block_types");
  return types == config.end() ? 0 : static_cast<int64_t>(types->size());
}

// In the order of the file's names, so that the same model gives the same file.
std::vector<FileTensor> file_tensors(Model& model) {
  if (!model.binding()) {
    throw_error<ArgumentError>("{}: was made in memory and has no checkpoint to convert",
                               model.class_name());
  }
  std::map<std::string, std::map<int64_t, const weights::BoundSlot*>> parts;
  std::map<std::string, FilePlace> places;
  const int64_t up_blocks = up_blocks_of(model);
  for (const weights::BoundSlot& bound : model.binding()->slots) {
    if (bound.slot.dtype() == at::kByte || bound.slot.dtype() == at::kChar) {
      throw_error<ArgumentError>(
          "{}: '{}' is part of a quantized weight; convert the original, or first to plain weights",
          model.class_name(), bound.slot.name());
    }
    FilePlace place = place_in_file(model.class_name(), bound.slot.name(), up_blocks);
    parts[place.name][place.part] = &bound;
    places[place.name] = std::move(place);
  }
  std::vector<FileTensor> tensors;
  for (const auto& [name, slots] : parts) {
    FileTensor tensor{name, {}, places[name].halves_swapped, places[name].has_kernel};
    for (const auto& [part, slot] : slots) tensor.parts.push_back(slot);
    tensors.push_back(std::move(tensor));
  }
  return tensors;
}

std::span<const std::byte> bytes_of(const at::Tensor& tensor) {
  return {static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()};
}

GgmlType type_for(const FileTensor& tensor, GgmlType wanted) {
  const std::vector<int64_t> shape = tensor.shape();
  int64_t elements = 1;
  for (int64_t extent : shape) elements *= extent;
  if (shape.size() == 1 || elements <= 1024 || tensor.name.ends_with("attn_rel_b.weight"))
    return GgmlType::F32;
  if (io::plain_dtype(wanted)) return wanted;
  const bool fits = shape.size() == 2 && shape[1] % io::block_elements(wanted) == 0;
  return fits ? wanted : GgmlType::F16;
}

// [rows, columns] as blocks, on all cores.
std::vector<std::byte> quantize(const at::Tensor& weight, GgmlType type) {
  const quant::QuantizeBlocks quantize_blocks = quant::find_quantize(type);
  const int64_t blocks = weight.size(1) / io::block_elements(type);
  const int64_t row_bytes = blocks * io::block_bytes(type);
  std::vector<std::byte> out(static_cast<size_t>(weight.size(0) * row_bytes));
  at::parallel_for(0, weight.size(0), 16, [&](int64_t begin, int64_t end) {
    at::NoGradGuard no_grad;
    at::Tensor rows = weight.narrow(0, begin, end - begin).to(at::kFloat).contiguous();
    quantize_blocks(rows.const_data_ptr<float>(), (end - begin) * blocks,
                    out.data() + begin * row_bytes);
  });
  return out;
}

io::GgufValue number(int64_t value) {
  return {GgufType::u32, static_cast<uint64_t>(value)};
}

// What llama.cpp's and ComfyUI's readers ask for.
io::GgufMetadata gguf_metadata(const Model& model, GgmlType type) {
  io::GgufMetadata metadata;
  if (const auto* t5 = dynamic_cast<const T5EncoderModel*>(&model)) {
    const T5Config& config = t5->config();
    metadata = {
        {"general.architecture", {GgufType::string, std::string("t5encoder")}},
        {"t5encoder.block_count", number(config.num_layers)},
        {"t5encoder.embedding_length", number(config.d_model)},
        {"t5encoder.feed_forward_length", number(config.d_ff)},
        {"t5encoder.attention.head_count", number(config.num_heads)},
        {"t5encoder.attention.key_length", number(config.d_kv)},
        {"t5encoder.attention.value_length", number(config.d_kv)},
        {"t5encoder.attention.relative_buckets_count",
         number(config.relative_attention_num_buckets)},
        {"t5encoder.attention.layer_norm_epsilon", {GgufType::f32, config.layer_norm_epsilon}},
        {"t5encoder.attention.layer_norm_rms_epsilon", {GgufType::f32, config.layer_norm_epsilon}},
        {"t5encoder.vocab_size", number(config.vocab_size)},
    };
  } else if (model.class_name() == "FluxTransformer2DModel") {
    metadata = {{"general.architecture", {GgufType::string, std::string("flux")}}};
  } else {
    throw_error<ArgumentError>(
        "{}: GGUF files hold transformers and text encoders; leave the type "
        "out for a safetensors file",
        model.class_name());
  }
  metadata.emplace_back("general.quantization_version", number(2));
  // llama.cpp's numbers for "mostly of this type".
  static const std::map<GgmlType, int64_t> file_types = {
      {GgmlType::F32, 0},  {GgmlType::F16, 1},  {GgmlType::Q4_0, 2}, {GgmlType::Q4_1, 3},
      {GgmlType::Q8_0, 7}, {GgmlType::Q5_0, 8}, {GgmlType::Q5_1, 9}, {GgmlType::BF16, 32}};
  metadata.emplace_back("general.file_type", number(file_types.at(type)));
  return metadata;
}

void check_type(GgmlType type) {
  const bool is_float = type == GgmlType::F32 || type == GgmlType::F16 || type == GgmlType::BF16;
  if (is_float || quant::find_quantize(type)) return;
  throw_error<ArgumentError>(
      "GGUF {}: ferry writes F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 and Q4_0", io::name(type));
}

}  // namespace

void write_single_file(Model& model, const std::filesystem::path& path,
                       const WriteSingleFileOptions& options) {
  c10::InferenceMode off(false);
  at::NoGradGuard no_grad;
  const std::vector<FileTensor> tensors = file_tensors(model);
  auto each = [&](auto&& write) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      options.stop.throw_if_stopped();
      write(tensors[i]);
      if (options.on_tensor) options.on_tensor(i + 1, tensors.size());
    }
  };
  if (!options.gguf_type) {
    std::vector<io::SafetensorsWriter::Entry> entries;
    for (const FileTensor& tensor : tensors) {
      entries.push_back(
          {tensor.name, tensor::from_torch(tensor.parts.front()->slot.dtype()), tensor.shape()});
    }
    io::SafetensorsWriter writer(path, std::move(entries));
    each([&](const FileTensor& tensor) { writer.write(bytes_of(tensor.read())); });
    writer.finish();
    return;
  }
  check_type(*options.gguf_type);
  std::vector<io::GgufWriter::Entry> entries;
  for (const FileTensor& tensor : tensors)
    entries.push_back({tensor.name, type_for(tensor, *options.gguf_type), tensor.shape()});
  io::GgufWriter writer(path, entries, gguf_metadata(model, *options.gguf_type));
  size_t index = 0;
  each([&](const FileTensor& tensor) {
    const GgmlType type = entries[index++].type;
    if (auto dtype = io::plain_dtype(type)) {
      writer.write(bytes_of(tensor.read().to(tensor::to_torch(*dtype))));
    } else {
      writer.write(quantize(tensor.read(), type));
    }
  });
  writer.finish();
}

}  // namespace ferry::models
