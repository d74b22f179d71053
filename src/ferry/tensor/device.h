// The device seam: finds the accelerator at run time, and reads device names. One build serves
// machines with and without a GPU: only c10 and torch_cpu are linked, and libtorch_cuda.so is
// opened where a driver can use it.
#pragma once

#include <c10/core/Device.h>

#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace ferry::tensor {

// What open_accelerator() came to.
enum class AcceleratorStatus {
  opened,           // devices can be used
  disabled,         // FERRY_DEVICE=cpu
  no_driver,        // no libcuda.so.1
  driver_failed,    // the driver is there but does not start
  no_device,        // the driver is there and sees no device
  driver_too_old,   // older than the CUDA that libtorch was built for
  library_missing,  // no libtorch_cuda.so beside libtorch_cpu.so nor in FERRY_TORCH_DIR
  library_failed,   // it does not load (a libtorch without CUDA's libraries) or offers no device
};

struct Accelerator {
  AcceleratorStatus status = AcceleratorStatus::no_driver;
  // One sentence: what was found, or why there is none and what to do about it.
  std::string reason;
  // CUDA versions as 13000 for 13.0; 0 where unknown.
  int driver_version = 0;
  int needed_version = 0;
  // Of the devices, in their order: "NVIDIA H100 80GB HBM3".
  std::vector<std::string> device_names;
  // libtorch_cuda.so, where it was found.
  std::filesystem::path library;

  bool found() const { return status == AcceleratorStatus::opened; }
};

// Opens libtorch_cuda.so if libcuda.so.1 opens and can drive it. Programs call this first of all:
// once torch has looked for an accelerator (getAccelerator(), hasCUDA(), a pinned allocation), it
// takes a library opened later for absent. Looks beside libtorch_cpu.so, then in $FERRY_TORCH_DIR
// (a libtorch, or a Python environment that holds torch). FERRY_DEVICE=cpu opens nothing. Never
// throws for what it finds: a machine without a usable GPU is a machine with a CPU. Idempotent and
// thread-safe; costs 0.1 to 0.5 s where there is a GPU, else nothing.
const Accelerator& open_accelerator();

// "cpu", "cuda", "cuda:1" (or another accelerator that torch has, by its name), or "auto": the
// first device of the accelerator if there is one, else the CPU, and the log says why. Empty takes
// $FERRY_DEVICE, else "cpu". A device without an index is its first. Throws ArgumentError for what
// is no device name, DeviceError (with the reason) for a device that is not here.
at::Device parse_device(std::string_view name);

// Waits until all work queued on `device` is done; nothing to do for the CPU. For timing.
void synchronize(at::Device device);

// The folder of a libtorch (with lib/libtorch_cpu.so) in or below `root`: the folder itself, or a
// Python environment's torch. Empty if there is none.
std::filesystem::path find_libtorch(const std::filesystem::path& root);

// What open_accelerator() asks of the system, replaceable in tests.
struct AcceleratorSystem {
  // dlopen; null and a message in `error` on failure.
  std::function<void*(const std::string& file, int flags, std::string& error)> open;
  // dlsym; a null library means all that is loaded.
  std::function<void*(void* library, const char* name)> symbol;
  // An environment variable; empty if unset.
  std::function<std::string(const char* name)> environment;
  // The folder that libtorch_cpu.so was loaded from.
  std::function<std::filesystem::path()> torch_library_folder;
  // How many devices torch sees, after libtorch_cuda.so was opened.
  std::function<int()> device_count;

  static AcceleratorSystem real();
};
// As open_accelerator(), every time anew.
Accelerator find_accelerator(const AcceleratorSystem& system);

}  // namespace ferry::tensor
