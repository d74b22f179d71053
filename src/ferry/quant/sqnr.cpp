#include "ferry/quant/sqnr.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>

namespace ferry::quant {

double sqnr_db(const at::Tensor& weight, const quant::QuantizedWeight& description,
               quant::ComponentTensors components) {
  constexpr int64_t kRows = 64;
  double signal = 0, noise = 0;
  std::mutex mutex;
  const int64_t blocks = (weight.size(0) + kRows - 1) / kRows;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    at::NoGradGuard no_grad;
    double part_signal = 0, part_noise = 0;
    for (int64_t first = begin * kRows; first < std::min(end * kRows, weight.size(0));
         first += kRows) {
      const int64_t count = std::min(kRows, weight.size(0) - first);
      at::Tensor rows = at::empty({count, weight.size(1)}, at::kFloat);
      description.dequantize_rows(components, first, count, at::kFloat, rows.mutable_data_ptr());
      at::Tensor exact = weight.narrow(0, first, count).to(at::kFloat).contiguous();
      at::Tensor difference = exact - rows;
      part_signal += at::dot(exact.view(-1), exact.view(-1)).item<double>();
      part_noise += at::dot(difference.view(-1), difference.view(-1)).item<double>();
    }
    std::lock_guard lock(mutex);
    signal += part_signal;
    noise += part_noise;
  });
  if (noise == 0) return std::numeric_limits<double>::infinity();
  return 10 * std::log10(signal / noise);
}

}  // namespace ferry::quant
