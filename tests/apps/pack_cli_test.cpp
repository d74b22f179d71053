// ferry pack, ferry cache, and running from packs.
#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <nlohmann/json.hpp>

#include "../io/temp_folder.h"
#include "ferry/io/safetensors.h"
#include "ferry/pipelines/image.h"
#include "ferry/weights/binding.h"
#include "run_ferry.h"

namespace ferry {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using ::testing::Not;
using testing_apps::ferry;
using testing_apps::Result;
using testing_apps::tiny_picture;
using testing_io::read_text;
using testing_io::write_text;
using Json = nlohmann::json;

const std::string kPipeline = std::string(FERRY_FIXTURES) + "/pipelines/flux-tiny";

// A T5 whose layers are large enough to be encoded, with a table that has to stay raw.
class PackCli : public ::testing::Test {
 protected:
  PackCli() {
    setenv("FERRY_CACHE_DIR", (folder_ / "cache").c_str(), 1);
    write_text(folder_ / "config.json",
               R"({"d_ff": 512, "d_kv": 32, "d_model": 128, "feed_forward_proj": "gated-gelu",
                   "layer_norm_epsilon": 1e-06, "model_type": "t5", "num_heads": 4, "num_layers": 3,
                   "pad_token_id": 0, "vocab_size": 1000})");
    make_component("t5", "3");
    io::SafetensorsWriter writer(path("in"), {{"input_ids", io::Dtype::I64, {1, 5}}});
    int64_t ids[] = {5, 6, 999, 17, 1};
    writer.write(std::as_bytes(std::span(ids)));
    writer.finish();
  }

  std::string path(const std::string& name) const { return (folder_ / name).string(); }

  void make_component(const std::string& name, const std::string& seed) const {
    Result result = ferry({"random", "T5EncoderModel", "--config", path("config.json"), "--dtype",
                           "bf16", "--seed", seed, "--out", path(name)});
    EXPECT_EQ(result.code, 0) << result.err;
  }

  // The output's bits, and the statistics of the run.
  std::pair<std::string, Json> forward(const std::string& component,
                                       std::vector<std::string> more) const {
    std::vector<std::string> arguments = {
        "forward", path(component), "--inputs", path("in"), "--output",  path("out"),
        "--stats", path("stats"),   "--repeat", "2",        "--threads", "1"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    Result result = ferry(arguments);
    EXPECT_EQ(result.code, 0) << result.err;
    auto checkpoint = weights::Checkpoint::open_file(path("out"));
    at::Tensor output = weights::read_stored(*checkpoint->find("last_hidden_state"));
    return {std::string(static_cast<const char*>(output.const_data_ptr()), output.nbytes()),
            Json::parse(read_text(path("stats")))};
  }

  Json cache_entries() const {
    Result result = ferry({"cache", "ls", "--json"});
    EXPECT_EQ(result.code, 0) << result.err;
    return Json::parse(result.out)["entries"];
  }

  testing_io::TempFolder folder_;
};

TEST_F(PackCli, AForwardFromAPackIsTheSame) {
  Result result =
      ferry({"pack", path("t5"), "--out", path("t5.pack"), "--verify", "--stats", path("stats")});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("bit-identical"));
  EXPECT_THAT(result.err, HasSubstr("T5EncoderModel"));
  Json stats = Json::parse(read_text(path("stats")))[0];
  EXPECT_LT(stats["ratio"].get<double>(), 0.85);  // a quarter of this model is its table
  EXPECT_EQ(stats["pack_bytes"].get<uint64_t>(), fs::file_size(path("t5.pack")));

  auto [plain, unused] = forward("t5", {});
  EXPECT_TRUE(forward("t5", {"--pack", path("t5.pack")}).first == plain);
  for (const char* type : {"leaf_level", "block_level"}) {
    std::vector<std::string> streaming = {"--weights-memory", "1500KiB", "--offload-type", type};
    auto [raw, raw_stats] = forward("t5", streaming);
    streaming.insert(streaming.end(), {"--pack", path("t5.pack")});
    auto [packed, packed_stats] = forward("t5", streaming);
    EXPECT_TRUE(raw == plain);
    EXPECT_TRUE(packed == plain) << type;
    EXPECT_GT(packed_stats["bytes_read"][0].get<uint64_t>(), 0u);
  }

  // Instead of the weights.
  fs::remove(path("t5/model.safetensors"));
  EXPECT_TRUE(forward("t5", {"--pack", path("t5.pack")}).first == plain);
}

TEST_F(PackCli, APackOfOtherWeightsIsRefused) {
  ASSERT_EQ(ferry({"pack", path("t5"), "--out", path("t5.pack")}).code, 0);
  make_component("other", "4");
  Result result = ferry({"forward", path("other"), "--inputs", path("in"), "--output", path("out"),
                         "--pack", path("t5.pack")});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("pack of another checkpoint"));
  EXPECT_FALSE(fs::exists(path("out")));
}

