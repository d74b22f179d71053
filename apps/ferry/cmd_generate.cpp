// ferry generate: pictures from a prompt.
#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <list>
#include <map>

#include "command.h"
#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/base/system_info.h"
#include "ferry/base/trace.h"
#include "ferry/base/units.h"
#include "ferry/io/atomic_file.h"
#include "ferry/pipelines/loose_files.h"
#include "ferry/pipelines/memory_budget.h"
#include "ferry/pipelines/picture_options.h"
#include "ferry/pipelines/pipeline.h"
#include "ferry/pipelines/plan_components.h"
#include "ferry/pipelines/time_estimate.h"
#include "ferry/tensor/device.h"
#include "ferry/weights/lossless_pack.h"
#include "measure.h"
#include "packing_bar.h"
#include "quantizing_bar.h"
#include "stage_bars.h"
#include "tensor_file.h"

namespace ferry::cli {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

struct GenerateOptions {
  std::string model, output, latents, output_type = "image", dtype, device, variant, stats, trace;
  std::string embeds, save_embeds, quantize;
  std::vector<std::string> prompt, prompt_2, negative_prompt, negative_prompt_2;
  // Component -> file, and tokenizer -> folder.
  std::map<std::string, std::string> files, tokenizers;
  PictureOptions picture;  // all but the prompts, which may be several here
  std::optional<uint64_t> weights_memory, host_memory, reserve, pack_space, io_limit;
  std::string memory = "auto";
  std::optional<int> threads;
  int quality = 95;
  bool use_packs = false;
};

pipelines::LooseFiles loose_files(const GenerateOptions& options) {
  pipelines::LooseFiles files;
  for (const auto& [component, file] : options.files) {
    if (!file.empty()) files.models[component] = file;
  }
  for (const auto& [tokenizer, folder] : options.tokenizers) {
    if (!folder.empty()) files.tokenizers[tokenizer] = folder;
  }
  return files;
}

// a.png -> a-0.png, a-1.png, … where there are several.
std::string numbered(const std::string& path, size_t index, size_t count) {
  if (count == 1) return path;
  fs::path file(path);
  return (file.parent_path() /
          fmt::format("{}-{}{}", file.stem().string(), index, file.extension().string()))
      .string();
}

std::optional<pipelines::Texts> optional_texts(const std::vector<std::string>& texts) {
  if (texts.empty()) return std::nullopt;
  return pipelines::Texts(texts);
}

// What a picture was made from, for its file.
std::vector<std::pair<std::string, std::string>> picture_text(
    const GenerateOptions& options, uint64_t seed, size_t index, size_t count,
    const pipelines::DiffusionPipeline& pipeline, const pipelines::Image& image) {
  const size_t prompt = index / static_cast<size_t>(options.picture.num_images);
  std::vector<std::pair<std::string, std::string>> text;
  if (options.embeds.empty()) {
    text.emplace_back("prompt", options.prompt[prompt]);
  } else {
    text.emplace_back("embeds", options.embeds);
  }
  auto add = [&](const char* key, const auto& value) {
    if (value) text.emplace_back(key, fmt::format("{}", *value));
  };
  if (!options.prompt_2.empty())
    text.emplace_back("prompt_2", options.prompt_2[std::min(prompt, options.prompt_2.size() - 1)]);
  if (!options.negative_prompt.empty()) {
    text.emplace_back(
        "negative_prompt",
        options.negative_prompt[std::min(prompt, options.negative_prompt.size() - 1)]);
  }
  text.emplace_back("seed", std::to_string(seed));
  text.emplace_back("image", fmt::format("{} of {}", index + 1, count));
  add("steps", options.picture.steps);
  add("guidance_scale", options.picture.guidance_scale);
  add("true_cfg_scale", options.picture.true_cfg_scale);
  add("max_sequence_length", options.picture.max_sequence_length);
  text.emplace_back("width", std::to_string(image.width));
  text.emplace_back("height", std::to_string(image.height));
  text.emplace_back("pipeline", pipeline.class_name());
  if (!options.model.empty()) text.emplace_back("model", options.model);
  for (const auto& [component, file] : options.files) {
    if (!file.empty()) text.emplace_back(component, file);
  }
  if (!options.dtype.empty()) text.emplace_back("dtype", options.dtype);
  text.emplace_back("Software", "ferry " FERRY_VERSION);
  return text;
}

// The arguments that embeddings are given by, under the names of their tensors in a file.
std::map<std::string, std::optional<at::Tensor>*> embeds_of(pipelines::TextToImageArguments& a) {
  return {{"prompt_embeds", &a.prompt_embeds},
          {"pooled_prompt_embeds", &a.pooled_prompt_embeds},
          {"negative_prompt_embeds", &a.negative_prompt_embeds},
          {"negative_pooled_prompt_embeds", &a.negative_pooled_prompt_embeds}};
}

void load_embeds(const std::string& file, pipelines::TextToImageArguments& a) {
  const auto into = embeds_of(a);
  for (const auto& [name, tensor] : load_tensors(file)) {
    const auto place = into.find(name);
    if (place == into.end()) {
      throw_error<ArgumentError>(
          "--embeds {}: has a tensor \"{}\", expected prompt_embeds, pooled_prompt_embeds, "
          "negative_prompt_embeds and negative_pooled_prompt_embeds, as --save-embeds writes them",
          file, name);
    }
    *place->second = tensor;
  }
  if (!a.prompt_embeds)
    throw_error<ArgumentError>("--embeds {}: has no tensor \"prompt_embeds\"", file);
}

// In place of the prompts from here on.
void use_embeds(const pipelines::CallbackTensors& embeds, pipelines::TextToImageArguments& a) {
  const auto into = embeds_of(a);
  for (const auto& [name, tensor] : embeds) *into.at(name) = tensor;
  a.prompt = {};
  for (auto* texts : {&a.prompt_2, &a.negative_prompt, &a.negative_prompt_2}) texts->reset();
}

pipelines::TextToImageArguments arguments_of(const GenerateOptions& options, uint64_t seed) {
  pipelines::TextToImageArguments a = pipelines::arguments_of(options.picture, seed);
  a.prompt = pipelines::Texts(options.prompt);
  a.prompt_2 = optional_texts(options.prompt_2);
  a.negative_prompt = optional_texts(options.negative_prompt);
  a.negative_prompt_2 = optional_texts(options.negative_prompt_2);
  a.output_type = pipelines::parse_output_type(options.output_type);
  if (!options.embeds.empty()) load_embeds(options.embeds, a);
  if (!options.latents.empty()) {
    auto tensors = load_tensors(options.latents);
    if (auto it = tensors.find("latents"); it != tensors.end()) {
      a.latents = it->second;
    } else if (tensors.size() == 1) {
      a.latents = tensors.begin()->second;
    } else {
      throw_error<ArgumentError>("--latents {}: expected a tensor named \"latents\"",
                                 options.latents);
    }
  }
  return a;
}

offload::EngineOptions engine_options(const GenerateOptions& options, at::Device device,
                                      const Context& context, Trace* trace) {
  offload::EngineOptions engine;
  engine.device = device;
  engine.host_memory_bytes = options.host_memory.value_or(0);
  engine.read.rate_limit_bytes_per_s = options.io_limit.value_or(0);
  engine.stop = context.stop;
  engine.trace = trace;
  return engine;
}

// Lossless packs of what runs every step, made if they are not there and `space_bytes` holds them,
// so that a step that waits for the disk waits less.
void offer_packs(pipelines::DiffusionPipeline& pipeline, uint64_t space_bytes,
                 const Context& context) {
  // What is packed takes about this part of bf16 weights.
  constexpr double kPackedPart = 0.7;
  weights::PackCache cache;
  for (const auto& [name, component] : pipeline.components()) {
    if (!component.model || !pipelines::runs_every_step(*component.model)) continue;
    weights::Binding& binding = *component.model->binding();
    auto pack = weights::find_cached_pack(cache, *binding.checkpoint);
    if (!pack) {
      const uint64_t bytes = binding.checkpoint->total_bytes();
      const auto packed = static_cast<uint64_t>(kPackedPart * static_cast<double>(bytes));
      if (packed > space_bytes) {
        log::info("{}: a lossless pack would take about {}, --pack-space allows {}", name,
                  format_bytes(packed), format_bytes(space_bytes));
        continue;
      }
      PackingBar packing("packing " + name, *component.model, context);
      pack = weights::make_cached_pack(cache, *binding.checkpoint, packing.options());
      packing.bar().finish();
    }
    weights::offer_pack(binding, *pack);
  }
}

// Sets the pipeline up for the memory that was asked for, and says in one line what was chosen, how
// long it will take, and why.
void set_memory(const GenerateOptions& options, const pipelines::TextToImageArguments& arguments,
                const pipelines::GenerationSize& size, pipelines::DiffusionPipeline& pipeline,
                const offload::Measurements& measurements, offload::EngineOptions engine,
                const Context& context) {
  std::optional<uint64_t> budget = options.weights_memory;
  std::optional<pipelines::MemoryChoice> choice;
  if (!budget) {
    choice = pipelines::choose_memory(
        pipeline, size, engine.device,
        {.memory_bytes = pipelines::parse_memory(options.memory, "--memory"),
         .reserve_bytes = options.reserve.value_or(0)});
    budget = choice->weights_memory_bytes();
  }
  const pipelines::TimeEstimate estimate =
      pipelines::estimate_time(pipeline, size, arguments.num_inference_steps, engine.device, budget,
                               engine.read.rate_limit_bytes_per_s, measurements);
  if (options.pack_space && estimate.step_s && estimate.bound == offload::Bound::disk)
    offer_packs(pipeline, *options.pack_space, context);
  if (choice) {
    pipelines::apply_memory(pipeline, *choice, engine);
  } else {
    engine.weights_memory_bytes = *budget;
    pipeline.enable_group_offload(std::make_shared<offload::Engine>(engine));
  }
  if (context.quiet) return;
  fmt::print("memory {}; {}\n",
             choice ? choice->describe() : format_bytes(*budget) + " for weights",
             estimate.describe());
}

int run_generate(const GenerateOptions& options, Context& context) {
  auto start = Clock::now();
  bool latent = pipelines::parse_output_type(options.output_type) == pipelines::OutputType::latent;
  for (const std::string* path :
       {&options.output, &options.stats, &options.trace, &options.save_embeds})
    check_writable_parent(*path);
  if (options.prompt.empty() == options.embeds.empty()) {
    throw_error<ArgumentError>(
        "generate: give either --prompt, or --embeds with what --save-embeds kept");
  }
  if (latent) {
    if (fs::path(options.output).extension() != ".safetensors") {
      throw_error<ArgumentError>("--output {}: latents are written as .safetensors",
                                 options.output);
    }
  } else {
    pipelines::check_image_extension(options.output);
  }
  set_threads(options.threads);
  at::Device device = tensor::parse_device(options.device);
  uint64_t seed = pipelines::seed_of(options.picture);
  Trace trace;
  Trace* tracing = options.trace.empty() ? nullptr : &trace;
  pipelines::TextToImageArguments arguments = arguments_of(options, seed);

  pipelines::PipelineLoadOptions load;
  load.dtype = pipelines::DtypeMap::parse(options.dtype);
  load.variant = options.variant;
  load.use_packs = options.use_packs;
  load.quantize = pipelines::parse_quantize(options.quantize);
  std::list<QuantizingBar> bars;
  for (auto& [name, quantize] : load.quantize)
    bars.emplace_back("quantizing " + name + ", layers", context).attach(quantize);
  // Without texts the encoders are not even opened.
  load.without_text_encoders = arguments.prompt_embeds && !arguments.negative_prompt;
  auto pipeline = pipelines::load_pipeline(options.model, loose_files(options), load);
  bars.clear();
  const pipelines::GenerationSize size = pipelines::generation_size(*pipeline, arguments);
  const offload::Measurements measurements(offload::Measurements::default_folder());
  set_memory(options, arguments, size, *pipeline, measurements,
             engine_options(options, device, context, tracing), context);
  double load_seconds = std::chrono::duration<double>(Clock::now() - start).count();

  StageBars stages(progress_mode(context), tracing);
  arguments.progress = [&](const pipelines::Progress& progress) {
    stages.update(progress.stage, progress.step, progress.total);
  };
  arguments.stop = context.stop;
  if (!options.save_embeds.empty()) {
    const pipelines::CallbackTensors embeds = pipeline->encode_prompts(arguments);
    save_tensors(options.save_embeds, embeds);
    use_embeds(embeds, arguments);
  }
  pipelines::PipelineOutput output = pipeline->text_to_image(arguments);
  context.stop.throw_if_stopped();
  pipelines::remember_times(*pipeline, size, device, measurements);

  std::vector<std::string> written;
  std::string what;
  if (latent) {
    if (!at::isfinite(output.tensor).all().item<bool>()) {
      throw_error<Error>(
          "the latents hold NaN or infinite values; nothing was written. Try --dtype fp32 or bf16");
    }
    save_tensors(options.output, {{"latents", output.tensor}});
    written.push_back(options.output);
    what = fmt::format("latents [{}]", fmt::join(output.tensor.sizes(), ", "));
  } else {
    for (size_t i = 0; i < output.images.size(); ++i) {
      const pipelines::Image& image = output.images[i];
      written.push_back(numbered(options.output, i, output.images.size()));
      pipelines::save_image(
          image, written.back(),
          {.quality = options.quality,
           .text = picture_text(options, seed, i, output.images.size(), *pipeline, image)});
      what = fmt::format("{}x{}", image.width, image.height);
    }
  }
  double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  offload::Report report = pipeline->engine() ? pipeline->engine()->report() : offload::Report{};
  uint64_t weight_bytes = 0;
  for (const auto& [name, component] : pipeline->components()) {
    if (component.model)
      weight_bytes += weights::total_bytes(weights::collect_slots(*component.model));
  }
  if (!options.trace.empty()) io::write_file(options.trace, trace.to_json());
  if (!options.stats.empty()) {
    nlohmann::ordered_json stats = {{"pipeline", pipeline->class_name()},
                                    {"seed", seed},
                                    {"files", written},
                                    {"load_seconds", load_seconds},
                                    {"stage_seconds", stages.seconds()},
                                    {"total_seconds", seconds},
                                    {"bytes_read", report.bytes_read},
                                    {"weight_bytes", weight_bytes},
                                    {"device", device.str()},
                                    {"peak_rss_bytes", peak_rss_bytes()}};
    if (!device.is_cpu()) stats["peak_device_bytes"] = peak_device_bytes(device);
    if (pipeline->engine()) {
      stats["weights_memory_bytes"] = pipeline->engine()->options().weights_memory_bytes;
      stats["peak_weights_bytes"] = report.peak_bytes;
      stats["stall_seconds"] = report.stall_seconds;
    }
    write_json(options.stats, stats);
  }
  if (!context.quiet) {
    fmt::print(
        "{}: {}, seed {}, {}, peak memory {}, {}\n", fmt::join(written, " "), what, seed,
        format_duration(seconds), format_bytes(peak_rss_bytes()),
        pipeline->engine()
            ? fmt::format("{} streamed (weights {} in {})", format_bytes(report.bytes_read),
                          format_bytes(weight_bytes), format_bytes(report.peak_bytes))
            : fmt::format("weights {} resident{}", format_bytes(weight_bytes),
                          device.is_cpu() ? ""
                                          : fmt::format(" on {}, peak there {}", device.str(),
                                                        format_bytes(peak_device_bytes(device)))));
  }
  return 0;
}

}  // namespace

