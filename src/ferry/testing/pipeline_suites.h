// PipelineTester: what every text-to-image pipeline does, whatever its components are. That its
// pictures are Python's is a test of its own. PipelineBudgetTester: that one memory budget holds
// for all of it.
//
//   INSTANTIATE_TEST_SUITE_P(Flux, PipelineTester, ::testing::Values(PipelineCase{…}), …);
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <fstream>

#include "ferry/base/error.h"
#include "ferry/pipelines/memory_budget.h"
#include "ferry/pipelines/pipeline.h"
#include "ferry/testing/allocation_counter.h"
#include "ferry/testing/model_case.h"

namespace ferry::testing {

struct PipelineCase {
  std::string name;              // letters and digits: part of the test's name
  std::filesystem::path folder;  // model_index.json and components, small ones
  // A quick call; the seed, the output type and what a test is about are set by the tests.
  pipelines::TextToImageArguments arguments;
  // Another prompt, for batches.
  std::string other_prompt = "two tiny green stars";
  // Components that run in every step, in whose dtype the latents are.
  std::string denoiser = "transformer";
  // Between a batch and its single pictures, in float32 latents: another batch may use another
  // kernel, and each step adds to the difference.
  double batch_bound = 1e-4;
  // The weights under which it is streamed, as parts of all its weights.
  std::vector<double> budgets = {0.5, 0.8, 4};
  // Pictures for which PipelineBudgetTester tries budgets; one of several images is to be split.
  struct Size {
    int64_t width, height, images;
  };
  std::vector<Size> sizes = {};

  friend void PrintTo(const PipelineCase& value, std::ostream* out) { *out << value.name; }
};

inline std::string pipeline_case_name(const ::testing::TestParamInfo<PipelineCase>& info) {
  return info.param.name;
}

class PipelineTester : public ::testing::TestWithParam<PipelineCase> {
 protected:
  using Pipeline = std::shared_ptr<pipelines::DiffusionPipeline>;

