// When this process began (Linux: /proc), and what a device held.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>

namespace ferry::cli {

// Seconds since the process was started, to 10 ms.
double seconds_since_process_start();

// The most that torch has held on `device` at once; 0 for the CPU, whose peak is the process's.
uint64_t peak_device_bytes(at::Device device);

}  // namespace ferry::cli