Command add_generate(CLI::App& app) {
  auto o = std::make_shared<GenerateOptions>();
  CLI::App* command = app.add_subcommand("generate", "Make pictures from a prompt");
  command->footer(
      "Makes pictures from a prompt with a pipeline folder as Python diffusers writes it. Weights\n"
      "that do not fit into --memory are streamed from disk while the model computes.");
  command
      ->add_option("-m,--model", o->model,
                   "pipeline folder, or org/repo[@revision] in the local Hugging Face cache")
      ->type_name("DIR|NAME");
  for (const char* component : {"transformer", "text_encoder", "text_encoder_2", "vae"}) {
    std::string flag = fmt::format("--{}", component);
    std::replace(flag.begin(), flag.end(), '_', '-');
    command
        ->add_option(flag, o->files[component],
                     "single file (.gguf, .safetensors) in place of the folder's component; with "
                     "files for all, no --model is needed")
        ->type_name("FILE");
  }
  for (const char* tokenizer : {"tokenizer", "tokenizer_2"}) {
    std::string flag = fmt::format("--{}", tokenizer);
    std::replace(flag.begin(), flag.end(), '_', '-');
    command
        ->add_option(flag, o->tokenizers[tokenizer],
                     "tokenizer's folder in place of the model folder's")
        ->type_name("DIR");
  }
  // take one value each, so that a prompt never swallows what follows
  auto texts = [&](const std::string& flags, std::vector<std::string>& into,
                   const std::string& help) {
    return command->add_option(flags, into, help)
        ->type_name("TEXT")
        ->type_size(1)
        ->allow_extra_args(false);
  };
  texts("-p,--prompt", o->prompt, "what to draw; repeat for several pictures");
  command
      ->add_option("-o,--output", o->output,
                   "file to write: .png, .jpg, .webp (latents: .safetensors)")
      ->required()
      ->type_name("FILE");
  texts("--prompt-2", o->prompt_2, "for the second text encoder [default: --prompt]");
  texts("--negative-prompt", o->negative_prompt, "what not to draw; with --true-cfg-scale above 1");
  texts("--negative-prompt-2", o->negative_prompt_2, "for the second text encoder");
  command
      ->add_option("-W,--width", o->picture.width,
                   "pixels [default: what the model was trained on]")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  command
      ->add_option("-H,--height", o->picture.height,
                   "pixels [default: what the model was trained on]")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  command->add_option("--steps", o->picture.steps, "denoising steps [default: 28]")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  command
      ->add_option("--guidance-scale", o->picture.guidance_scale,
                   "for models with guidance embeddings [default: 3.5]")
      ->type_name("X");
  command
      ->add_option("--true-cfg-scale", o->picture.true_cfg_scale,
                   "classifier-free guidance, two passes a step [default: 1]")
      ->type_name("X");
  command
      ->add_option("--max-sequence-length", o->picture.max_sequence_length,
                   "tokens of the prompt, at most 512 [default: 512]")
      ->check(CLI::Range(1, 512))
      ->type_name("N");
  command->add_option("-s,--seed", o->picture.seed, "of the noise [default: random, and told]")
      ->type_name("N");
  command->add_option("-n,--num-images", o->picture.num_images, "pictures of each prompt")
      ->check(CLI::PositiveNumber)
      ->type_name("N")
      ->capture_default_str();
  command->add_option("--latents", o->latents, "start from these packed latents (safetensors)")
      ->type_name("FILE");
  command
      ->add_option("--save-embeds", o->save_embeds,
                   "also write what the text encoders make of the prompts (safetensors)")
      ->type_name("FILE");
  command
      ->add_option(
          "--embeds", o->embeds,
          "what --save-embeds wrote, in place of prompts: the text encoders are not needed")
      ->type_name("FILE");
  command->add_option("--output-type", o->output_type, "image or latent")
      ->check(CLI::IsMember({"image", "latent"}))
      ->capture_default_str();
  command->add_option("--quality", o->quality, "of JPEG and WebP")
      ->check(CLI::Range(1, 100))
      ->capture_default_str();
  command
      ->add_option("--dtype", o->dtype,
                   "bf16, fp16 or fp32; or transformer=bf16,vae=fp32 [default: as stored]")
      ->type_name("DTYPE");
  command->add_option("--variant", o->variant, "weights variant, e.g. fp16")->type_name("NAME");
  add_device(command, o->device);
  command->add_option("--threads", o->threads, "compute threads")
      ->check(CLI::PositiveNumber)
      ->type_name("N");
  CLI::Option* memory =
      command
          ->add_option(
              "--memory", o->memory,
              "for everything where compute happens, e.g. 6GB: weights that do not fit are "
              "streamed; auto: what is free, leaving a tenth of it")
          ->check([](const std::string& text) -> std::string {
            try {
              if (text != "auto") parse_bytes(text);
              return {};
            } catch (const Error& error) {
              return error.what();
            }
          })
          ->type_name("BYTES|auto")
          ->capture_default_str();
  CLI::Option* reserve =
      add_bytes(command, "--reserve", o->reserve, "keep this much of --memory free");
  add_bytes(command, "--weights-memory", o->weights_memory,
            "for the weights alone, e.g. 4GB or 512MiB")
      ->excludes(memory)
      ->excludes(reserve);
  add_bytes(command, "--host-memory", o->host_memory,
            "pinned host memory on an accelerator: weights that fit in it need no disk [default: "
            "staging]");
  command->add_flag("--use-packs", o->use_packs,
                    "read lossless packs of the weights from the cache (ferry pack makes them)");
  add_bytes(command, "--pack-space", o->pack_space,
            "where the disk is the limit, keep lossless packs of up to this size in the cache and "
            "read those");
  command
      ->add_option("--quantize", o->quantize,
                   "quantize as it is loaded, once, into the pack cache: int8wo, or "
                   "transformer=int8wo,text_encoder_2=nf4")
      ->type_name("SCHEME");
  add_rate(command, "--io-limit", o->io_limit, "read no faster than this, e.g. 500MB/s");
  command->add_option("--stats", o->stats, "write times, bytes and peak memory as JSON")
      ->type_name("FILE");
  command->add_option("--trace", o->trace, "write a Chrome/Perfetto trace")->type_name("FILE");
  return {command, [o](Context& context) { return run_generate(*o, context); }};
}

}  // namespace ferry::cli
