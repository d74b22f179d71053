// Linear layers with quantized weights against the library's bfloat16 product, at Flux's sizes:
//
//   bench_kernels [--rows LIST] [--shapes LIST] [--schemes LIST] [--rounds N] [--threads N]
//                 [--cpu-time] [--json FILE]
//
// --rows 64,320,1280,4096 rows of input; --shapes 3072x12288,... inputs x outputs. A round runs
// each scheme once, one after the other; the least and the median of the rounds (default 5) are
// printed in milliseconds, and as ratios to bf16's. "int8pack" is torch's _weight_int8pack_mm, in
// every third round. --cpu-time counts the process's time on the cores instead of the clock's: use
// it with --threads 1 where others use the machine.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <fmt/core.h>

#include <algorithm>
#include <ctime>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "ferry/base/error.h"
#include "ferry/nn/quantized_linear.h"
#include "ferry/quant/row_kernels.h"
#include "ferry/quant/torchao_int8.h"

namespace {

using namespace ferry;
using quant::RowKernels;

struct Options {
  std::vector<int64_t> rows = {64, 320, 1280, 4096};
  std::vector<std::pair<int64_t, int64_t>> shapes = {
      {3072, 3072}, {3072, 12288}, {12288, 3072}, {15360, 3072}};
  std::vector<std::string> schemes;
  int rounds = 5;
  int threads = 2;
  bool cpu_time = false;
  std::string json;
};

// Bytes of a packed row by one of the row kernels: what a scheme's class does, without its format.
class Packed : public quant::QuantizedWeight {
 public:
  using Row = std::function<void(const RowKernels&, const uint8_t* bytes, int64_t row, void* out)>;

  Packed(int64_t out, int64_t in, int64_t row_bytes, Row row)
      : QuantizedWeight({out, in}, {{"bytes", io::Dtype::U8, {out, row_bytes}}}),
        row_bytes_(row_bytes),
        row_(std::move(row)) {}
  std::string_view scheme() const override { return "packed rows"; }
  at::Tensor dequantize(quant::ComponentTensors components, at::ScalarType dtype) const override {
    at::Tensor all = at::empty(shape(), at::TensorOptions().dtype(dtype));
    dequantize_rows(components, 0, rows(), dtype, all.mutable_data_ptr());
    return all;
  }
  void dequantize_rows(quant::ComponentTensors components, int64_t first, int64_t count,
                       at::ScalarType dtype, void* into) const override {
    const RowKernels& kernels = quant::row_kernels(dtype);
    const auto* bytes = components[0].const_data_ptr<uint8_t>() + first * row_bytes_;
    auto* out = static_cast<std::byte*>(into);
    const auto step = static_cast<int64_t>(columns() * c10::elementSize(dtype));
    for (int64_t i = 0; i < count; ++i) {
      row_(kernels, bytes + i * row_bytes_, first + i, out + i * step);
    }
  }

