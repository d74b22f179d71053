// Inside the engine: one group of a client.
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "ferry/offload/engine.h"
#include "ferry/offload/piece.h"

namespace ferry::offload {

struct Client::State {
  Group group;  // without its small slots
  std::vector<Piece> pieces;
  uint64_t size_bytes = 0;

  Placement placement = Placement::streamed;
  size_t started = 0;  // pieces that are here or on their way: the first ones
  bool attached = false;
  int leases = 0;
  int predicted = 0;  // entries of pending_
  bool used_in_pass = false;
  double compute_s = 0;  // in this pass, from when it was leased until another was asked for
  std::vector<uint32_t> versions;  // of the slots when they were attached
  Fence last_use;  // on the stream that computed with it, where it stays after its last lease
  std::chrono::steady_clock::time_point leased_at;  // of the outermost lease

  bool is_absent() const { return started == 0; }
  bool is_complete() const { return started == pieces.size(); }
};

}  // namespace ferry::offload