  static Pipeline load(const std::string& dtype = "fp32", std::filesystem::path folder = {}) {
    pipelines::PipelineLoadOptions options;
    options.dtype = pipelines::DtypeMap::parse(dtype);
    if (folder.empty()) folder = GetParam().folder;
    return pipelines::DiffusionPipeline::from_pretrained(folder.string(), options);
  }
  static pipelines::TextToImageArguments call(
      uint64_t seed = 7, pipelines::OutputType type = pipelines::OutputType::latent) {
    pipelines::TextToImageArguments arguments = GetParam().arguments;
    arguments.generator = {tensor::Generator().manual_seed(seed)};
    arguments.output_type = type;
    return arguments;
  }
  static at::Tensor latents(const Pipeline& pipeline,
                            const pipelines::TextToImageArguments& arguments = call()) {
    return pipeline->text_to_image(arguments).tensor;
  }
  static uint64_t weight_bytes(const Pipeline& pipeline) {
    uint64_t bytes = 0;
    for (const auto& [name, component] : pipeline->components()) {
      if (component.model) bytes += weights::total_bytes(weights::collect_slots(*component.model));
    }
    return bytes;
  }
  static std::vector<std::string> model_names(const Pipeline& pipeline) {
    std::vector<std::string> names;
    for (const auto& [name, component] : pipeline->components())
      if (component.model) names.push_back(name);
    return names;
  }
};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(PipelineTester);

// ---- saving ----

TEST_P(PipelineTester, SavedAndLoadedGivesTheSame) {
  auto first = load("");
  // Two scalars in the index: one more, and one that nobody knows.
  TemporaryFolder source, folder;
  std::filesystem::copy(GetParam().folder, source.path() / "in",
                        std::filesystem::copy_options::recursive);
  nlohmann::ordered_json index = first->config();
  index["from_a_newer_version"] = {1, 2, 3};
  std::ofstream(source.path() / "in" / "model_index.json") << index.dump();
  auto changed = load("", source.path() / "in");
  EXPECT_EQ(changed->config(), index);

  changed->save_pretrained(folder.path());
  auto second = load("", folder.path());
  EXPECT_EQ(second->config().dump(), index.dump()) << "the index keeps its keys and their order";
  ASSERT_EQ(second->components().size(), first->components().size());
  for (const auto& [name, component] : first->components()) {
    const auto& again = second->components().at(name);
    EXPECT_EQ(static_cast<bool>(again), static_cast<bool>(component)) << name;
    if (component.model) {
      EXPECT_EQ(again.model->config_json(), component.model->config_json());
    }
    if (component.scheduler) {
      EXPECT_EQ(again.scheduler->config_json(), component.scheduler->config_json());
    }
  }
  EXPECT_TRUE(at::equal(latents(second), latents(first)));
}

TEST_P(PipelineTester, SavedWhileStreamedGivesTheSame) {
  auto resident = load("");
  auto streamed = load("");
  streamed->set_memory_budget(weight_bytes(streamed));
  latents(streamed);
  TemporaryFolder folder;
  streamed->save_pretrained(folder.path());
  EXPECT_TRUE(at::equal(latents(load("", folder.path())), latents(resident)));
}

// ---- seeds and batches ----

TEST_P(PipelineTester, TheSeedDecidesThePicture) {
  auto pipeline = load();
  at::Tensor seven = latents(pipeline, call(7));
  EXPECT_TRUE(at::equal(latents(pipeline, call(7)), seven));
  EXPECT_FALSE(at::equal(latents(pipeline, call(8)), seven));
  // The generator goes on: what is drawn with it a second time is another picture.
  auto arguments = call(7);
  EXPECT_TRUE(at::equal(latents(pipeline, arguments), seven));
  EXPECT_FALSE(at::equal(latents(pipeline, arguments), seven));
}

TEST_P(PipelineTester, ThePromptMatters) {
  auto pipeline = load();
  auto other = call();
  other.prompt = GetParam().other_prompt;
  EXPECT_FALSE(at::equal(latents(pipeline, other), latents(pipeline)));
}

// With a generator for each picture, a picture does not depend on the batch around it.
TEST_P(PipelineTester, ABatchIsItsSinglePictures) {
  auto pipeline = load();
  auto batch = call();
  batch.prompt = {GetParam().arguments.prompt.front(), GetParam().other_prompt};
  batch.num_images_per_prompt = 2;
  batch.generator.clear();
  for (uint64_t seed = 1; seed <= 4; ++seed)
    batch.generator.push_back(tensor::Generator().manual_seed(seed));
  at::Tensor together = latents(pipeline, batch);
  ASSERT_EQ(together.size(0), 4);
  for (int64_t i = 0; i < 4; ++i) {
    auto one = call(1 + i);
    one.prompt = batch.prompt[i / 2];  // pictures of one prompt lie beside each other
    EXPECT_LT((latents(pipeline, one)[0] - together[i]).abs().max().item<double>(),
              GetParam().batch_bound)
        << i;
  }
  EXPECT_GT((together[0] - together[1]).abs().max().item<double>(), 0.01);
  batch.generator.resize(3);
  EXPECT_THROW(latents(pipeline, batch), ArgumentError);
}

// ---- outputs ----

TEST_P(PipelineTester, OutputTypesAreOnePicture) {
  using pipelines::OutputType;
  auto pipeline = load();
  auto made = pipeline->text_to_image(call(7, OutputType::image)).images;
  at::Tensor pt = pipeline->text_to_image(call(7, OutputType::pt)).tensor;
  at::Tensor np = pipeline->text_to_image(call(7, OutputType::np)).tensor;
  ASSERT_EQ(made.size(), 1u);
  ASSERT_EQ(pt.dim(), 4);
  EXPECT_TRUE(at::equal(np, pt.permute({0, 2, 3, 1})));
  EXPECT_GE(pt.min().item<double>(), 0);
  EXPECT_LE(pt.max().item<double>(), 1);
  at::Tensor bytes = at::round(pt[0] * 255).to(at::kByte);
  EXPECT_TRUE(at::equal(pipelines::tensor_from_image(made[0]), bytes));
  EXPECT_EQ(made[0].height, pt.size(2));
  EXPECT_EQ(made[0].width, pt.size(3));
}

// A picture of NaN would be a black file.
TEST_P(PipelineTester, NaNIsAnError) {
  auto pipeline = load();
  auto arguments = call(7, pipelines::OutputType::image);
  at::Tensor start = latents(pipeline);  // of the right shape
  arguments.latents = at::full_like(start, std::numeric_limits<float>::quiet_NaN());
  try {
    pipeline->text_to_image(arguments);
    FAIL() << "made a picture of NaN";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("NaN"), std::string::npos) << error.what();
  }
}