TEST_F(PackCli, TheCacheServesEachModelItsOwn) {
  make_component("other", "4");
  const std::string plain = forward("t5", {}).first, other = forward("other", {}).first;
  ASSERT_FALSE(plain == other);
  Result result = ferry(
      {"forward", path("t5"), "--inputs", path("in"), "--output", path("out"), "--use-packs"});
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.err, HasSubstr("ferry pack makes one"));
  EXPECT_EQ(cache_entries().size(), 0u);

  for (const char* name : {"t5", "other"}) ASSERT_EQ(ferry({"pack", path(name)}).code, 0);
  EXPECT_THAT(ferry({"pack", path("t5")}).out, HasSubstr("in the cache already"));
  Json entries = cache_entries();
  ASSERT_EQ(entries.size(), 2u);
  EXPECT_EQ(entries[0]["fault"], "");
  EXPECT_EQ(entries[0]["origin"], path("t5")) << "the one that was used last";
  for (std::vector<std::string> more :
       {std::vector<std::string>{"--use-packs"}, {"--use-packs", "--weights-memory", "1500KiB"}}) {
    EXPECT_TRUE(forward("t5", more).first == plain);
    EXPECT_TRUE(forward("other", more).first == other);
  }

  result = ferry({"cache", "verify"});
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.out, Not(HasSubstr("DAMAGED")));
  const std::string key = cache_entries()[0]["key"];
  fs::resize_file(folder_ / "cache" / "packs" / (key + ".pack"), 100'000);
  result = ferry({"cache", "verify"});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.out, HasSubstr("DAMAGED"));
  EXPECT_THAT(ferry({"cache", "ls"}).out, HasSubstr("NOT USED"));
  EXPECT_TRUE(forward("other", {"--use-packs"}).first == other) << "from the checkpoint";

  EXPECT_EQ(ferry({"cache", "rm"}).code, 2);
  EXPECT_EQ(ferry({"cache", "rm", "no such key"}).code, 2);
  EXPECT_EQ(ferry({"cache", "rm", "--faulty"}).code, 0);
  ASSERT_EQ(cache_entries().size(), 1u);
  EXPECT_EQ(ferry({"cache", "rm", std::string(cache_entries()[0]["key"]).substr(0, 12)}).code, 0);
  EXPECT_EQ(cache_entries().size(), 0u);
}

TEST_F(PackCli, PicturesFromPacksAreTheSame) {
  auto picture = [&](bool packs) {
    std::vector<std::string> more;
    if (packs) more = {"--use-packs", "--weights-memory", "256KiB"};
    Result result = ferry(tiny_picture(path("x.png"), more));
    EXPECT_EQ(result.code, 0) << result.err;
    EXPECT_THAT(result.err, Not(HasSubstr("there is no pack")));
    return pipelines::load_png(path("x.png")).pixels;
  };
  Result result = ferry({"pack", kPipeline});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("transformer: "));
  EXPECT_GE(cache_entries().size(), 3u);
  EXPECT_TRUE(picture(false) == picture(true));

  result = ferry({"pack", kPipeline, "--out", path("packs"), "--verify"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_TRUE(fs::exists(path("packs/transformer.pack")));
  EXPECT_TRUE(fs::exists(path("packs/vae.pack")));
}

TEST_F(PackCli, GeneratePacksWhereItWaitsForTheDisk) {
  auto picture = [&](const std::vector<std::string>& more) {
    std::vector<std::string> arguments = {"generate",
                                          "--model",
                                          FERRY_MODELS "/shapes",
                                          "--prompt",
                                          "a red circle",
                                          "--width",
                                          "64",
                                          "--height",
                                          "64",
                                          "--steps",
                                          "2",
                                          "--max-sequence-length",
                                          "24",
                                          "--seed",
                                          "5",
                                          "--threads",
                                          "1",
                                          "--output",
                                          path("x.png"),
                                          "--weights-memory",
                                          "2MiB",
                                          "--io-limit",
                                          "8MB/s"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    Result result = ferry(arguments);
    EXPECT_EQ(result.code, 0) << result.err;
    return std::pair(pipelines::load_png(path("x.png")).pixels, result.out);
  };
  // Without a run that showed how long computing takes nothing is known, so nothing is packed.
  const auto first = picture({"--pack-space", "100MB"});
  EXPECT_EQ(cache_entries().size(), 0u);
  EXPECT_THAT(picture({"--pack-space", "1kB"}).second, HasSubstr("limited by the disk"));
  EXPECT_EQ(cache_entries().size(), 0u) << "more than is allowed";
  EXPECT_TRUE(picture({"--pack-space", "100MB"}).first == first.first);
  EXPECT_EQ(cache_entries().size(), 1u);
  EXPECT_TRUE(picture({"--pack-space", "100MB"}).first == first.first);
  EXPECT_EQ(cache_entries().size(), 1u);
}

TEST_F(PackCli, WrongFoldersAreErrors) {
  Result result = ferry({"pack", path("cache")});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("neither model_index.json"));
  result = ferry({"pack", path("t5"), "--out", path("no/such/folder/x.pack")});
  EXPECT_EQ(result.code, 1);
  setenv("FERRY_CACHE_LIMIT", "1kB", 1);
  result = ferry({"pack", path("t5")});
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("FERRY_CACHE_LIMIT"));
  unsetenv("FERRY_CACHE_LIMIT");
}

}  // namespace
}  // namespace ferry
