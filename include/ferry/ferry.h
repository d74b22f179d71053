// ferry for applications: load a diffusers pipeline folder and make pictures. No torch header here;
// the whole library is under ferry/pipelines/pipeline.h.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stop_token>
#include <string>
#include <utility>
#include <vector>

namespace ferry {

struct PipelineOptions {
  // Bytes that all weights together may take: they are streamed from disk. 0: all in memory.
  uint64_t weights_memory_bytes = 0;
  // Of everything ferry may hold where compute happens: "6GiB", or "auto" for what is free, leaving
  // a tenth to others. Weights that do not fit beside a picture's activations are streamed. Empty:
  // no limit. Excludes weights_memory_bytes.
  std::string memory{};
  // Bytes of `memory` that the application keeps for itself.
  uint64_t reserve_bytes = 0;
  // "bf16", "fp32", "fp16", or for each component "transformer=bf16,vae=fp32". Empty: as stored.
  std::string dtype{};
  // Single files (.gguf, .safetensors) in place of the folder's components, and folders in place of
  // its tokenizers, by component: {"transformer", "flux1-dev-Q4_0.gguf"}, {"tokenizer_2", "t5"}.
  // With all of them the folder's name may be empty.
  std::map<std::string, std::string> files{};
  // Quantize as the model is loaded, once, into the pack cache: "int8wo" (the transformer), or for
  // each component "transformer=int8wo,text_encoder_2=nf4". docs/quantization.md lists the schemes.
  std::string quantize{};
  // "cpu", "cuda", "cuda:1", or "auto": the first accelerator if there is one. Empty:
  // $FERRY_DEVICE, else the CPU.
  std::string device{};
  // Of the weight files, e.g. "fp16".
  std::string variant{};
  // Compute threads of this process. 0: as the machine has.
  int threads = 0;
};

struct PictureProgress {
  std::string stage;  // "encode", "denoise", "decode"
  int64_t step = 0;   // done
  int64_t total = 0;
};

// Members have initializers so that a program that names only some gets no warning for the rest.
// Unset values are the pipeline's own defaults.
struct PictureOptions {
  std::string prompt{};
  std::optional<std::string> negative_prompt{};  // with true_cfg_scale above 1
  std::optional<int64_t> width{}, height{};      // pixels; what the model was trained on
  std::optional<int64_t> steps{};
  std::optional<double> guidance_scale{}, true_cfg_scale{};
  std::optional<int64_t> max_sequence_length{};  // tokens
  int64_t num_images = 1;
  // The same seed gives the same picture as Python diffusers on the CPU. Unset: random.
  std::optional<uint64_t> seed{};
  // Called on the generating thread.
  std::function<void(const PictureProgress&)> on_progress{};
  // Stops within one block of the model; may be requested from any thread.
  std::stop_token stop{};
};

// 8 bits a channel, rows from the top, red green blue interleaved. A plain value.
struct Picture {
  int width = 0;
  int height = 0;
  std::vector<uint8_t> rgb;
  // What it was made from; goes into a PNG's text chunks.
  std::vector<std::pair<std::string, std::string>> text{};

  // .png, .jpg or .webp; appears whole or not at all. Throws std::runtime_error.
  void save(const std::string& path) const;
};

// All functions throw std::runtime_error with a message for people (its subclasses are in
// ferry/base/error.h; ferry::Cancelled after a stop). Not thread-safe: one generation at a time.
class Pipeline {
 public:
  // A folder, or "org/repo[@revision]" in the local Hugging Face cache. Reads headers only. The
  // first call opens the accelerator, if there is one: a program that uses torch itself calls it
  // before it asks torch for a device.
  static Pipeline load(const std::string& folder_or_name, const PipelineOptions& options = {});
  ~Pipeline();
  Pipeline(Pipeline&&) noexcept;
  Pipeline& operator=(Pipeline&&) noexcept;

  std::vector<Picture> generate(const PictureOptions& options);
  // Read from disk for streamed weights since loading.
  uint64_t bytes_streamed() const;
  // "FluxPipeline"
  std::string class_name() const;

 private:
  struct State;
  explicit Pipeline(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace ferry