// ---- callbacks, progress, stopping ----

TEST_P(PipelineTester, TheCallbackSeesEachStepAndReplacesTensors) {
  auto pipeline = load();
  std::vector<int64_t> steps;
  std::vector<double> times;
  auto arguments = call();
  arguments.num_inference_steps = 3;
  arguments.callback_on_step_end_tensor_inputs = {"latents", "prompt_embeds"};
  arguments.callback_on_step_end = [&](pipelines::DiffusionPipeline& given, int64_t step,
                                       const at::Tensor& timestep,
                                       const pipelines::CallbackTensors& tensors) {
    EXPECT_EQ(&given, pipeline.get());
    EXPECT_EQ(tensors.size(), 2u);
    steps.push_back(step);
    times.push_back(timestep.item<double>());
    if (step == 2)
      return pipelines::CallbackTensors{{"latents", at::zeros_like(tensors.at("latents"))}};
    return pipelines::CallbackTensors{};
  };
  EXPECT_EQ(latents(pipeline, arguments).abs().max().item<double>(), 0);
  EXPECT_EQ(steps, (std::vector<int64_t>{0, 1, 2}));
  EXPECT_TRUE(std::is_sorted(times.rbegin(), times.rend()));

  // Other embeddings from the first step on change what follows.
  arguments = call();
  at::Tensor plain = latents(pipeline, arguments);
  arguments = call();
  arguments.callback_on_step_end_tensor_inputs = {"prompt_embeds"};
  arguments.callback_on_step_end = [](pipelines::DiffusionPipeline&, int64_t, const at::Tensor&,
                                      const pipelines::CallbackTensors& tensors) {
    return pipelines::CallbackTensors{
        {"prompt_embeds", at::zeros_like(tensors.at("prompt_embeds"))}};
  };
  EXPECT_FALSE(at::equal(latents(pipeline, arguments), plain));
  arguments.callback_on_step_end_tensor_inputs = {"noise"};
  EXPECT_THROW(latents(pipeline, arguments), ArgumentError);
}

TEST_P(PipelineTester, InterruptSkipsTheRest) {
  auto pipeline = load();
  auto arguments = call();
  arguments.num_inference_steps = 5;
  int calls = 0;
  arguments.callback_on_step_end = [&](pipelines::DiffusionPipeline& given, int64_t step,
                                       const at::Tensor&, const pipelines::CallbackTensors&) {
    ++calls;
    if (step == 1) given.set_interrupt(true);
    return pipelines::CallbackTensors{};
  };
  latents(pipeline, arguments);
  EXPECT_EQ(calls, 2);
  calls = 0;
  arguments.callback_on_step_end = [&](auto&&...) {
    ++calls;
    return pipelines::CallbackTensors{};
  };
  latents(pipeline, arguments);
  EXPECT_EQ(calls, 5) << "the interruption outlasted its generation";
}

TEST_P(PipelineTester, StopsInEachStageAndWorksAgain) {
  at::Tensor expected = latents(load());
  for (bool streamed : {false, true}) {
    for (const char* stage : {"encode", "denoise", "decode"}) {
      auto pipeline = load();
      if (streamed) pipeline->set_memory_budget(weight_bytes(pipeline));
      StopSource stop;
      auto arguments = call(7, pipelines::OutputType::image);
      arguments.stop = stop.token();
      arguments.progress = [&](const pipelines::Progress& progress) {
        if (progress.stage == stage && progress.step == 0) stop.request_stop();
      };
      EXPECT_THROW(pipeline->text_to_image(arguments), Cancelled) << stage << streamed;
      EXPECT_TRUE(at::equal(latents(pipeline), expected)) << stage << streamed;
    }
  }
}

TEST_P(PipelineTester, ProgressCountsEveryStage) {
  auto pipeline = load();
  auto arguments = call(7, pipelines::OutputType::image);
  arguments.num_inference_steps = 2;
  std::vector<std::string> seen;
  arguments.progress = [&](const pipelines::Progress& progress) {
    seen.push_back(progress.stage + " " + std::to_string(progress.step) + "/" +
                   std::to_string(progress.total));
  };
  pipeline->text_to_image(arguments);
  EXPECT_EQ(seen,
            (std::vector<std::string>{"encode 0/1", "encode 1/1", "denoise 0/2", "denoise 1/2",
                                      "denoise 2/2", "decode 0/1", "decode 1/1"}));
}

