// Encodings: a stored tensor's bytes need not be the tensor's bytes. A lossless pack
// (lossless_pack.h) holds fewer; whoever reads a tensor decodes them into memory of their own.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

namespace ferry::weights {

// Immutable and thread-safe. One a tensor; shared by all that read it.
class Encoding {
 public:
  virtual ~Encoding() = default;

  // For logs and plans: "byte planes + zstd".
  virtual std::string_view name() const = 0;

  // Writes the tensor's bytes. `stored`: StoredTensor::size_bytes bytes as read at its offset;
  // `into`: StoredTensor::plain_bytes() bytes of memory that does not overlap. Neither has to be
  // aligned. Spreads the work with at::parallel_for where the caller is not in a parallel region.
  // Throws FormatError that names file and tensor where bytes are damaged; what `into` holds then
  // is of no use.
  virtual void decode(std::span<const std::byte> stored, std::span<std::byte> into) const = 0;
};

}  // namespace ferry::weights
