#include "measure.h"

#include <ATen/DeviceAccelerator.h>
#include <time.h>
#include <unistd.h>

#include <fstream>
#include <iterator>
#include <sstream>
#include <string>

namespace ferry::cli {

double seconds_since_process_start() {
  std::ifstream file("/proc/self/stat");
  std::string text((std::istreambuf_iterator<char>(file)), {});
  size_t after_name = text.rfind(')');
  if (after_name == std::string::npos) return 0;
  std::istringstream fields(text.substr(after_name + 1));
  std::string skipped;
  for (int i = 0; i < 19; ++i) fields >> skipped;  // state is field 3, starttime field 22
  double ticks = 0;
  fields >> ticks;
  timespec now{};
  clock_gettime(CLOCK_BOOTTIME, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9 -
         ticks / static_cast<double>(sysconf(_SC_CLK_TCK));
}

uint64_t peak_device_bytes(at::Device device) {
  if (device.is_cpu()) return 0;
  constexpr int kAllPools = 0;
  return static_cast<uint64_t>(
      at::accelerator::getDeviceStats(device.index()).allocated_bytes[kAllPools].peak);
}

}  // namespace ferry::cli
