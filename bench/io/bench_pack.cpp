// Lossless packs on one core: how small, how fast to encode, how fast to decode.
//
//   bench_pack [--size BYTES] [--repeat N]
//
// Normally distributed weights of the given size (default 128 MiB) in bf16, fp16 and fp32; the best
// of N runs in GB/s (1e9) of plain weights. FERRY_PLANE_MERGE=portable|avx2|avx512bw picks the
// merge. The last line is memcpy's, for scale.
#include <fmt/format.h>

#include <bit>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "ferry/base/error.h"
#include "ferry/base/units.h"
#include "ferry/io/byte_planes.h"

namespace {

using namespace ferry;
using Bytes = std::vector<std::byte>;

uint16_t to_bf16(float value) {
  auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Of normal numbers well inside fp16's range; rounds to nearest.
uint16_t to_fp16(float value) {
  auto bits = std::bit_cast<uint32_t>(value);
  int exponent = static_cast<int>(bits >> 23 & 0xff) - 127 + 15;
  auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (exponent <= 0) return sign;
  uint32_t magnitude = static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 0x3ff);
  return static_cast<uint16_t>(sign | (magnitude + (bits >> 12 & 1)));
}

Bytes make_weights(const std::string& dtype, uint64_t size) {
  std::mt19937_64 random(1);
  std::normal_distribution<float> normal(0, 0.02f);
  Bytes bytes(size / 4 * 4);
  for (size_t at = 0; at < bytes.size();) {
    float value = normal(random);
    if (dtype == "fp32") {
      std::memcpy(bytes.data() + at, &value, 4);
      at += 4;
    } else {
      uint16_t half = dtype == "bf16" ? to_bf16(value) : to_fp16(value);
      std::memcpy(bytes.data() + at, &half, 2);
      at += 2;
    }
  }
  return bytes;
}

template <class Run>
double best_seconds(int repeat, Run run) {
  double best = 1e9;
  for (int i = 0; i < repeat; ++i) {
    auto begin = std::chrono::steady_clock::now();
    run();
    best = std::min(
        best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return best;
}

void bench(const std::string& dtype, uint64_t size, int repeat) {
  const unsigned item_bytes = dtype == "fp32" ? 4 : 2;
  const uint64_t block_bytes = io::kPlaneBlockItems * item_bytes;
  const Bytes plain = make_weights(dtype, size);
  io::PlaneEncoder encoder(item_bytes);
  std::vector<io::PlaneBlock> blocks;
  Bytes stored;
  auto portion = [&](auto& bytes, size_t i) {
    return std::span(bytes).subspan(i * block_bytes,
                                    std::min<size_t>(block_bytes, bytes.size() - i * block_bytes));
  };
  double encode = best_seconds(1, [&] {
    for (size_t i = 0; i * block_bytes < plain.size(); ++i) {
      const uint64_t offset = stored.size();
      blocks.push_back(encoder.encode(portion(plain, i), i, stored));
      blocks.back().offset = offset;
    }
  });
  Bytes decoded(plain.size());
  double decode = best_seconds(repeat, [&] {
    for (size_t i = 0; i < blocks.size(); ++i) {
      io::decode_plane_block(
          std::span<const std::byte>(stored).subspan(blocks[i].offset, blocks[i].stored_bytes()),
          blocks[i], i, item_bytes, portion(decoded, i), "bench");
    }
  });
  if (decoded != plain) throw_error<Error>("{}: decoded to other bytes", dtype);
  auto rate = [&](double seconds) { return static_cast<double>(plain.size()) / seconds / 1e9; };
  fmt::print("{}: ratio {:.4f}, encode {:.2f} GB/s, decode {:.2f} GB/s ({})\n", dtype,
             static_cast<double>(stored.size()) / static_cast<double>(plain.size()), rate(encode),
             rate(decode), io::plane_merge_name());
  if (dtype == "bf16") {
    double copy =
        best_seconds(repeat, [&] { std::memcpy(decoded.data(), plain.data(), plain.size()); });
    fmt::print("      memcpy {:.2f} GB/s\n", rate(copy));
  }
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t size = 128_MiB;
  int repeat = 5;
  try {
    for (int i = 1; i + 1 < argc; i += 2) {
      std::string option = argv[i];
      if (option == "--size") {
        size = parse_bytes(argv[i + 1], option);
      } else if (option == "--repeat") {
        repeat = std::max(1, std::atoi(argv[i + 1]));
      } else {
        throw_error<ArgumentError>("unknown option {}; options: --size BYTES, --repeat N", option);
      }
    }
    for (const char* dtype : {"bf16", "fp16", "fp32"}) bench(dtype, size, repeat);
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "bench_pack: {}\n", error.what());
    return 1;
  }
}
