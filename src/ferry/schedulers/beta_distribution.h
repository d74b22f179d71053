// The beta distribution, for schedules that place their steps by it.
#pragma once

namespace ferry::schedulers {

// The regularized incomplete beta function I_x(a, b) = P(X <= x), for x in [0, 1] and a, b > 0.
double beta_cdf(double x, double a, double b);

// Its inverse: the x with I_x(a, b) = p, for p in [0, 1] (scipy.stats.beta.ppf). Relative error of
// x near 0, and of 1 - x near 1, about 1e-14. NaN outside.
double beta_ppf(double p, double a, double b);

}  // namespace ferry::schedulers
