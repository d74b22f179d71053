#include "ferry/offload/hardware.h"

#include <fmt/ranges.h>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>

#include "ferry/base/error.h"
#include "ferry/base/units.h"
#include "ferry/io/json_file.h"

namespace ferry::offload {

namespace {

constexpr double kGB = 1e9;
constexpr uint64_t kGiB = 1ull << 30;
// PCIe 4.0: 16 GT/s a lane with 128b/130b coding is 1.97 GB/s a lane and direction (PCI-SIG base
// specification 4.0). Copies of tens of MB from pinned memory reach about 0.8 of it after packet
// headers and flow control.
constexpr double kPcie4Lane = 16e9 * 128 / 130 / 8 * 0.8;

// Tensor cores of GeForce cards do dense bf16 with fp32 accumulation at twice the fp32 rate.
const char* kAda =
    "NVIDIA's stated fp32 rate and memory bandwidth; bf16 is twice the fp32 rate (Ada GPU "
    "architecture whitepaper); ";
const char* kAmpere =
    "NVIDIA's stated fp32 rate and memory bandwidth; bf16 is twice the fp32 rate (Ampere GA102 GPU "
    "architecture whitepaper); ";
const char* kAssumed =
    "link: 0.8 of PCIe 4.0's 1.97 GB/s a lane; efficiency 0.5, context 0.5 GiB and a decoder of 4 "
    "cores at 2.3 GB/s are assumed";

Hardware card(const char* name, const char* description, const char* source, uint64_t memory_gib,
              int lanes, double bf16_tflops, double memory_gb_per_s) {
  Hardware hardware;
  hardware.name = name;
  hardware.description = description;
  hardware.source = std::string(source) + kAssumed;
  hardware.memory_bytes = memory_gib * kGiB;
  hardware.disk_bytes_per_s = 3.5 * kGB;
  hardware.disk_latency_s = 100e-6;
  hardware.link_bytes_per_s = lanes * kPcie4Lane;
  hardware.link_latency_s = 10e-6;
  hardware.decode_bytes_per_s = 4 * 2.3 * kGB;
  hardware.bf16_flops = bf16_tflops * 1e12;
  hardware.memory_bytes_per_s = memory_gb_per_s * kGB;
  hardware.context_bytes = kGiB / 2;
  return hardware;
}

std::vector<Hardware> make_presets() {
  std::vector<Hardware> presets = {
      card("rtx-4060", "8 GB card on PCIe 4.0 x8 (GeForce RTX 4060)", kAda, 8, 8, 30.2, 272),
      card("rtx-3070", "8 GB card on PCIe 4.0 x16 (GeForce RTX 3070)", kAmpere, 8, 16, 40.6, 448),
      card("rtx-3090", "24 GB card on PCIe 4.0 x16 (GeForce RTX 3090)", kAmpere, 24, 16, 71.2, 936),
      card("rtx-3090-x8", "the same in a slot with 8 lanes", kAmpere, 24, 8, 71.2, 936),
      card("rtx-4090", "24 GB card on PCIe 4.0 x16 (GeForce RTX 4090)", kAda, 24, 16, 165.2, 1008),
      card("rtx-4090-x8", "the same in a slot with 8 lanes", kAda, 24, 8, 165.2, 1008),
  };

  Hardware unified;
  unified.name = "unified-32gb";
  unified.description = "32 GB of unified memory (Apple M1 Max)";
  unified.source =
      "Apple press release of October 2021: 10.4 TFLOPS, 400 GB/s, SSD up to 7.4 GB/s; bf16 at the "
      "fp32 rate, efficiency 0.6 and context 0.5 GiB are assumed";
  unified.memory_bytes = 32 * kGiB;
  unified.disk_bytes_per_s = 7.4 * kGB;
  unified.disk_latency_s = 100e-6;
  unified.decode_bytes_per_s = 4 * 2.3 * kGB;
  unified.bf16_flops = 10.4e12;
  unified.flops_efficiency = 0.6;
  unified.memory_bytes_per_s = 400 * kGB;
  unified.context_bytes = kGiB / 2;
  presets.push_back(unified);

  Hardware cpu;
  cpu.name = "cpu-2core-amx";
  cpu.description = "the CPU-only machine ferry is developed on: 2 cores with AMX, virtual disk";
  cpu.source =
      "measured there: io_uring reads 2.1 GB/s; a bf16 GEMM of 1280 x 3072 x 12288 takes 66 ms "
      "(1.46 TFLOPS); reading costs compute 13%; a pack decodes at 2.3 GB/s a core. Efficiency 0.8 "
      "and a memory rate of 12 GB/s are assumed";
  cpu.memory_bytes = 24 * kGiB;
  cpu.disk_bytes_per_s = 2.1 * kGB;
  cpu.disk_latency_s = 200e-6;
  cpu.decode_bytes_per_s = 2.3 * kGB;
  cpu.bf16_flops = 1.46e12;
  cpu.flops_efficiency = 0.8;
  cpu.memory_bytes_per_s = 12 * kGB;
  cpu.read_slowdown = 0.13;
  cpu.decode_slowdown = 1.0;  // one of two cores
  presets.push_back(cpu);
  return presets;
}

std::string preset_names() {
  std::string names;
  for (const Hardware& hardware : hardware_presets())
    names += (names.empty() ? "" : ", ") + hardware.name;
  names += "; with a disk after a comma: ";
  bool first = true;
  for (const DiskPreset& disk : disk_presets()) {
    names += (first ? "" : ", ") + disk.name;
    first = false;
  }
  return names;
}

const Hardware* find_preset(const std::string& name) {
  for (const Hardware& hardware : hardware_presets()) {
    if (hardware.name == name) return &hardware;
  }
  return nullptr;
}

// Every field once, under its name: reading, writing and checking go through this.
template <class H, class F>
void fields(H& hardware, F&& visit) {
  visit("name", hardware.name);
  visit("description", hardware.description);
  visit("source", hardware.source);
  visit("memory_bytes", hardware.memory_bytes);
  visit("disk_bytes_per_s", hardware.disk_bytes_per_s);
  visit("disk_latency_s", hardware.disk_latency_s);
  visit("link_bytes_per_s", hardware.link_bytes_per_s);
  visit("link_latency_s", hardware.link_latency_s);
  visit("decode_bytes_per_s", hardware.decode_bytes_per_s);
  visit("bf16_flops", hardware.bf16_flops);
  visit("flops_efficiency", hardware.flops_efficiency);
  visit("memory_bytes_per_s", hardware.memory_bytes_per_s);
  visit("read_slowdown", hardware.read_slowdown);
  visit("decode_slowdown", hardware.decode_slowdown);
  visit("context_bytes", hardware.context_bytes);
}

void read_field(const nlohmann::json& value, const std::string& where, std::string& into) {
  if (!value.is_string())
    throw_error<ArgumentError>("{}: expected text, got {}", where, value.dump());
  into = value.get<std::string>();
}

// Sizes and rates may be written as people write them.
void read_field(const nlohmann::json& value, const std::string& where, uint64_t& into) {
  if (value.is_string()) {
    into = parse_bytes(value.get<std::string>(), where);
  } else if (value.is_number_unsigned()) {
    into = value.get<uint64_t>();
  } else {
    throw_error<ArgumentError>("{}: expected a size such as \"8GiB\", got {}", where, value.dump());
  }
}

void read_field(const nlohmann::json& value, const std::string& where, double& into) {
  if (value.is_string()) {
    into = static_cast<double>(parse_rate(value.get<std::string>(), where));
  } else if (value.is_number() && value.get<double>() >= 0) {
    into = value.get<double>();
  } else {
    throw_error<ArgumentError>("{}: expected a number that is not negative, got {}", where,
                               value.dump());
  }
}

Hardware from_file(const std::string& path) {
  const nlohmann::json json = io::read_json_object(path);
  Hardware hardware;
  if (json.contains("preset")) {
    const nlohmann::json& name = json["preset"];
    if (!name.is_string())
      throw_error<ArgumentError>("{}: preset: expected text, got {}", path, name.dump());
    hardware = parse_hardware(name.get<std::string>());
  }
  hardware.name = std::filesystem::path(path).stem().string();
  std::vector<std::string> known = {"preset"};
  fields(hardware, [&](const char* name, auto& field) {
    known.push_back(name);
    if (json.contains(name)) read_field(json[name], path + ": " + name, field);
  });
  for (const auto& item : json.items()) {
    if (std::find(known.begin(), known.end(), item.key()) == known.end()) {
      throw_error<ArgumentError>("{}: the field '{}' is unknown; known are {}", path, item.key(),
                                 fmt::join(known, ", "));
    }
  }
  if (hardware.disk_bytes_per_s <= 0 || hardware.bf16_flops <= 0) {
    throw_error<ArgumentError>(
        "{}: disk_bytes_per_s and bf16_flops must be given (or a preset that has them)", path);
  }
  return hardware;
}

}  // namespace

Rates Hardware::rates() const {
  return {.disk_bytes_per_s = disk_bytes_per_s,
          .link_bytes_per_s = link_bytes_per_s,
          .decode_bytes_per_s = decode_bytes_per_s,
          .disk_latency_s = disk_latency_s,
          .link_latency_s = link_latency_s,
          .read_slowdown = read_slowdown,
          .decode_slowdown = decode_slowdown};
}

double Hardware::compute_s(double flops, uint64_t bytes) const {
  double seconds = flops / (bf16_flops * flops_efficiency);
  if (memory_bytes_per_s > 0)
    seconds = std::max(seconds, static_cast<double>(bytes) / memory_bytes_per_s);
  return seconds;
}

const std::vector<Hardware>& hardware_presets() {
  static const std::vector<Hardware> presets = make_presets();
  return presets;
}

const std::vector<DiskPreset>& disk_presets() {
  static const std::vector<DiskPreset> presets = {
      {"nvme-7", 7.0 * kGB, 80e-6,
       "PCIe 4.0 NVMe, sequential reads as the maker states (Samsung 980 PRO)"},
      {"nvme-3.5", 3.5 * kGB, 100e-6,
       "PCIe 3.0 NVMe, sequential reads as the maker states (Samsung 970 EVO Plus)"},
      {"sata", 0.56 * kGB, 150e-6,
       "SATA 6 Gb/s SSD, sequential reads as the maker states (Samsung 870 EVO)"},
  };
  return presets;
}

Hardware parse_hardware(const std::string& text) {
  const size_t comma = text.find(',');
  if (const Hardware* preset = find_preset(text.substr(0, comma))) {
    Hardware hardware = *preset;
    if (comma == std::string::npos) return hardware;
    const std::string name = text.substr(comma + 1);
    for (const DiskPreset& disk : disk_presets()) {
      if (disk.name != name) continue;
      hardware.name += "," + name;
      hardware.disk_bytes_per_s = disk.bytes_per_s;
      hardware.disk_latency_s = disk.latency_s;
      hardware.source += "; disk: " + disk.source;
      return hardware;
    }
    throw_error<ArgumentError>("hardware '{}': the disk '{}' is unknown; presets: {}", text, name,
                               preset_names());
  }
  if (std::filesystem::is_regular_file(text)) return from_file(text);
  throw_error<ArgumentError>("hardware '{}': neither a file nor a preset; presets: {}", text,
                             preset_names());
}

nlohmann::ordered_json to_json(const Hardware& hardware) {
  nlohmann::ordered_json json;
  fields(hardware, [&](const char* name, const auto& field) { json[name] = field; });
  return json;
}

}  // namespace ferry::offload