// ---- dtypes ----

TEST_P(PipelineTester, ComponentsMayDifferInDtype) {
  const std::string denoiser = GetParam().denoiser;
  std::vector<std::string> mixes = {"bf16", "fp32," + denoiser + "=bf16"};
  for (const std::string& name : model_names(load())) mixes.push_back("bf16," + name + "=fp32");
  // From the same start: noise drawn in another dtype is other noise.
  auto from = [](uint64_t seed) {
    auto start = call(7, pipelines::OutputType::pt);
    start.latents = at::randn_like(latents(load()), tensor::Generator().manual_seed(seed).impl());
    return start;
  };
  at::Tensor reference = load()->text_to_image(from(7)).tensor;
  for (const std::string& mix : mixes) {
    auto pipeline = load(mix);
    auto map = pipelines::DtypeMap::parse(mix);
    for (const std::string& name : model_names(pipeline))
      EXPECT_EQ(pipeline->model(name).dtype(), map.of(name)) << mix << " " << name;
    EXPECT_EQ(latents(pipeline).scalar_type(), map.of(denoiser)) << mix;
    at::Tensor picture = pipeline->text_to_image(from(7)).tensor;
    EXPECT_EQ(picture.sizes(), reference.sizes()) << mix;
    EXPECT_TRUE(at::isfinite(picture).all().item<bool>()) << mix;
    // The same picture, but for rounding: another seed's is farther away.
    at::Tensor other = load()->text_to_image(from(8)).tensor;
    EXPECT_LT((picture.to(at::kFloat) - reference).abs().mean().item<double>(),
              0.5 * (other - reference).abs().mean().item<double>())
        << mix;
  }
}

// ---- streaming ----

TEST_P(PipelineTester, StreamedEqualsResidentBitForBit) {
  auto resident = load();
  at::Tensor expected = resident->text_to_image(call(7, pipelines::OutputType::pt)).tensor;
  const uint64_t bytes = weight_bytes(resident);
  int tried = 0;
  for (auto type : {hooks::OffloadType::leaf_level, hooks::OffloadType::block_level}) {
    for (double part : GetParam().budgets) {
      auto pipeline = load();
      offload::EngineOptions options;
      options.weights_memory_bytes = static_cast<uint64_t>(part * static_cast<double>(bytes));
      options.preferred_arena_bytes = 64 << 10;
      auto engine = std::make_shared<offload::Engine>(options);
      try {
        pipeline->enable_group_offload(engine, {.offload_type = type});
        latents(pipeline);  // a component may find that the others leave it too little
      } catch (const BudgetError&) {
        continue;
      }
      ++tried;
      for (int run = 0; run < 2; ++run) {
        EXPECT_TRUE(
            at::equal(pipeline->text_to_image(call(7, pipelines::OutputType::pt)).tensor, expected))
            << part << " run " << run;
      }
      EXPECT_GT(engine->report().bytes_read, 0u);
      EXPECT_LE(engine->report().peak_bytes, options.weights_memory_bytes);
      pipeline->disable_group_offload();
      EXPECT_TRUE(
          at::equal(pipeline->text_to_image(call(7, pipelines::OutputType::pt)).tensor, expected));
    }
  }
  EXPECT_GT(tried, 2) << "hardly a budget was enough";
}

TEST_P(PipelineTester, ModelAndSequentialCpuOffloadEqualResident) {
  at::Tensor expected = latents(load());
  auto pipeline = load();
  auto peak = [&] {
    for (int run = 0; run < 2; ++run) EXPECT_TRUE(at::equal(latents(pipeline), expected));
    return pipeline->engine()->report().peak_bytes;
  };
  pipeline->enable_model_cpu_offload();
  const uint64_t model = peak();
  EXPECT_LE(model, pipeline->engine()->options().weights_memory_bytes);
  pipeline->enable_sequential_cpu_offload();
  EXPECT_LT(peak(), model);
  EXPECT_GT(pipeline->engine()->report().misses, 0u) << "each layer when it is needed";
  pipeline->disable_group_offload();
  EXPECT_FALSE(pipeline->engine());
  EXPECT_TRUE(at::equal(latents(pipeline), expected));
}

