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
  at::parallel_for(0, (weight.size(0) + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    at::NoGradGuard no_grad;
    const int64_t first = begin * kRows, count = std::min(end * kRows, weight.size(0)) - first;
    at::Tensor rows = at::empty({count, weight.size(1)}, at::kFloat);
    description.dequantize_rows(components, first, count, at::kFloat, rows.mutable_data_ptr());
    at::Tensor exact = weight.narrow(0, first, count).to(at::kFloat);
    const double part_signal = exact.square().sum(at::kDouble).item<double>();
    const double part_noise = (exact - rows).square().sum(at::kDouble).item<double>();
    std::lock_guard lock(mutex);
    signal += part_signal;
    noise += part_noise;
  });
  if (noise == 0) return std::numeric_limits<double>::infinity();
  return 10 * std::log10(signal / noise);
}

}  // namespace ferry::quant