 private:
  int64_t row_bytes_;
  Row row_;
};

double seconds(bool cpu_time) {
  timespec now{};
  clock_gettime(cpu_time ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Schemes by name, each a product with x ready to run.
struct Schemes {
  std::vector<std::pair<std::string, std::function<at::Tensor()>>> all;
  std::vector<std::shared_ptr<void>> kept;

  void add_packed(const std::string& name, const at::Tensor& x, int64_t out, int64_t row_bytes,
                  Packed::Row row, const std::function<void(at::Tensor&)>& repair = {}) {
    auto weight = std::make_shared<Packed>(out, x.size(1), row_bytes, std::move(row));
    at::Tensor bytes = at::randint(0, 256, {out, row_bytes}, at::kByte);
    if (repair) repair(bytes);
    all.emplace_back(name, [weight, bytes, x] {
      return nn::quantized_linear(x, *weight, std::vector<at::Tensor>{bytes});
    });
  }
};

// Halves at byte `at` of each block of `block_bytes`: 0.001.
std::function<void(at::Tensor&)> halves(int64_t block_bytes, std::vector<int64_t> offsets) {
  return [=](at::Tensor& bytes) {
    at::Tensor blocks = bytes.view({-1, block_bytes});
    for (int64_t offset : offsets) {
      blocks.narrow(1, offset, 1).fill_(0x19);
      blocks.narrow(1, offset + 1, 1).fill_(0x14);
    }
  };
}

Schemes schemes_for(const at::Tensor& x, int64_t out) {
  const int64_t in = x.size(1);
  at::Tensor weight = (at::randn({out, in}) * 0.02).to(at::kBFloat16);
  Schemes schemes;
  schemes.all.emplace_back("bf16", [=] { return at::linear(x, weight); });

  quant::Int8Components parts = quant::quantize_int8(weight, {1, in});
  std::vector<at::Tensor> components{parts.qdata, parts.scale, parts.zero_point};
  for (auto [name, activation] : {std::pair("int8wo", quant::Activation::as_is),
                                  std::pair("int8da8w", quant::Activation::int8_per_token)}) {
    auto int8 = std::make_shared<quant::Int8Weight>(std::vector<int64_t>{out, in},
                                                    std::vector<int64_t>{1, in}, true,
                                                    io::Dtype::F32, activation);
    schemes.all.emplace_back(name, [=] { return nn::quantized_linear(x, *int8, components); });
  }
  at::Tensor scales = parts.scale.view({-1}).to(at::kBFloat16);
  schemes.all.emplace_back("int8pack",
                           [=] { return at::_weight_int8pack_mm(x, components[0], scales); });

  auto scale = std::make_shared<std::vector<float>>(out * in / 64, 0.01F);
  schemes.kept.push_back(scale);
  const float* s = scale->data();
  schemes.add_packed(
      "int8g64", x, out, in, [=](const RowKernels& k, const uint8_t* bytes, int64_t row, void* to) {
        k.int8(reinterpret_cast<const int8_t*>(bytes), s + row * in / 64, nullptr, 64, in, to);
      });
  schemes.add_packed("float8", x, out, in,
                     [=](const RowKernels& k, const uint8_t* bytes, int64_t, void* to) {
                       k.float8_e4m3(bytes, s, in, in, to);
                     });
  schemes.add_packed("int4", x, out, in / 2,
                     [=](const RowKernels& k, const uint8_t* bytes, int64_t row, void* to) {
                       k.int4(bytes, s + row * in / 128, s + row * in / 128, 128, in, to);
                     });
  schemes.add_packed("nf4", x, out, in / 2,
                     [=](const RowKernels& k, const uint8_t* bytes, int64_t row, void* to) {
                       k.codebook4(bytes - row * in / 2, s, s, 64, row * in, in, to);
                     });
  schemes.add_packed(
      "Q8_0", x, out, in / 32 * 34,
      [=](const RowKernels& k, const uint8_t* b, int64_t, void* to) { k.gguf_q8_0(b, in, to); },
      halves(34, {0}));
  schemes.add_packed(
      "Q4_0", x, out, in / 32 * 18,
      [=](const RowKernels& k, const uint8_t* b, int64_t, void* to) { k.gguf_q4_0(b, in, to); },
      halves(18, {0}));
  schemes.add_packed(
      "Q4_K", x, out, in / 256 * 144,
      [=](const RowKernels& k, const uint8_t* b, int64_t, void* to) { k.gguf_q4_k(b, in, to); },
      halves(144, {0, 2}));
  schemes.add_packed(
      "Q6_K", x, out, in / 256 * 210,
      [=](const RowKernels& k, const uint8_t* b, int64_t, void* to) { k.gguf_q6_k(b, in, to); },
      halves(210, {208}));
  return schemes;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string piece; std::getline(stream, piece, separator);) parts.push_back(piece);
  return parts;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    std::string flag = argv[i];
    if (flag == "--cpu-time") {
      options.cpu_time = true;
      continue;
    }
    if (i + 1 == argc) throw_error<ArgumentError>("{} wants a value", flag);
    std::string value = argv[++i];
    if (flag == "--rows") {
      options.rows.clear();
      for (const std::string& rows : split(value, ',')) options.rows.push_back(std::stoll(rows));
    } else if (flag == "--shapes") {
      options.shapes.clear();
      for (const std::string& shape : split(value, ',')) {
        auto sizes = split(shape, 'x');
        if (sizes.size() != 2) throw_error<ArgumentError>("--shapes: got '{}'", shape);
        options.shapes.emplace_back(std::stoll(sizes[0]), std::stoll(sizes[1]));
      }
    } else if (flag == "--schemes") {
      options.schemes = split(value, ',');
    } else if (flag == "--rounds") {
      options.rounds = std::stoi(value);
    } else if (flag == "--threads") {
      options.threads = std::stoi(value);
    } else if (flag == "--json") {
      options.json = value;
    } else {
      throw_error<ArgumentError>("unknown option {}", flag);
    }
  }
  return options;
}

void run(const Options& options) {
  at::set_num_threads(options.threads);
  c10::InferenceMode inference;
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  for (auto [in, out] : options.shapes) {
    for (int64_t rows : options.rows) {
      at::Tensor x = at::randn({rows, in}).to(at::kBFloat16);
      Schemes schemes = schemes_for(x, out);
      std::map<std::string, std::vector<double>> times;
      for (int round = -1; round < options.rounds; ++round) {
        for (const auto& [name, product] : schemes.all) {
          bool wanted = options.schemes.empty() || name == "bf16" ||
                        std::count(options.schemes.begin(), options.schemes.end(), name) > 0;
          if (!wanted || (name == "int8pack" && round % 3 != 0)) continue;
          double begin = seconds(options.cpu_time);
          product();
          // The round before the first warms up.
          if (round >= 0) times[name].push_back(1e3 * (seconds(options.cpu_time) - begin));
        }
      }
      fmt::print("{} rows, {} -> {}, {} threads\n", rows, in, out, options.threads);
      auto least_and_median = [&](const std::string& name) {
        std::vector<double> sorted = times[name];
        std::sort(sorted.begin(), sorted.end());
        return std::pair(sorted.front(), sorted[sorted.size() / 2]);
      };
      auto [bf16_least, bf16_median] = least_and_median("bf16");
      for (const auto& [name, product] : schemes.all) {
        if (times[name].empty()) continue;
        auto [least, median] = least_and_median(name);
        fmt::print("  {:<10} {:9.2f} ms least {:9.2f} median   ratio {:6.3f} {:6.3f}\n", name,
                   least, median, least / bf16_least, median / bf16_median);
        results.push_back({{"scheme", name},
                           {"rows", rows},
                           {"in", in},
                           {"out", out},
                           {"threads", options.threads},
                           {"clock", options.cpu_time ? "cpu" : "wall"},
                           {"ms", times[name]},
                           {"least_ms", least},
                           {"median_ms", median},
                           {"least_ratio", least / bf16_least},
                           {"median_ratio", median / bf16_median}});
      }
      std::fflush(stdout);
    }
  }
  if (!options.json.empty()) std::ofstream(options.json) << results.dump(1) << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
  } catch (const std::exception& error) {
    fmt::print(stderr, "bench_kernels: {}\n", error.what());
    return 1;
  }
  return 0;
}
