#include "ferry/tensor/device.h"

#include <ATen/DeviceAccelerator.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <optional>

#include "ferry/base/error.h"
#include "ferry/base/log.h"

namespace ferry::tensor {

namespace fs = std::filesystem;

namespace {

// The CUDA that torch 2.11's wheel is built for; asked of libcudart where that is loaded.
constexpr int kDefaultCudaVersion = 13000;

std::string version_text(int version) {
  return fmt::format("{}.{}", version / 1000, version % 1000 / 10);
}

// The driver's own interface (libcuda.so.1): a handful of C functions, stable since CUDA 4.
class Driver {
 public:
  Driver(const AcceleratorSystem& system, void* library) : system_(system), library_(library) {}

  int version() const {
    int value = 0;
    auto get = find<int (*)(int*)>("cuDriverGetVersion");
    return get && get(&value) == 0 ? value : 0;
  }
  // 0 is success; -1: the library is not a CUDA driver's.
  int init() const {
    auto start = find<int (*)(unsigned)>("cuInit");
    return start ? start(0) : -1;
  }
  std::string error_text(int status) const {
    const char* name = nullptr;
    auto get = find<int (*)(int, const char**)>("cuGetErrorName");
    if (get && get(status, &name) == 0 && name) return fmt::format("{} ({})", name, status);
    return fmt::format("error {}", status);
  }
  std::vector<std::string> device_names() const {
    int count = 0;
    auto count_of = find<int (*)(int*)>("cuDeviceGetCount");
    if (!count_of || count_of(&count) != 0) return {};
    auto device_of = find<int (*)(int*, int)>("cuDeviceGet");
    auto name_of = find<int (*)(char*, int, int)>("cuDeviceGetName");
    std::vector<std::string> names;
    for (int i = 0; i < count; ++i) {
      int device = 0;
      char name[256] = "";
      bool known = device_of && name_of && device_of(&device, i) == 0 &&
                   name_of(name, sizeof(name) - 1, device) == 0;
      names.emplace_back(known ? name : "unknown device");
    }
    return names;
  }

 private:
  template <class Function>
  Function find(const char* name) const {
    return reinterpret_cast<Function>(system_.symbol(library_, name));
  }
  const AcceleratorSystem& system_;
  void* library_;
};

int needed_cuda_version(const AcceleratorSystem& system) {
  int version = 0;
  auto get = reinterpret_cast<int (*)(int*)>(system.symbol(nullptr, "cudaRuntimeGetVersion"));
  if (!get || get(&version) != 0 || version <= 0) return kDefaultCudaVersion;
  // Drivers serve every minor version of their major one.
  return version / 1000 * 1000;
}

fs::path find_cuda_library(const AcceleratorSystem& system) {
  std::vector<fs::path> folders = {system.torch_library_folder()};
  if (std::string named = system.environment("FERRY_TORCH_DIR"); !named.empty()) {
    if (fs::path torch = find_libtorch(named); !torch.empty()) folders.push_back(torch / "lib");
  }
  std::error_code ignored;
  for (const fs::path& folder : folders) {
    if (fs::path file = folder / "libtorch_cuda.so"; fs::exists(file, ignored)) return file;
  }
  return {};
}

fs::path loaded_torch_folder() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&at::get_num_threads), &info) == 0 || !info.dli_fname)
    return {};
  std::error_code error;
  fs::path file = fs::canonical(info.dli_fname, error);
  return (error ? fs::path(info.dli_fname) : file).parent_path();
}

}  // namespace

fs::path find_libtorch(const fs::path& root) {
  std::error_code ignored;
  auto holds = [&](const fs::path& folder) {
    return fs::exists(folder / "lib/libtorch_cpu.so", ignored);
  };
  if (holds(root)) return root;
  if (holds(root / "torch")) return root / "torch";  // a site-packages folder
  for (const auto& entry : fs::directory_iterator(root / "lib", ignored)) {
    fs::path torch = entry.path() / "site-packages/torch";
    if (entry.path().filename().string().starts_with("python3") && holds(torch)) return torch;
  }
  return {};
}

AcceleratorSystem AcceleratorSystem::real() {
  AcceleratorSystem system;
  system.open = [](const std::string& file, int flags, std::string& error) {
    void* library = dlopen(file.c_str(), flags);
    if (!library) {
      const char* text = dlerror();
      error = text ? text : "unknown error";
    }
    return library;
  };
  system.symbol = [](void* library, const char* name) {
    return dlsym(library ? library : RTLD_DEFAULT, name);
  };
  system.environment = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value ? value : "");
  };
  system.torch_library_folder = &loaded_torch_folder;
  system.device_count = [] { return static_cast<int>(at::accelerator::deviceCount()); };
  return system;
}

