// Measurements that the host of a virtual machine leaves alone.
#pragma once

#include <fstream>
#include <string>
#include <thread>

namespace ferry::bench {

// Seconds of all processors together that the host had for itself while something here wanted to
// run, since the machine started. 0 where the kernel does not say.
inline double stolen_seconds() {
  std::ifstream stat("/proc/stat");
  std::string cpu;
  double ticks[8] = {};  // user, nice, system, idle, iowait, irq, softirq, steal
  stat >> cpu;
  for (double& tick : ticks) stat >> tick;
  return stat ? ticks[7] / 100 : 0;
}

// What `measure` returns, its seconds, from a call during which the host took less than a hundredth
// of the processors; the sixth call's in any case. Hosts that ration processors take them all for
// a tenth of a second once a second or two, which one pass of two meets and the other does not.
// Adds to `repeats` the calls whose results were dropped.
template <class Measure>
double undisturbed(int& repeats, Measure&& measure) {
  const unsigned processors = std::thread::hardware_concurrency();
  for (int tries = 0;; ++tries) {
    const double before = stolen_seconds();
    const double seconds = measure();
    if (tries == 5 || stolen_seconds() - before <= 0.01 * seconds * processors) return seconds;
    ++repeats;
  }
}

}  // namespace ferry::bench
