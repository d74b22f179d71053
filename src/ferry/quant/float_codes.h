// The values of small floating-point formats by their bits, and look-ups in such tables.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <span>

#include "ferry/io/dtype.h"

namespace ferry::quant {

// The value of each byte as F8_E4M3 (finite and NaN only, "fn"), F8_E5M2 or F8_E8M0 (2^(b - 127);
// 255 is NaN). Throws ArgumentError for another dtype.
std::span<const float, 256> byte_values(io::Dtype dtype);

// The value of each 4-bit E2M1 code (OCP Microscaling Formats 1.0): 0, 0.5, 1, 1.5, 2, 3, 4, 6, and
// their negatives.
std::span<const float, 16> e2m1_values();

// table[code] for each code, float32, on the codes' device. codes: integers within the table.
at::Tensor look_up(const at::Tensor& codes, std::span<const float> table);

// The two nibbles of each byte, in the order of elements: uint8 [..., n] -> uint8 [..., 2 n].
at::Tensor unpack_nibbles(const at::Tensor& bytes, bool high_first);

// One value a block, [a, b], as one value an element, [rows, columns]; a divides rows, b columns.
at::Tensor expand_blocks(const at::Tensor& values, int64_t rows, int64_t columns);

}  // namespace ferry::quant
