#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <limits>

#include "../fixture_tensors.h"
#include "ferry/base/error.h"
#include "ferry/schedulers/scheduling_flow_match_euler_discrete.h"
#include "ferry/schedulers/trajectory.h"

namespace ferry::schedulers {
namespace {

using ferry::testing::read_fixture_json;
using ferry::testing::read_fixture_tensors;
using ferry::testing::relative_error;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

FlowMatchEulerDiscreteScheduler make(
    const nlohmann::ordered_json& config = nlohmann::ordered_json::object()) {
  return FlowMatchEulerDiscreteScheduler(
      models::config_from_json<FlowMatchEulerDiscreteConfig>(config, "test"));
}

std::vector<std::string> fixtures() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(FERRY_FIXTURES "/schedulers")) {
    if (entry.path().extension() == ".json") names.push_back(entry.path().stem().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

// Trajectories of Python's class, tools/parity/fixtures.py.
class FlowMatchEulerFixture : public ::testing::TestWithParam<std::string> {};

TEST_P(FlowMatchEulerFixture, TrajectoryEqualsPython) {
  std::string base = std::string(FERRY_FIXTURES "/schedulers/") + GetParam();
  nlohmann::ordered_json fixture = read_fixture_json(base + ".json");
  NamedTensors inputs, expected;
  for (const auto& [name, tensor] : read_fixture_tensors(base + ".safetensors")) {
    if (name.starts_with("input.")) inputs[name.substr(6)] = tensor;
    if (name.starts_with("expected.")) expected[name.substr(9)] = tensor;
  }
  std::optional<int64_t> steps;
  if (fixture.contains("steps") && fixture["steps"].is_number())
    steps = fixture["steps"].get<int64_t>();
  auto scheduler = make_scheduler("FlowMatchEulerDiscreteScheduler", fixture["config"]);
  NamedTensors got =
      run_trajectory(*scheduler, inputs, steps, nlohmann::json::parse(fixture["args"].dump()));
  ASSERT_EQ(expected.size(), 4u);
  for (const auto& [name, tensor] : expected) {
    ASSERT_TRUE(got.contains(name)) << name;
    EXPECT_EQ(got[name].scalar_type(), tensor.scalar_type()) << name;
    EXPECT_LE(relative_error(got[name], tensor), 1e-6) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Fixtures, FlowMatchEulerFixture, ::testing::ValuesIn(fixtures()),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace_if(
                               name.begin(), name.end(),
                               [](char c) { return !std::isalnum(static_cast<unsigned char>(c)); },
                               '_');
                           return name;
                         });

TEST(FlowMatchEuler, ConstantVelocityReachesTheDataExactly) {
  // With the exact velocity noise - data, Euler's method ends at the data whatever the schedule.
  auto scheduler = make({{"shift", 3.0}});
  at::Tensor data = at::full({1, 4}, 0.25), noise = at::full({1, 4}, -1.5);
  scheduler.set_timesteps({.num_inference_steps = 7});
  at::Tensor sample = noise;
  for (int64_t i = 0; i < 7; ++i)
    sample = scheduler.step(noise - data, scheduler.timesteps()[i], sample);
  EXPECT_LE((sample - data).abs().max().item<double>(), 1e-6);
}

TEST(FlowMatchEuler, ResultHasTheModelOutputsDtype) {
  auto scheduler = make();
  scheduler.set_timesteps({.num_inference_steps = 2});
  at::Tensor next =
      scheduler.step(at::ones({1, 3}, at::kBFloat16), scheduler.timesteps()[0], at::ones({1, 3}));
  EXPECT_EQ(next.scalar_type(), at::kBFloat16);
}

TEST(FlowMatchEuler, PerTokenTimesteps) {
  // Two tokens at sigma 1 and 0.5 of the schedule 1, 0.75, 0.5, 0.25, 0: each steps to the next
  // lower sigma. The sign follows Python's class, where this branch adds (current - next) * output.
  auto scheduler = make();
  scheduler.set_timesteps({.sigmas = std::vector<double>{1.0, 0.75, 0.5, 0.25}});
  at::Tensor output = at::ones({1, 2, 3}), sample = at::zeros({1, 2, 3}, at::kBFloat16);
  StepArguments arguments;
  arguments.tensors["per_token_timesteps"] = at::tensor({1000.0f, 400.0f}).reshape({1, 2});
  at::Tensor next = scheduler.step(output, scheduler.timesteps()[0], sample, arguments);
  EXPECT_EQ(next.scalar_type(), at::kFloat);
  EXPECT_NEAR(next[0][0][0].item<double>(), 0.25, 1e-6);
  EXPECT_NEAR(next[0][1][2].item<double>(), 0.15, 1e-6);
}

TEST(FlowMatchEuler, StochasticSamplingDrawsFromTheGeneratorLikeTheGivenNoise) {
  auto drawn = make({{"stochastic_sampling", true}}), given = make({{"stochastic_sampling", true}});
  drawn.set_timesteps({.num_inference_steps = 2});
  given.set_timesteps({.num_inference_steps = 2});
  at::Tensor output = at::ones({2, 3}), sample = at::zeros({2, 3});
  StepArguments with_generator, with_noise;
  with_generator.generators = {tensor::Generator().manual_seed(3)};
  with_noise.noise = tensor::randn_tensor({2, 3}, {tensor::Generator().manual_seed(3)});
  EXPECT_TRUE(at::equal(drawn.step(output, drawn.timesteps()[0], sample, with_generator),
                        given.step(output, given.timesteps()[0], sample, with_noise)));
}

TEST(FlowMatchEuler, ScaleNoiseMixesBySigma) {
  auto scheduler = make();
  scheduler.set_timesteps({.sigmas = std::vector<double>{1.0, 0.75, 0.5, 0.25}});
  at::Tensor sample = at::ones({2, 1, 1}), noise = at::full({2, 1, 1}, 3.0);
  at::Tensor both = at::stack({scheduler.timesteps()[1], scheduler.timesteps()[3]});
  at::Tensor mixed = scheduler.scale_noise(sample, both, noise);
  EXPECT_FLOAT_EQ(mixed[0].item<float>(), 0.75f * 3 + 0.25f);
  EXPECT_FLOAT_EQ(mixed[1].item<float>(), 0.25f * 3 + 0.75f);
  scheduler.set_begin_index(2);  // before the first step of image to image: the begin index counts
  EXPECT_FLOAT_EQ(scheduler.scale_noise(sample, both, noise)[0].item<float>(), 0.5f * 3 + 0.5f);
  scheduler.step(sample, scheduler.timesteps()[2], sample);  // and after it the step index
  EXPECT_FLOAT_EQ(scheduler.scale_noise(sample, both, noise)[0].item<float>(), 0.25f * 3 + 0.75f);
}

TEST(FlowMatchEuler, IndexOfARepeatedTimestepIsTheSecond) {
  auto scheduler = make();
  scheduler.set_timesteps({.timesteps = std::vector<double>{900, 500, 500, 100}});
  EXPECT_EQ(scheduler.index_for_timestep(scheduler.timesteps()[1]), 2);
  EXPECT_EQ(scheduler.index_for_timestep(scheduler.timesteps()[3]), 3);
}

TEST(FlowMatchEuler, BeginIndexStartsInTheMiddleAndIsForgotten) {
  auto scheduler = make();
  scheduler.set_timesteps({.num_inference_steps = 4});
  scheduler.set_begin_index(2);
  scheduler.step(at::ones({1}), scheduler.timesteps()[0], at::ones({1}));
  EXPECT_EQ(scheduler.step_index(), 3);
  scheduler.set_timesteps({.num_inference_steps = 4});
  EXPECT_FALSE(scheduler.step_index() || scheduler.begin_index());
}

TEST(FlowMatchEuler, ConfigKeepsUnknownKeysThroughAFolder) {
  auto scheduler =
      make({{"shift", 3}, {"_diffusers_version", "0.42.1"}, {"from_the_future", {1, 2}}});
  std::filesystem::path folder = std::filesystem::path(::testing::TempDir()) / "scheduler";
  scheduler.save_pretrained(folder);
  auto loaded = load_scheduler(folder);
  EXPECT_EQ(loaded->class_name(), "FlowMatchEulerDiscreteScheduler");
  nlohmann::ordered_json json = loaded->config_json();
  EXPECT_EQ(json["shift"], 3.0);
  EXPECT_EQ(json["_diffusers_version"], "0.42.1");
  EXPECT_EQ(json["from_the_future"], (nlohmann::ordered_json{1, 2}));
  EXPECT_TRUE(json["shift_terminal"].is_null());
}

TEST(FlowMatchEuler, WrongUseNamesTheArgument) {
  auto message = [](const std::string& text) {
    return ThrowsMessage<ArgumentError>(HasSubstr(text));
  };
  EXPECT_THAT(
      [] {
        make({{"use_karras_sigmas", true}, {"use_beta_sigmas", true}});
      },
      message("only one of"));
  EXPECT_THAT([] { make({{"time_shift_type", "cubic"}}); }, message("cubic"));
  EXPECT_THAT([] { make({{"num_train_timesteps", 0}}); }, message("num_train_timesteps"));
  EXPECT_THAT(
      [] {
        make({{"num_train_timesteps", int64_t{1} << 40}});
      },
      message("num_train_timesteps"));
  auto dynamic = make({{"use_dynamic_shifting", true}});
  EXPECT_THAT([&] { dynamic.set_timesteps({.num_inference_steps = 4}); }, message("mu"));
  auto scheduler = make();
  EXPECT_THAT([&] { scheduler.set_timesteps({}); }, message("num_inference_steps"));
  EXPECT_THAT([&] { scheduler.set_timesteps({.num_inference_steps = 0}); },
              message("steps: got 0"));
  EXPECT_THAT([&] { scheduler.set_timesteps({.num_inference_steps = int64_t{1} << 40}); },
              message("expected 1 to 1000000"));
  EXPECT_THAT(
      [&] {
        scheduler.set_timesteps({.num_inference_steps = 3, .sigmas = std::vector<double>{1.0}});
      },
      message("sigmas: got 1"));
  scheduler.set_timesteps({.num_inference_steps = 1});
  at::Tensor x = at::ones({1});
  EXPECT_THAT([&] { scheduler.step(x, at::tensor({0}), x); }, message("integer"));
  EXPECT_THAT([&] { scheduler.step(x, at::tensor({1.5f}), x); }, message("none of"));
  StepArguments unknown;
  unknown.values["eta"] = 1.0;
  EXPECT_THAT([&] { scheduler.step(x, scheduler.timesteps()[0], x, unknown); }, message("eta"));
  scheduler.step(x, scheduler.timesteps()[0], x);
  EXPECT_THAT([&] { scheduler.step(x, scheduler.timesteps()[0], x); },
              message("step 2 of a schedule of 1"));
  EXPECT_THAT([] { make_scheduler("DDIMScheduler", {}); },
              message("FlowMatchEulerDiscreteScheduler"));
  // A wrong type is the file's fault.
  EXPECT_THAT([] { make({{"shift", "three"}}); }, ThrowsMessage<FormatError>(HasSubstr("shift")));
}

TEST(Trajectory, InputsAreChecked) {
  auto message = [](const std::string& text) {
    return ThrowsMessage<ArgumentError>(HasSubstr(text));
  };
  auto scheduler = make();
  at::Tensor x = at::ones({2});
  EXPECT_THAT([&] { run_trajectory(scheduler, {{"latents", x}}, 2); }, message("latents"));
  EXPECT_THAT([&] { run_trajectory(scheduler, {{"sample", x}}, 2); }, message("model_outputs"));
  EXPECT_THAT(
      [&] {
        run_trajectory(scheduler, {{"sample", x}, {"model_outputs", at::ones({3, 2})}}, 2);
      },
      message("got 3 from step 0"));
  EXPECT_THAT([&] { run_trajectory(scheduler, {}, 2, {{"mu", "x"}}); }, message("mu"));
  EXPECT_EQ(run_trajectory(scheduler, {}, 2).at("timesteps").numel(), 2);
}

}  // namespace
}  // namespace ferry::schedulers
