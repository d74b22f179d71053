#include "ferry/tensor/device.h"

#include <ATen/ATen.h>
#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <map>

#include "ferry/base/error.h"

namespace ferry::tensor {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// ---- a CUDA driver of paper ----

struct FakeDriver {
  int version = 13000;
  int init = 0;
  std::vector<std::string> names = {"Paper GPU"};
} fake;

int cu_driver_get_version(int* version) {
  return *version = fake.version, 0;
}
int cu_init(unsigned) {
  return fake.init;
}
int cu_get_error_name(int, const char** name) {
  return *name = "CUDA_ERROR_OF_PAPER", 0;
}
int cu_device_get_count(int* count) {
  return *count = static_cast<int>(fake.names.size()), 0;
}
int cu_device_get(int* device, int ordinal) {
  return *device = ordinal + 100, 0;
}
int cu_device_get_name(char* name, int length, int device) {
  snprintf(name, length, "%s", fake.names.at(device - 100).c_str());
  return 0;
}
int runtime_version = 13020;
int cuda_runtime_get_version(int* version) {
  return *version = runtime_version, 0;
}

// A system in which everything works; each test takes something away. Notes what was opened.
class AcceleratorTest : public ::testing::Test {
 protected:
  AcceleratorTest() {
    folder_ = fs::temp_directory_path() / ("ferry-device-" + std::to_string(getpid()));
    fs::create_directories(folder_ / "beside");
    touch(folder_ / "beside/libtorch_cuda.so");
    fake = {};
    runtime_version = 13020;
    system_.open = [this](const std::string& file, int flags, std::string& error) -> void* {
      opened_.push_back(file);
      flags_[file] = flags;
      if (missing_.contains(file)) return error = missing_[file], nullptr;
      return &library_;
    };
    system_.symbol = [this](void* library, const char* name) -> void* {
      const std::map<std::string, void*> driver = {
          {"cuDriverGetVersion", reinterpret_cast<void*>(&cu_driver_get_version)},
          {"cuInit", reinterpret_cast<void*>(&cu_init)},
          {"cuGetErrorName", reinterpret_cast<void*>(&cu_get_error_name)},
          {"cuDeviceGetCount", reinterpret_cast<void*>(&cu_device_get_count)},
          {"cuDeviceGet", reinterpret_cast<void*>(&cu_device_get)},
          {"cuDeviceGetName", reinterpret_cast<void*>(&cu_device_get_name)}};
      const std::map<std::string, void*> process = {
          {"cudaRuntimeGetVersion", reinterpret_cast<void*>(&cuda_runtime_get_version)}};
      const auto& table = library ? driver : process;
      auto it = table.find(name);
      return it == table.end() || no_symbols_ ? nullptr : it->second;
    };
    system_.environment = [this](const char* name) { return environment_[name]; };
    system_.torch_library_folder = [this] { return folder_ / "beside"; };
    system_.device_count = [this] {
      counted_after_ = opened_;
      return count_;
    };
  }
  ~AcceleratorTest() override { fs::remove_all(folder_); }

  static void touch(const fs::path& file) {
    fs::create_directories(file.parent_path());
    std::ofstream(file) << "x";
  }
  std::string library() const { return (folder_ / "beside/libtorch_cuda.so").string(); }