Accelerator find_accelerator(const AcceleratorSystem& system) {
  Accelerator result;
  auto stop = [&](AcceleratorStatus status, std::string reason) {
    result.status = status;
    result.reason = std::move(reason);
    return result;
  };
  if (system.environment("FERRY_DEVICE") == "cpu")
    return stop(AcceleratorStatus::disabled, "FERRY_DEVICE=cpu");

  std::string error;
  void* library = system.open("libcuda.so.1", RTLD_NOW | RTLD_LOCAL, error);
  if (!library) return stop(AcceleratorStatus::no_driver, "no NVIDIA driver (libcuda.so.1)");
  Driver driver(system, library);
  result.driver_version = driver.version();
  result.needed_version = needed_cuda_version(system);
  if (result.driver_version > 0 && result.driver_version < result.needed_version) {
    return stop(AcceleratorStatus::driver_too_old,
                fmt::format("the NVIDIA driver serves CUDA {}, this libtorch needs {}: update the "
                            "driver, or build with a libtorch for CUDA {}",
                            version_text(result.driver_version),
                            version_text(result.needed_version), result.driver_version / 1000));
  }
  constexpr int kNoDevice = 100;  // CUDA_ERROR_NO_DEVICE
  int status = driver.init();
  if (status != 0 && status != kNoDevice) {
    return stop(AcceleratorStatus::driver_failed,
                status < 0 ? std::string("libcuda.so.1 is not a CUDA driver (it has no cuInit)")
                           : fmt::format("the NVIDIA driver does not start: cuInit says {}; "
                                         "nvidia-smi may say more",
                                         driver.error_text(status)));
  }
  if (status == 0) result.device_names = driver.device_names();
  if (result.device_names.empty()) {
    std::string visible = system.environment("CUDA_VISIBLE_DEVICES");
    return stop(AcceleratorStatus::no_device,
                "the NVIDIA driver is there, but sees no device" +
                    (visible.empty() ? "" : " (CUDA_VISIBLE_DEVICES=" + visible + ")"));
  }

  result.library = find_cuda_library(system);
  if (result.library.empty()) {
    return stop(
        AcceleratorStatus::library_missing,
        fmt::format("a GPU is here ({}), but no libtorch_cuda.so in {}: set FERRY_TORCH_DIR to a "
                    "torch with CUDA",
                    result.device_names.front(), system.torch_library_folder().string()));
  }
  // Global, as torch's own `import` does: its parts find each other's symbols.
  if (!system.open(result.library.string(), RTLD_NOW | RTLD_GLOBAL, error)) {
    return stop(AcceleratorStatus::library_failed,
                fmt::format("a GPU is here ({}), but libtorch_cuda.so does not load: {}. The "
                            "libtorch may lack CUDA's libraries: install the whole wheel (in a "
                            "checkout: rm -r .venv && make deps)",
                            result.device_names.front(), error));
  }
  int count = system.device_count();
  if (count <= 0) {
    return stop(AcceleratorStatus::library_failed,
                fmt::format("a GPU is here ({}), but torch offers no device: it was asked for one "
                            "before libtorch_cuda.so was opened, or cannot use this GPU",
                            result.device_names.front()));
  }
  return stop(AcceleratorStatus::opened,
              fmt::format("{} device{} ({}), driver for CUDA {}", count, count == 1 ? "" : "s",
                          result.device_names.front(), version_text(result.driver_version)));
}

const Accelerator& open_accelerator() {
  static const Accelerator accelerator = [] {
    Accelerator found = find_accelerator(AcceleratorSystem::real());
    log::debug("accelerator: {}", found.reason);
    return found;
  }();
  return accelerator;
}

at::Device parse_device(std::string_view name) {
  std::string wanted(name);
  std::string what = fmt::format("device \"{}\"", wanted);
  if (wanted.empty()) {
    const char* variable = std::getenv("FERRY_DEVICE");
    wanted = variable && *variable ? variable : "cpu";
    what = fmt::format("FERRY_DEVICE=\"{}\"", wanted);
  }
  if (wanted == "cpu") return at::Device(at::kCPU);

  const Accelerator& cuda = open_accelerator();
  std::optional<at::DeviceType> type = at::accelerator::getAccelerator(/*checked=*/false);
  int count = type ? static_cast<int>(at::accelerator::deviceCount()) : 0;
  if (wanted == "auto") {
    if (count > 0) return at::Device(*type, 0);
    // A driver that is there and cannot be used is worth a word.
    bool quiet =
        cuda.status == AcceleratorStatus::no_driver || cuda.status == AcceleratorStatus::disabled;
    log::write_formatted(quiet ? log::Level::info : log::Level::warn, "computing on the CPU: {}",
                         cuda.reason);
    return at::Device(at::kCPU);
  }
  at::Device device(at::kCPU);
  try {
    device = at::Device(wanted);
  } catch (const c10::Error&) {
    throw_error<ArgumentError>("{}: expected cpu, auto, cuda or cuda:<number>", what);
  }
  if (device.is_cpu()) throw_error<ArgumentError>("{}: the CPU has no number; say cpu", what);
  if (count == 0 || device.type() != *type) {
    if (device.type() == at::kCUDA) throw_error<DeviceError>("{}: {}", what, cuda.reason);
    throw_error<DeviceError>("{}: torch offers no such device here", what);
  }
  if (device.index() >= count) {
    throw_error<DeviceError>("{}: there {} only {} device{}, counted from 0", what,
                             count == 1 ? "is" : "are", count, count == 1 ? "" : "s");
  }
  return at::Device(device.type(), std::max<int>(device.index(), 0));
}

void synchronize(at::Device device) {
  if (!device.is_cpu()) at::accelerator::synchronizeDevice(device.index());
}

}  // namespace ferry::tensor
