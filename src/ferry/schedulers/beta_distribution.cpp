#include "ferry/schedulers/beta_distribution.h"

#include <cmath>
#include <limits>

namespace ferry::schedulers {

namespace {

double log_beta(double a, double b) {
  return std::lgamma(a) + std::lgamma(b) - std::lgamma(a + b);
}

// The continued fraction of I_x(a, b) (DLMF 8.17.22), by Lentz's method. Converges fast for
// x < (a + 1) / (a + b + 2).
double continued_fraction(double x, double a, double b) {
  constexpr double tiny = 1e-300;
  auto away_from_zero = [](double value) { return std::abs(value) < tiny ? tiny : value; };
  double c = 1.0;
  double d = 1.0 / away_from_zero(1.0 - (a + b) * x / (a + 1.0));
  double result = d;
  for (int m = 1; m <= 1000; ++m) {
    double even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m));
    d = 1.0 / away_from_zero(1.0 + even * d);
    c = away_from_zero(1.0 + even / c);
    result *= d * c;
    double odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1));
    d = 1.0 / away_from_zero(1.0 + odd * d);
    c = away_from_zero(1.0 + odd / c);
    double factor = d * c;
    result *= factor;
    if (std::abs(factor - 1.0) < 1e-16) break;
  }
  return result;
}

// The root of I_x(a, b) = p that lies in the lower half of the probability, p <= I_{1/2}.
double lower_root(double p, double a, double b) {
  double log_norm = log_beta(a, b);
  double low = 0.0, high = 1.0;
  // I_x ~ x^a / (a B(a, b)) near 0.
  double x = std::exp((std::log(p) + std::log(a) + log_norm) / a);
  if (!(x > 0.0)) return 0.0;
  if (x >= 1.0) x = 0.5;
  for (int i = 0; i < 200; ++i) {
    double error = beta_cdf(x, a, b) - p;
    if (error == 0.0) break;
    (error > 0.0 ? high : low) = x;
    double density = std::exp((a - 1.0) * std::log(x) + (b - 1.0) * std::log1p(-x) - log_norm);
    double next = x - error / density;
    if (!(next > low && next < high)) next = 0.5 * (low + high);
    if (std::abs(next - x) <= 1e-16 * x) return next;
    x = next;
  }
  return x;
}

}  // namespace

double beta_cdf(double x, double a, double b) {
  if (x <= 0.0) return 0.0;
  if (x >= 1.0) return 1.0;
  double front = std::exp(a * std::log(x) + b * std::log1p(-x) - log_beta(a, b));
  if (x < (a + 1.0) / (a + b + 2.0)) return front * continued_fraction(x, a, b) / a;
  return 1.0 - front * continued_fraction(1.0 - x, b, a) / b;
}

double beta_ppf(double p, double a, double b) {
  if (!(p >= 0.0 && p <= 1.0 && a > 0.0 && b > 0.0))
    return std::numeric_limits<double>::quiet_NaN();
  if (p == 0.0) return 0.0;
  if (p == 1.0) return 1.0;
  // Each end is solved from its own side, where the distribution function keeps its digits.
  if (p <= beta_cdf(0.5, a, b)) return lower_root(p, a, b);
  return 1.0 - lower_root(1.0 - p, b, a);
}

}  // namespace ferry::schedulers