TEST_P(PipelineTester, ExcludedComponentsStayInMemory) {
  at::Tensor expected = latents(load());
  for (const std::string& excluded : model_names(load())) {
    auto pipeline = load();
    auto engine = std::make_shared<offload::Engine>(offload::EngineOptions{});
    pipeline->enable_group_offload(engine, {}, {excluded});
    EXPECT_TRUE(at::equal(latents(pipeline), expected)) << excluded;
    for (const std::string& name : model_names(pipeline))
      EXPECT_EQ(pipeline->model(name).weights_are_offloaded(), name != excluded) << name;
  }
  auto pipeline = load();
  EXPECT_THROW(pipeline->enable_group_offload(
                   std::make_shared<offload::Engine>(offload::EngineOptions{}), {}, {"nobody"}),
               ArgumentError);
  EXPECT_FALSE(pipeline->engine());
}

TEST_P(PipelineTester, TooSmallABudgetChangesNothing) {
  auto pipeline = load();
  EXPECT_THROW(pipeline->set_memory_budget(100), BudgetError);
  EXPECT_FALSE(pipeline->engine());
  EXPECT_TRUE(at::equal(latents(pipeline), latents(load())));
}

// ---- one budget ----

class PipelineBudgetTester : public PipelineTester {};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(PipelineBudgetTester);

// All components under one budget, activations included: text encoders, denoiser and autoencoder
// never hold more together, and the picture is that of resident weights with the same settings.
TEST_P(PipelineBudgetTester, OneBudgetHoldsForEverything) {
  using namespace pipelines;
  int streamed = 0, split = 0;
  for (const PipelineCase::Size& one : GetParam().sizes) {
    auto arguments = [&] {
      TextToImageArguments a = call(7, OutputType::pt);
      a.width = one.width;
      a.height = one.height;
      a.num_images_per_prompt = one.images;
      a.num_inference_steps = 1;
      return a;
    };
    auto reference = load("");
    const GenerationSize size = generation_size(*reference, arguments());
    auto split_of = [&](const DiffusionPipeline& pipeline, double bytes) {
      return choose_memory(pipeline, size, at::kCPU,
                           {.memory_bytes = static_cast<uint64_t>(bytes),
                            .program_bytes = 0,
                            .least_weights_bytes = 64 << 10});
    };
    const MemorySplit roomy = split_of(*reference, 1e12).split;
    const auto weight_bytes = static_cast<double>(roomy.all_weights_bytes);
    for (double part : {1.0, 0.3, 0.03, 0.0}) {
      auto pipeline = load("");
      std::optional<MemoryChoice> choice;
      double total = part * static_cast<double>(roomy.activation_bytes) + weight_bytes;
      try {
        // What activations leave, and a little: so that weights are streamed.
        total = static_cast<double>(split_of(*pipeline, total).split.activation_bytes) +
                0.7 * weight_bytes;
        choice = split_of(*pipeline, total);
        apply_memory(*pipeline, *choice, {});
      } catch (const BudgetError&) {
        continue;
      }
      SCOPED_TRACE(fmt::format("{} x {}, {} images in {:.1f} MB: {}", one.width, one.height,
                               one.images, total / 1e6, choice->describe()));
      at::Tensor picture;
      const int64_t peak = AllocationCounter::peak_of(
          [&] { picture = pipeline->text_to_image(arguments()).tensor; });
      uint64_t weights = 0;
      if (pipeline->engine()) {
        ++streamed;
        weights = pipeline->engine()->report().peak_bytes;
        EXPECT_LE(weights, choice->split.weights_bytes);
        EXPECT_LE(static_cast<double>(peak) + static_cast<double>(weights),
                  total + std::max(0.05 * total, 16.0 * (1 << 20)));
      }
      if (choice->split.pictures_per_pass > 0) ++split;

      MemoryChoice resident = *choice;
      resident.split.weights_bytes = resident.split.all_weights_bytes;
      resident.split.arena_bytes = 0;
      apply_memory(*reference, resident, {});
      EXPECT_TRUE(at::equal(reference->text_to_image(arguments()).tensor, picture));
    }
  }
  EXPECT_GE(streamed, 2);
  EXPECT_GE(split, 1) << "no budget split the batch";
}

}  // namespace ferry::testing
