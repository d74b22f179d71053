#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <thread>

#include "../io/temp_folder.h"
#include "ferry/pipelines/image.h"
#include "ferry/weights/binding.h"
#include "run_ferry.h"

namespace ferry {
namespace {

namespace fs = std::filesystem;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;
using testing_apps::ferry;
using testing_apps::Result;
using testing_apps::start;
using testing_apps::tiny_picture;
using testing_io::read_text;
using testing_io::TempFolder;
using testing_io::write_text;

const std::string kFixtures = FERRY_FIXTURES;

at::Tensor tensor(const fs::path& file, const std::string& name) {
  auto checkpoint = weights::Checkpoint::open_file(file);
  const auto* stored = checkpoint->find(name);
  EXPECT_NE(stored, nullptr) << name;
  return stored ? weights::read_stored(*stored) : at::Tensor();
}

#ifdef FERRY_WITH_JEMALLOC
// Else every step faults its activations in anew, or holds pages too small for what comes next.
TEST(Cli, TheAllocatorKeepsThePagesOfActivations) {
  setenv("MALLOC_CONF", "stats_print:true", /*overwrite=*/1);
  const Result result = ferry({"--version"});
  unsetenv("MALLOC_CONF");
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.err, HasSubstr("opt.dirty_decay_ms: -1"));
  EXPECT_THAT(result.err, HasSubstr("opt.oversize_threshold: 0"));
  EXPECT_THAT(result.err, HasSubstr("opt.lg_extent_max_active_fit: 63"));
  EXPECT_THAT(result.err, ContainsRegex("mapped: *17[0-9]{9}"));  // 16 GiB of addresses in one
}
#endif

TEST(Cli, WrongUseExitsWithTwoAndOneMessage) {
  for (std::vector<std::string> arguments : std::vector<std::vector<std::string>>{
           {},
           {"generat"},
           {"forward"},
           {"generate", "--prompt", "x"},
           {"forward", "a", "--no-such-option"},
           {"generate", "--model", "a", "--prompt", "x", "--output", "a.png", "--weights-memory",
            "12parsecs"},
           {"generate", "--model", "a", "--prompt", "x", "--output", "a.xyz"},
           {"generate", "--model", "a", "--prompt", "x", "--output", "a.png", "--steps", "0"},
           {"random", "NoSuchModel", "--config", "flux-dev", "--out", "x"},
           {"random", "FluxTransformer2DModel", "--config", "no-such-preset", "--out", "x"},
           {"plan"},
           {"plan", "--preset", "no-such-preset"},
           {"plan", "--preset", "flux-dev", "--hardware", "gtx-1"},
           {"plan", "--preset", "flux-dev", "--memory", "8GiB", "--weights-memory", "8GiB"},
           {"--log-level", "loud", "doctor"}}) {
    Result result = ferry(arguments);
    EXPECT_EQ(result.code, 2) << ::testing::PrintToString(arguments) << result.err;
    EXPECT_THAT(result.err, HasSubstr("ferry: error: "));
    EXPECT_EQ(result.out, "");
  }
}

TEST(Cli, HelpAndVersion) {
  Result help = ferry({"--help"});
  EXPECT_EQ(help.code, 0);
  for (const char* name : {"generate", "inspect", "forward", "schedule", "tokenize", "random",
                           "plan", "pack", "cache", "doctor"}) {
    EXPECT_THAT(help.out, HasSubstr(name));
    Result own = ferry({name, "--help"});
    EXPECT_EQ(own.code, 0) << name;
    EXPECT_THAT(own.out, HasSubstr("--help")) << name;
  }
  EXPECT_THAT(ferry({"generate", "--help"}).out, HasSubstr("Excludes: --memory --reserve"));
  EXPECT_THAT(ferry({"--version"}).out, HasSubstr("ferry 0."));
}

TEST(Cli, MissingInputIsAnErrorNotWrongUse) {
  Result result = ferry(
      {"generate", "--model", "/no/such/model", "--prompt", "x", "--output", "/tmp/never.png"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("/no/such/model"));
  setenv("HF_HUB_CACHE", "/no/such/cache", 1);
  result = ferry({"inspect", "org/model"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("hf download org/model"));
}

TEST(Cli, ForwardWritesOutputsStatsAndDump) {
  TempFolder folder;
  std::string component = kFixtures + "/models/FluxTransformer2DModel-0";
  for (bool streamed : {false, true}) {
    std::vector<std::string> arguments = {"forward",   component,
                                          "--inputs",  component + "/inputs.safetensors",
                                          "--output",  (folder / "out.safetensors").string(),
                                          "--stats",   (folder / "stats.json").string(),
                                          "--dump",    "transformer_blocks",
                                          "--threads", "1",
                                          "--repeat",  "3",
                                          "--cold"};
    if (streamed) arguments.insert(arguments.end(), {"--weights-memory", "256KiB"});
    Result result = ferry(arguments);
    ASSERT_EQ(result.code, 0) << result.err;
    at::Tensor expected = tensor(component + "/outputs.safetensors", "sample");
    at::Tensor got = tensor(folder / "out.safetensors", "sample");
    EXPECT_LT((got - expected).abs().max().item<double>(),
              1e-5 * expected.abs().max().item<double>());
    tensor(folder / "out.safetensors", "transformer_blocks.0.norm1.0");
    auto stats = nlohmann::json::parse(read_text(folder / "stats.json"));
    EXPECT_EQ(stats["forward_seconds"].size(), 3u);
    EXPECT_EQ(stats["bytes_read"].size(), 3u);
    EXPECT_GT(stats["peak_rss_bytes"].get<uint64_t>(), 10'000'000u);
    EXPECT_GT(stats["process_start_to_first_compute_seconds"].get<double>(), 0);
    if (!streamed) {
      EXPECT_EQ(stats["bytes_read"][1].get<uint64_t>(), 0u);
    }
  }
}

TEST(Cli, ForwardRefusesUnknownInputs) {
  TempFolder folder;
  std::string component = kFixtures + "/models/FluxTransformer2DModel-0";
  Result result = ferry({"forward", component, "--inputs",
                         kFixtures + "/models/T5EncoderModel-0/inputs.safetensors", "--output",
                         (folder / "out.safetensors").string()});
  EXPECT_EQ(result.code, 2);
  EXPECT_THAT(result.err, HasSubstr("input_ids"));
  EXPECT_FALSE(fs::exists(folder / "out.safetensors"));
}

TEST(Cli, RandomWritesAComponentThatForwardRuns) {
  TempFolder folder;
  std::string out = (folder / "t5").string();
  ASSERT_EQ(ferry({"random", "T5EncoderModel", "--config", "t5-xxl-tiny", "--dtype", "fp32",
                   "--seed", "3", "--out", out})
                .code,
            0);
  std::string again = (folder / "sharded").string();
  ASSERT_EQ(ferry({"random", "T5EncoderModel", "--config", "t5-xxl-tiny", "--dtype", "fp32",
                   "--seed", "3", "--out", again, "--max-shard-size", "50kB"})
                .code,
            0);
  EXPECT_TRUE(fs::exists(fs::path(again) / "model.safetensors.index.json"));
  auto first = weights::Checkpoint::open_folder(out, "model"),
       second = weights::Checkpoint::open_folder(again, "model");
  ASSERT_EQ(first->tensors().size(), second->tensors().size());
  for (const auto& stored : first->tensors()) {
    EXPECT_TRUE(
        at::equal(weights::read_stored(stored), weights::read_stored(*second->find(stored.key))))
        << stored.key;
  }
  io::SafetensorsWriter writer(folder / "in.safetensors", {{"input_ids", io::Dtype::I64, {1, 3}}});
  int64_t ids[] = {5, 6, 1};
  writer.write(std::as_bytes(std::span(ids)));
  writer.finish();
  Result result = ferry({"forward", again, "--inputs", (folder / "in.safetensors").string(),
                         "--output", (folder / "out.safetensors").string()});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_TRUE(
      at::isfinite(tensor(folder / "out.safetensors", "last_hidden_state")).all().item<bool>());
}

TEST(Cli, TokenizeGivesHuggingFacesIds) {
  TempFolder folder;
  std::string tokenizer = kFixtures + "/tokenizers/clip-files";
  ASSERT_EQ(ferry({"tokenize", tokenizer, "--input", tokenizer + "/strings.jsonl", "--output",
                   (folder / "ids").string(), "--max-length", "16"})
                .code,
            0);
  std::istringstream got(read_text(folder / "ids")),
      expected(read_text(tokenizer + "/ids_max16.jsonl"));
  for (std::string a, b; std::getline(expected, b);) {
    ASSERT_TRUE(std::getline(got, a));
    ASSERT_EQ(nlohmann::json::parse(a), nlohmann::json::parse(b));
  }
}

TEST(Cli, GenerateWritesPicturesWithTheirParameters) {
  TempFolder folder;
  std::vector<std::string> arguments =
      tiny_picture(folder / "x.png",
                   {"--num-images", "2", "--weights-memory", "256KiB", "--stats",
                    (folder / "stats.json").string(), "--trace", (folder / "trace.json").string()});
  Result result = ferry(arguments);
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("x-0.png"));
  EXPECT_THAT(result.out, HasSubstr("peak memory"));
  EXPECT_THAT(result.err, HasSubstr("denoising"));
  std::vector<std::pair<std::string, std::string>> text;
  auto image = pipelines::load_png(folder / "x-1.png", &text);
  EXPECT_EQ(image.width, 48);
  EXPECT_THAT(text,
              ::testing::Contains(std::pair<std::string, std::string>("prompt", "a red circle")));
  EXPECT_THAT(text, ::testing::Contains(std::pair<std::string, std::string>("seed", "5")));
  auto stats = nlohmann::json::parse(read_text(folder / "stats.json"));
  EXPECT_GT(stats["bytes_read"].get<uint64_t>(), 0u);
  EXPECT_TRUE(nlohmann::json::parse(read_text(folder / "trace.json"))["traceEvents"].is_array());
  arguments.push_back("--quiet");
  result = ferry(arguments);
  EXPECT_EQ(result.out + result.err, "");
}

std::vector<uint8_t> pixels(const fs::path& png) {
  return pipelines::load_png(png).pixels;
}

TEST(Cli, EmbeddingsAreKeptAndTakeThePlaceOfPrompts) {
  TempFolder folder;
  const std::string embeds = (folder / "embeds.safetensors").string();
  const std::vector<std::string> guided = {"--negative-prompt", "stars", "--true-cfg-scale", "2"};
  ASSERT_EQ(ferry(tiny_picture(folder / "plain.png", guided)).code, 0);
  std::vector<std::string> saving = guided;
  saving.insert(saving.end(), {"--save-embeds", embeds});
  Result result = ferry(tiny_picture(folder / "saved.png", saving));
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_TRUE(pixels(folder / "saved.png") == pixels(folder / "plain.png"));
  EXPECT_EQ(tensor(embeds, "prompt_embeds").dim(), 3);
  tensor(embeds, "negative_pooled_prompt_embeds");

  // From a pipeline that has no text encoders any more.
  const fs::path model = folder / "model";
  fs::copy(kFixtures + "/pipelines/flux-tiny", model, fs::copy_options::recursive);
  for (const char* part : {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"})
    fs::remove_all(model / part);
  auto from = [&](const std::string& file, const std::vector<std::string>& more = {}) {
    std::vector<std::string> options = {"--embeds", file};
    options.insert(options.end(), more.begin(), more.end());
    std::vector<std::string> arguments = tiny_picture(folder / "given.png", options, "");
    arguments[2] = model.string();
    return ferry(arguments);
  };
  result = from(embeds, {"--true-cfg-scale", "2"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_TRUE(pixels(folder / "given.png") == pixels(folder / "plain.png"));
  std::vector<std::pair<std::string, std::string>> text;
  pipelines::load_png(folder / "given.png", &text);
  EXPECT_THAT(text, ::testing::Contains(std::pair<std::string, std::string>("embeds", embeds)));

  // Files that are none, and the wrong ones.
  const std::string latents = (folder / "latents.safetensors").string();
  ASSERT_EQ(ferry(tiny_picture(latents, {"--output-type", "latent"})).code, 0);
  result = from(latents);
  EXPECT_EQ(result.code, 2);
  EXPECT_THAT(result.err, HasSubstr("has a tensor \"latents\", expected prompt_embeds"));
  result = from((folder / "none.safetensors").string());
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("none.safetensors"));
  io::SafetensorsWriter writer(folder / "small.safetensors",
                               {{"prompt_embeds", io::Dtype::F32, {1, 2, 1}},
                                {"pooled_prompt_embeds", io::Dtype::F32, {1, 1}}});
  const float values[3] = {1, 2, 3};
  writer.write(std::as_bytes(std::span(values)).first(8));
  writer.write(std::as_bytes(std::span(values)).last(4));
  writer.finish();
  result = from((folder / "small.safetensors").string());
  EXPECT_EQ(result.code, 2);
  EXPECT_THAT(result.err, HasSubstr("got [1, 2, 1] and pooled [1, 1], expected"));
  result = ferry(tiny_picture(folder / "x.png", {"--embeds", embeds}));
  EXPECT_EQ(result.code, 2);
  EXPECT_THAT(result.err, HasSubstr("either --prompt, or --embeds"));
}

// The line before the first step: what was chosen, how long it takes, and why.
TEST(Cli, GenerateSaysWhatItChose) {
  TempFolder folder;
  setenv("FERRY_CACHE_DIR", (folder / "cache").c_str(), 1);
  auto line = [&](const std::vector<std::string>& more, const std::string& model = "") {
    std::vector<std::string> arguments = tiny_picture(folder / "x.png", more);
    if (!model.empty()) arguments[2] = model;
    Result result = ferry(arguments);
    EXPECT_EQ(result.code, 0) << result.err;
    return result.out.substr(0, result.out.find('\n'));
  };
  const std::string first = line({});
  EXPECT_THAT(first, HasSubstr("memory "));
  EXPECT_THAT(first, HasSubstr("left to other programs"));
  EXPECT_THAT(first, HasSubstr("how long it takes is not known"));
  const std::string second = line({});
  EXPECT_THAT(second, HasSubstr("2 steps in about"));
  EXPECT_THAT(second, HasSubstr("limited by computing"));
  const std::string reserved = line({"--memory", "4GiB", "--reserve", "1GiB"});
  EXPECT_THAT(reserved, HasSubstr("4.00 GiB: 1.00 GiB reserved"));
  const std::string shapes = std::string(FERRY_MODELS) + "/shapes";
  line({}, shapes);
  const std::string slow = line({"--weights-memory", "2MiB", "--io-limit", "20MB/s"}, shapes);
  EXPECT_THAT(slow, HasSubstr("2.00 MiB for weights; 2 steps in about"));
  EXPECT_THAT(slow, HasSubstr("limited by the disk; with 1 GiB more memory"));
  Result result = ferry(tiny_picture(folder / "x.png", {"--memory", "1GiB", "--reserve", "1GiB"}));
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("1.00 GiB reserved"));
  EXPECT_EQ(
      ferry(tiny_picture(folder / "x.png", {"--weights-memory", "1GiB", "--reserve", "1GiB"})).code,
      2);
  unsetenv("FERRY_CACHE_DIR");
}

TEST(Cli, StoppedGenerationLeavesNothingBehind) {
  TempFolder folder, logs;
  pid_t child = start({"generate", "--model", kFixtures + "/pipelines/flux-tiny", "--prompt", "x",
                       "--width", "256", "--height", "256", "--steps", "100000",
                       "--max-sequence-length", "16", "--output", (folder / "x.png").string()},
                      logs / "out", logs / "err");
  for (int i = 0; i < 600 && read_text(logs / "err").find("denoising") == std::string::npos; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  auto asked = std::chrono::steady_clock::now();
  kill(child, SIGINT);
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 130);
  EXPECT_LT(std::chrono::steady_clock::now() - asked, std::chrono::seconds(20));
  EXPECT_EQ(folder.entries(), 0u);
}

TEST(Cli, InspectDescribesPipelinesAndFiles) {
  Result result = ferry({"inspect", kFixtures + "/pipelines/flux-tiny", "--json"});
  ASSERT_EQ(result.code, 0) << result.err;
  auto d = nlohmann::json::parse(result.out);
  EXPECT_EQ(d["class"], "FluxPipeline");
  EXPECT_EQ(d["components"]["transformer"]["class"], "FluxTransformer2DModel");
  EXPECT_GT(d["components"]["transformer"]["parameters"].get<int64_t>(), 1000);
  EXPECT_GT(d["components"]["transformer"]["streaming"]["smallest_budget_bytes"].get<int64_t>(), 0);
  EXPECT_TRUE(d["components"]["image_encoder"]["class"].is_null());
  EXPECT_EQ(ferry({"inspect", kFixtures + "/pipelines/flux-tiny"}).code, 0);
  result = ferry({"inspect", kFixtures + "/models/T5EncoderModel-0/model.safetensors"});
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.out, HasSubstr("F32"));
  result = ferry({"inspect", "--traits", "FluxTransformer2DModel"});
  EXPECT_THAT(result.out, HasSubstr("FluxTransformerBlock"));
  EXPECT_THAT(result.out, HasSubstr("\"_supports_gradient_checkpointing\": true"));
}

// What inspect calls the least is enough, and 2 KiB less is not.
TEST(Cli, TheLeastBudgetIsTheLeast) {
  TempFolder folder;
  auto code_with = [&](const std::string& model, uint64_t budget) {
    Result result =
        ferry({"generate", "--model", model, "--prompt", "a red circle", "--steps", "1", "--width",
               "16", "--height", "16", "--max-sequence-length", "8", "--seed", "1", "--output",
               (folder / "a.png").string(), "--weights-memory", std::to_string(budget)});
    if (result.code != 0) {
      EXPECT_THAT(result.err, HasSubstr("at least"));
    }
    return result.code;
  };
  for (const std::string& model :
       {kFixtures + "/pipelines/flux-tiny", std::string(FERRY_MODELS) + "/shapes"}) {
    auto d = nlohmann::json::parse(ferry({"inspect", model, "--json"}).out);
    uint64_t least = d["smallest_budget_bytes"];
    EXPECT_LT(least, d["bytes"].get<uint64_t>());
    EXPECT_EQ(code_with(model, least), 0) << model << " " << least;
    EXPECT_EQ(code_with(model, least - 2048), 1) << model << " " << least;
  }
}

TEST(Cli, RefusesAConfigThatNoModelHas) {
  TempFolder folder;
  write_text(folder / "config.json", R"({"num_layers": 1099511627776})");
  Result result = ferry({"random", "FluxTransformer2DModel", "--config",
                         (folder / "config.json").string(), "--out", (folder / "out").string()});
  EXPECT_EQ(result.code, 2);
  EXPECT_THAT(result.err, HasSubstr("num_layers: got 1099511627776, expected 0 to 512"));
  EXPECT_FALSE(fs::exists(folder / "out"));
}

// Without the weights, for hardware that is not here.
TEST(Cli, PlanPredictsMemoryAndTime) {
  TempFolder folder;
  const std::string svg = (folder / "step.svg").string();
  const std::vector<std::string> command = {"plan",  "--preset",   "flux-dev", "--memory",
                                            "8GiB",  "--hardware", "rtx-4060", "--host-memory",
                                            "12GiB", "--svg",      svg};
  Result result = ferry(command);
  ASSERT_EQ(result.code, 0) << result.err;
  for (const char* expected : {"transformer_blocks.0 to 18", "single_transformer_blocks.0 to 37",
                               "text_encoder_2", "predicted peak", "with 1 GiB more of --memory",
                               "with 1 GiB more of --host-memory", "a step takes", "compute  "})
    EXPECT_THAT(result.out, HasSubstr(expected));
  EXPECT_THAT(read_text(svg), HasSubstr("single_transformer_blocks.37.proj_out"));

  std::vector<std::string> as_json = command;
  as_json.push_back("--json");
  result = ferry(as_json);
  ASSERT_EQ(result.code, 0) << result.err;
  const auto json = nlohmann::json::parse(result.out);
  ASSERT_EQ(json["components"].size(), 4u);
  for (const auto& component : json["components"]) {
    SCOPED_TRACE(component["name"].get<std::string>());
    EXPECT_LE(component["peak_bytes"].get<uint64_t>(), 8ull << 30);
    EXPECT_LE(component["host_peak_bytes"].get<uint64_t>(), 12ull << 30);
    EXPECT_GT(component["first_step_s"].get<double>(), 0);
  }
  const auto& transformer = json["components"][2];
  EXPECT_EQ(transformer["class"], "FluxTransformer2DModel");
  // 11.90e9 parameters (diffusers' FLUX.1-dev), two bytes each.
  EXPECT_NEAR(transformer["weight_bytes"].get<double>(), 2 * 11.9014e9, 1e6);
  uint64_t groups = 0;
  for (const auto& group : transformer["groups"]) groups += group["bytes"].get<uint64_t>();
  EXPECT_EQ(groups, transformer["resident_bytes"].get<uint64_t>() +
                        transformer["streamed_bytes"].get<uint64_t>());
}

TEST(Cli, PlanUnderAWeightsBudgetHoldsIt) {
  Result result = ferry({"plan", "--preset", "t5-xxl", "--weights-memory", "2GiB"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("weights in all"));
  EXPECT_THAT(result.out, HasSubstr("of 2.00 GiB (--weights-memory)"));
}

TEST(Cli, PlanReadsFoldersAndStatesTheLeastMemory) {
  const std::string pipeline = kFixtures + "/pipelines/flux-tiny";
  Result result = ferry({"plan", pipeline, "--memory", "1GiB", "--width", "64", "--height", "64"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("text_encoder_2"));
  result = ferry({"plan", "--preset", "flux-dev", "--memory", "600MiB"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("--memory 600 MiB is too small: vae needs"));
}

TEST(Cli, DoctorReportsTheMachine) {
  TempFolder folder;
  Result result = ferry({"doctor", folder.path().string(), "--json", "--test-size", "32MiB"});
  ASSERT_EQ(result.code, 0) << result.err;
  auto report = nlohmann::json::parse(result.out);
  EXPECT_GT(report["memory"]["total_bytes"].get<uint64_t>(), 0u);
  EXPECT_GT(report["disk"]["read_bytes_per_s"].get<uint64_t>(), 0u);
  EXPECT_EQ(folder.entries(), 0u);
  EXPECT_NE(report["accelerator"]["reason"].get<std::string>(), "");
}

TEST(Cli, TheDeviceIsChosenByOptionOrEnvironment) {
  TempFolder folder;
  Result doctor = ferry({"doctor", folder.path().string(), "--json", "--test-size", "32MiB"});
  auto accelerator = nlohmann::json::parse(doctor.out)["accelerator"];
  const bool found = accelerator["found"];
  std::string component = kFixtures + "/models/CLIPTextModel-0";
  auto forward = [&](const std::vector<std::string>& more) {
    std::vector<std::string> arguments = {"forward",  component,
                                          "--inputs", component + "/inputs.safetensors",
                                          "--output", (folder / "out.safetensors").string(),
                                          "--stats",  (folder / "stats.json").string()};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return ferry(arguments);
  };
  auto used = [&] {
    return nlohmann::json::parse(read_text(folder / "stats.json"))["device"].get<std::string>();
  };
  ASSERT_EQ(forward({"--device", "cpu"}).code, 0);
  EXPECT_EQ(used(), "cpu");
  ASSERT_EQ(forward({"--device", "auto"}).code, 0);
  EXPECT_EQ(used(), found ? "cuda:0" : "cpu");
  EXPECT_EQ(forward({"--device", "gpu"}).code, 2);
  setenv("FERRY_DEVICE", "toaster", 1);
  Result wrong = forward({});
  unsetenv("FERRY_DEVICE");
  EXPECT_EQ(wrong.code, 2);
  EXPECT_THAT(wrong.err, HasSubstr("FERRY_DEVICE=\"toaster\""));
  if (!found) {
    Result asked = forward({"--device", "cuda"});
    EXPECT_EQ(asked.code, 1);
    EXPECT_THAT(asked.err, HasSubstr(accelerator["reason"].get<std::string>()));
  }
}

}  // namespace
}  // namespace ferry
