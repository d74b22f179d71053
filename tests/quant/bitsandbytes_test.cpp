#include "ferry/quant/bitsandbytes.h"

#include <gmock/gmock.h>

#include "../io/temp_folder.h"
#include "ferry/base/error.h"
#include "quant_fixture.h"

namespace ferry::quant {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// `replaced`: the text of the tensors that describe others, where it is not the file's.
std::string error_with(const std::string& name, const std::function<void(Damaged&)>& damage,
                       const std::map<std::string, std::string>& replaced = {}) {
  Damaged damaged(name);
  damage(damaged);
  return testing_io::error_of<FormatError>([&] {
    read_bitsandbytes(damaged.weights, [&](const weights::StoredTensor& tensor) {
      auto found = replaced.find(tensor.key);
      return found == replaced.end() ? read_bytes(tensor) : found->second;
    });
  });
}

TEST(BitsAndBytes, FourBitPlainUnevenNestedAndOfOtherStorage) {
  StoredWeights weights = expect_fixture("bitsandbytes_4bit");
  EXPECT_THAT(plain_names(weights), ElementsAre("nf4.bias"));
  EXPECT_EQ(weights.quantized.at("fp4.weight").weight->scheme(), "bitsandbytes fp4");
  EXPECT_EQ(weights.quantized.at("nested.weight").components.size(), 5u);
  EXPECT_EQ(weights.quantized.at("bf16_storage.weight").weight->components()[0].dtype,
            io::Dtype::BF16);
}

TEST(BitsAndBytes, Int8) {
  StoredWeights weights = expect_fixture("bitsandbytes_int8");
  EXPECT_THAT(weights.plain, IsEmpty());
}

TEST(BitsAndBytes, OtherCheckpointsAreLeftAlone) {
  Damaged other("torchao_float8");
  EXPECT_FALSE(read_bitsandbytes(other.weights, read_bytes));
}

TEST(BitsAndBytesErrors, MissingComponents) {
  EXPECT_THAT(error_with("bitsandbytes_4bit",
                         [](Damaged& checkpoint) { checkpoint.remove("nf4.weight.absmax"); }),
              AllOf(HasSubstr("bitsandbytes_4bit.safetensors"), HasSubstr("'nf4.weight'"),
                    HasSubstr("'nf4.weight.absmax' is missing")));
  EXPECT_THAT(
      error_with("bitsandbytes_4bit",
                 [](Damaged& checkpoint) { checkpoint.remove("nested.weight.nested_quant_map"); }),
      HasSubstr("'nested.weight.nested_quant_map' is missing"));
  EXPECT_THAT(
      error_with("bitsandbytes_int8", [](Damaged& checkpoint) { checkpoint.remove("a.weight"); }),
      HasSubstr("'a.weight' is missing"));
}

TEST(BitsAndBytesErrors, WrongBlockCountDtypeAndFormat) {
  EXPECT_THAT(error_with("bitsandbytes_4bit",
                         [](Damaged& checkpoint) {
                           checkpoint.tensor("uneven.weight.absmax").shape = {28};
                         }),
              AllOf(HasSubstr("is F32 [28]"), HasSubstr("expected F32 [29]")));
  EXPECT_THAT(error_with("bitsandbytes_4bit",
                         [](Damaged& checkpoint) {
                           checkpoint.tensor("nested.weight.absmax").dtype = io::Dtype::F32;
                         }),
              HasSubstr("expected U8"));
  EXPECT_THAT(error_with("bitsandbytes_int8", [](Damaged&) {}, {{"a.weight_format", "\1"}}),
              HasSubstr("not stored by rows"));
}

TEST(BitsAndBytesErrors, AStateThatLies) {
  const std::string key = "nf4.weight.quant_state.bitsandbytes__nf4";
  auto error = [&](const std::string& state) {
    return error_with("bitsandbytes_4bit", [](Damaged&) {}, {{key, state}});
  };
  EXPECT_THAT(error(R"({"blocksize": 64, "shape": [32, 65]})"),
              HasSubstr("got 1024 bytes of codes, expected 1040 for 2080 values"));
  EXPECT_THAT(error(R"({"blocksize": 0, "shape": [32, 64]})"), HasSubstr("block size"));
  EXPECT_THAT(error(R"({"blocksize": 9007199254740993, "shape": [32, 64]})"),
              HasSubstr("block size"));
  EXPECT_THAT(error(R"({"blocksize": 64, "shape": [2048]})"), HasSubstr("linear layer"));
  EXPECT_THAT(error(R"({"blocksize": 64})"), HasSubstr("\"shape\" is missing"));
  EXPECT_THAT(error(R"([])"), HasSubstr("expected an object"));
  EXPECT_THAT(error(R"({"blocksize")"), HasSubstr(key));
}

}  // namespace
}  // namespace ferry::quant
