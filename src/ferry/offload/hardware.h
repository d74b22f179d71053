// Machines to plan for: what they hold, move and compute, each figure with its source.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <string>
#include <vector>

#include "ferry/offload/plan.h"

namespace ferry::offload {

struct Hardware {
  std::string name;
  std::string description;
  std::string source;  // where the figures come from, and what was assumed

  // Memory where compute happens. 0: not stated.
  uint64_t memory_bytes = 0;
  double disk_bytes_per_s = 0;
  double disk_latency_s = 0;
  // Host to device, as reached with pinned memory; 0: compute reads what the disk wrote.
  double link_bytes_per_s = 0;
  double link_latency_s = 0;
  double decode_bytes_per_s = 0;  // of lossless packs: decoded bytes; 0: no packs

  // Stated dense bf16 operations a second, and the part of them that diffusion layers reach.
  double bf16_flops = 0;
  double flops_efficiency = 0.5;
  // Of the memory that compute reads weights from: the limit of layers with few rows.
  double memory_bytes_per_s = 0;
  // See Rates.
  double read_slowdown = 0;
  double decode_slowdown = 0;
  // Of the device that no tensor gets: context, workspaces, allocator.
  uint64_t context_bytes = 0;

  Rates rates() const;
  // Seconds for `flops` operations that read `bytes` of weights.
  double compute_s(double flops, uint64_t bytes) const;
};

// Cards and machines; the first is a card that many have. Their disk is an NVMe of 3.5 GB/s.
const std::vector<Hardware>& hardware_presets();
// Disks that replace a preset's: "nvme-7", "nvme-3.5", "sata".
struct DiskPreset {
  std::string name;
  double bytes_per_s;
  double latency_s;
  std::string source;
};
const std::vector<DiskPreset>& disk_presets();

// "rtx-4060", "rtx-4060,sata" (a preset with another disk), or the path of a JSON file with the
// fields of Hardware under their names, and "preset" for what it leaves out. Throws ArgumentError
// naming the presets, or the field that is unknown or of another type; IoError, FormatError.
Hardware parse_hardware(const std::string& text);
nlohmann::ordered_json to_json(const Hardware& hardware);

}  // namespace ferry::offload
