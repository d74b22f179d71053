// What autoencoders of pictures can do to need less memory (diffusers' AutoencoderMixin).
#pragma once

#include <cstdint>
#include <optional>

namespace ferry::models {

// Tiles of a picture that is encoded or decoded in parts, and how far they overlap.
struct TilingOptions {
  // Pixels of a tile's side; unset: what the config was made for (sample_size).
  std::optional<int64_t> tile_sample_min_size = std::nullopt;
  // Latent values of a tile's side; unset: the above over the autoencoder's factor.
  std::optional<int64_t> tile_latent_min_size = std::nullopt;
  double tile_overlap_factor = 0.25;
};

// A base beside Model; testing/autoencoder_suites.h checks what is said here. Thread-safety: as
// Model.
class AutoencoderMixin {
 public:
  virtual ~AutoencoderMixin() = default;

  // One sample of a batch at a time: less memory, the same result but for rounding.
  void enable_slicing() { use_slicing_ = true; }
  void disable_slicing() { use_slicing_ = false; }
  bool slicing() const { return use_slicing_; }
  // In overlapping tiles, blended: less memory, a slightly different picture. What fits into one
  // tile stays as it is. Throws ArgumentError for tiles that are too small.
  virtual void enable_tiling(const TilingOptions& options = {}) = 0;
  void disable_tiling() { use_tiling_ = false; }
  bool tiling() const { return use_tiling_; }

  // Pixels a latent value spans in each direction.
  virtual int64_t scale_factor() const = 0;

 protected:
  bool use_slicing_ = false;
  bool use_tiling_ = false;
};

}  // namespace ferry::models