  fs::path folder_;
  AcceleratorSystem system_;
  std::map<std::string, std::string> environment_, missing_;
  std::map<std::string, int> flags_;
  std::vector<std::string> opened_, counted_after_;
  bool no_symbols_ = false;
  int count_ = 1;
  int library_ = 0;
};

TEST_F(AcceleratorTest, OpensTheLibraryAndOnlyThenAsksTorch) {
  fake.names = {"Paper GPU", "Cardboard GPU"};
  count_ = 2;
  Accelerator found = find_accelerator(system_);
  EXPECT_EQ(found.status, AcceleratorStatus::opened);
  EXPECT_TRUE(found.found());
  EXPECT_THAT(counted_after_, ElementsAre("libcuda.so.1", library()));
  EXPECT_EQ(flags_[library()], RTLD_NOW | RTLD_GLOBAL);
  EXPECT_THAT(found.device_names, ElementsAre("Paper GPU", "Cardboard GPU"));
  EXPECT_EQ(found.driver_version, 13000);
  EXPECT_EQ(found.library, library());
  EXPECT_EQ(found.reason, "2 devices (Paper GPU), driver for CUDA 13.0");
}

TEST_F(AcceleratorTest, NothingIsOpenedWhereTheCpuIsAskedFor) {
  environment_["FERRY_DEVICE"] = "cpu";
  EXPECT_EQ(find_accelerator(system_).status, AcceleratorStatus::disabled);
  EXPECT_THAT(opened_, ElementsAre());
}

TEST_F(AcceleratorTest, NoDriver) {
  missing_["libcuda.so.1"] = "cannot open shared object file";
  Accelerator found = find_accelerator(system_);
  EXPECT_EQ(found.status, AcceleratorStatus::no_driver);
  EXPECT_FALSE(found.found());
  EXPECT_THAT(opened_, ElementsAre("libcuda.so.1"));
  EXPECT_THAT(found.reason, HasSubstr("no NVIDIA driver"));
}

TEST_F(AcceleratorTest, ADriverTooOldIsExplainedAndTorchIsLeftAlone) {
  fake.version = 12080;
  Accelerator found = find_accelerator(system_);
  EXPECT_EQ(found.status, AcceleratorStatus::driver_too_old);
  EXPECT_THAT(opened_, ElementsAre("libcuda.so.1"));
  EXPECT_THAT(found.reason, HasSubstr("serves CUDA 12.8, this libtorch needs 13.0"));
  // A libtorch of another CUDA needs another driver.
  runtime_version = 12060;
  EXPECT_EQ(find_accelerator(system_).status, AcceleratorStatus::opened);
}

TEST_F(AcceleratorTest, ADriverThatDoesNotStart) {
  fake.init = 803;
  Accelerator found = find_accelerator(system_);
  EXPECT_EQ(found.status, AcceleratorStatus::driver_failed);
  EXPECT_THAT(opened_, ElementsAre("libcuda.so.1"));
  EXPECT_THAT(found.reason, HasSubstr("cuInit says CUDA_ERROR_OF_PAPER (803)"));
  no_symbols_ = true;
  found = find_accelerator(system_);
  EXPECT_EQ(found.status, AcceleratorStatus::driver_failed);
  EXPECT_THAT(found.reason, HasSubstr("not a CUDA driver"));
}

TEST_F(AcceleratorTest, NoDevice) {
  fake.init = 100;  // CUDA_ERROR_NO_DEVICE
  environment_["CUDA_VISIBLE_DEVICES"] = "7";
  Accelerator found = find_accelerator(system_);
  EXPECT_EQ(found.status, AcceleratorStatus::no_device);
  EXPECT_THAT(found.reason, HasSubstr("CUDA_VISIBLE_DEVICES=7"));
  fake.init = 0;
  fake.names.clear();
  EXPECT_EQ(find_accelerator(system_).status, AcceleratorStatus::no_device);
  EXPECT_THAT(opened_, ElementsAre("libcuda.so.1", "libcuda.so.1"));
}

TEST_F(AcceleratorTest, TheLibraryIsLookedForBesideTorchThenInTheNamedFolder) {
  fs::remove(library());
  Accelerator found = find_accelerator(system_);
  EXPECT_EQ(found.status, AcceleratorStatus::library_missing);
  EXPECT_THAT(found.reason, HasSubstr("FERRY_TORCH_DIR"));
  EXPECT_THAT(found.reason, HasSubstr((folder_ / "beside").string()));

  // A libtorch, a Python environment, a site-packages folder.
  for (const char* torch : {"one", "two/lib/python3.11/site-packages/torch", "three/torch"}) {
    touch(folder_ / torch / "lib/libtorch_cpu.so");
    touch(folder_ / torch / "lib/libtorch_cuda.so");
    fs::path named = folder_ / *fs::path(torch).begin();
    environment_["FERRY_TORCH_DIR"] = named.string();
    found = find_accelerator(system_);
    EXPECT_EQ(found.status, AcceleratorStatus::opened) << torch;
    EXPECT_EQ(found.library, folder_ / torch / "lib/libtorch_cuda.so");
  }
  touch(library());
  EXPECT_EQ(find_accelerator(system_).library, library());
}

TEST_F(AcceleratorTest, ALibraryThatDoesNotLoadOrOffersNothing) {
  missing_[library()] = "libcublas.so.13: cannot open shared object file";
  Accelerator found = find_accelerator(system_);
  EXPECT_EQ(found.status, AcceleratorStatus::library_failed);
  EXPECT_THAT(found.reason, HasSubstr("libcublas.so.13"));
  EXPECT_THAT(found.reason, HasSubstr("make deps"));
  missing_.clear();
  count_ = 0;
  found = find_accelerator(system_);
  EXPECT_EQ(found.status, AcceleratorStatus::library_failed);
  EXPECT_THAT(found.reason, HasSubstr("torch offers no device"));
}

// ---- this machine ----

TEST(OpenAccelerator, IsTheSameEachTime) {
  const Accelerator& first = open_accelerator();
  EXPECT_EQ(&first, &open_accelerator());
  EXPECT_NE(first.reason, "");
}

TEST(OpenAccelerator, FindsTheLibtorchThatIsLoaded) {
  fs::path folder = AcceleratorSystem::real().torch_library_folder();
  EXPECT_TRUE(fs::exists(folder / "libtorch_cpu.so")) << folder;
  EXPECT_EQ(find_libtorch(folder.parent_path()), folder.parent_path());
  EXPECT_EQ(find_libtorch("/no/such/folder"), fs::path());
}

template <class E>
std::string error_of(const char* name) {
  try {
    parse_device(name);
  } catch (const E& error) {
    return error.what();
  }
  return "no error";
}

TEST(ParseDevice, NamesTheCpu) {
  unsetenv("FERRY_DEVICE");
  EXPECT_EQ(parse_device("cpu"), at::Device(at::kCPU));
  EXPECT_EQ(parse_device(""), at::Device(at::kCPU));
  EXPECT_THAT(error_of<ArgumentError>("gpu"), HasSubstr("device \"gpu\": expected cpu, auto"));
  EXPECT_THAT(error_of<ArgumentError>("cuda:"), HasSubstr("expected"));
  EXPECT_THAT(error_of<ArgumentError>("cuda:-1"), HasSubstr("expected"));
  EXPECT_THAT(error_of<ArgumentError>("cpu:0"), HasSubstr("no number"));
  setenv("FERRY_DEVICE", "gpu", 1);
  EXPECT_EQ(parse_device("cpu"), at::Device(at::kCPU));
  EXPECT_THAT(error_of<ArgumentError>(""), HasSubstr("FERRY_DEVICE=\"gpu\": expected"));
  unsetenv("FERRY_DEVICE");
}

TEST(ParseDevice, AnAcceleratorOrTheReasonWhyNot) {
  const Accelerator& accelerator = open_accelerator();
  EXPECT_THAT(error_of<DeviceError>("xpu"), HasSubstr("no such device"));
  if (accelerator.found()) {
    EXPECT_EQ(parse_device("auto"), at::Device(at::kCUDA, 0));
    EXPECT_EQ(parse_device("cuda"), at::Device(at::kCUDA, 0));
    EXPECT_THAT(error_of<DeviceError>("cuda:99"), HasSubstr("counted from 0"));
    at::Tensor there = at::ones({2}).to(parse_device("cuda"));
    synchronize(there.device());
    EXPECT_EQ(there.sum().item<float>(), 2);
  } else {
    EXPECT_EQ(parse_device("auto"), at::Device(at::kCPU));
    EXPECT_THAT(error_of<DeviceError>("cuda"), HasSubstr(accelerator.reason));
    EXPECT_THAT(error_of<DeviceError>("cuda:1"), HasSubstr("device \"cuda:1\""));
  }
}

}  // namespace
}  // namespace ferry::tensor
