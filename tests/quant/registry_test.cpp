#include "ferry/quant/registry.h"

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "ferry/base/error.h"
#include "quant_fixture.h"

namespace ferry::quant {
namespace {

using Json = nlohmann::ordered_json;

at::Tensor a_weight(int64_t rows = 32, int64_t columns = 256) {
  return (at::arange(rows * columns, at::kFloat).view({rows, columns}) * 0.37f).sin() * 0.05f;
}

double sqnr_db(const at::Tensor& source, const at::Tensor& made) {
  double signal = source.pow(2).sum().item<double>();
  return 10 * std::log10(signal / (source - made).pow(2).sum().item<double>());
}

TEST(Registry, EverySchemesComponentsAreAsDescribedAndNearTheWeight) {
  const std::map<std::string_view, double> floors = {{"int8wo", 40}, {"int8da8w", 40},
                                                     {"fp8wo", 28},  {"fp8da8w", 28},
                                                     {"int4wo", 18}, {"nf4", 18}};
  for (const Scheme& scheme : schemes()) {
    for (at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      SCOPED_TRACE(std::string(scheme.name) + " " + c10::toString(dtype));
      at::Tensor weight = a_weight().to(dtype);
      Quantized made = quantize(scheme, weight);
      ASSERT_EQ(made.components.size(), made.weight->components().size());
      for (size_t i = 0; i < made.components.size(); ++i) {
        const Component& described = made.weight->components()[i];
        EXPECT_EQ(made.components[i].sizes(), at::IntArrayRef(described.shape));
        EXPECT_EQ(made.components[i].itemsize(), io::item_size(described.dtype));
        EXPECT_TRUE(made.components[i].is_contiguous());
      }
      double sqnr =
          sqnr_db(weight.to(at::kFloat), made.weight->dequantize(made.components, at::kFloat));
      EXPECT_GT(sqnr, floors.at(scheme.name));
    }
  }
}

TEST(Registry, GroupSizes) {
  Quantized made = quantize(find_scheme("int8wo"), a_weight(), 64);
  EXPECT_EQ(made.components[1].sizes(), at::IntArrayRef({32, 4}));
  EXPECT_EQ(quantize(find_scheme("int4wo"), a_weight(), 32).components[1].sizes(),
            at::IntArrayRef({8, 32}));
  EXPECT_EQ(quantize(find_scheme("nf4"), a_weight(), 128).components[1].sizes(),
            at::IntArrayRef({64}));
  EXPECT_THROW(quantize(find_scheme("fp8wo"), a_weight(), 64), ArgumentError);
  EXPECT_THROW(quantize(find_scheme("int4wo"), a_weight(32, 200)), ArgumentError);
  EXPECT_THROW(quantize(find_scheme("int4wo"), a_weight(), -1), ArgumentError);
}

TEST(Registry, ConfigsAreThoseOfDiffusers) {
  std::ifstream file(fixture("quantization_configs.json"));
  const Json expected = Json::parse(file);
  EXPECT_EQ(expected.size(), 8u);
  for (const auto& [key, config] : expected.items()) {
    SCOPED_TRACE(key);
    const size_t colon = key.find(':');
    const int64_t group = colon == std::string::npos ? 0 : std::stoll(key.substr(colon + 1));
    const std::string skip_key = config.contains("modules_to_not_convert")
                                     ? "modules_to_not_convert"
                                     : "llm_int8_skip_modules";
    std::vector<std::string> skipped;
    if (!config[skip_key].is_null()) skipped = config[skip_key].get<std::vector<std::string>>();
    Json made =
        quantization_config(find_scheme(key.substr(0, colon)), group, skipped, at::kBFloat16);
    EXPECT_EQ(made, config) << made.dump(1);
  }
}

TEST(Registry, UnknownSchemesAndWeights) {
  EXPECT_THROW(find_scheme("int3wo"), ArgumentError);
  EXPECT_THROW(quantize(find_scheme("int8wo"), at::zeros({4})), ArgumentError);
  EXPECT_THROW(quantize(find_scheme("int8wo"), at::zeros({4, 4}, at::kInt)), ArgumentError);
}

}  // namespace
}  // namespace ferry::quant
