#include "ferry/weights/stub.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <cstring>
#include <limits>
#include <vector>

namespace ferry::weights {
namespace {

// A stub's storage is one element followed by this mark, so that is_stub() needs no registry.
constexpr uint64_t kMark = 0x6665727279737475;  // "ferrystu"
constexpr int64_t kStorageBytes = 24;           // element (at most 16 bytes), mark

void write_poison(void* element, at::ScalarType dtype) {
  std::memset(element, 0, 16);
  switch (dtype) {
    case at::kDouble:
      *static_cast<double*>(element) = std::numeric_limits<double>::quiet_NaN();
      break;
    case at::kFloat:
      *static_cast<float*>(element) = std::numeric_limits<float>::quiet_NaN();
      break;
    case at::kHalf:
      *static_cast<uint16_t*>(element) = 0x7e00;
      break;
    case at::kBFloat16:
      *static_cast<uint16_t*>(element) = 0x7fc0;
      break;
    case at::kFloat8_e5m2:
    case at::kFloat8_e4m3fn:
      *static_cast<uint8_t*>(element) = 0x7f;
      break;
    case at::kFloat8_e8m0fnu:
      *static_cast<uint8_t*>(element) = 0xff;
      break;
    case at::kBool:
      *static_cast<uint8_t*>(element) = 1;
      break;
    case at::kChar:
      *static_cast<int8_t*>(element) = std::numeric_limits<int8_t>::min();
      break;
    case at::kShort:
      *static_cast<int16_t*>(element) = std::numeric_limits<int16_t>::min();
      break;
    case at::kInt:
      *static_cast<int32_t*>(element) = std::numeric_limits<int32_t>::min();
      break;
    case at::kLong:
      *static_cast<int64_t*>(element) = std::numeric_limits<int64_t>::min();
      break;
    default:
      std::memset(element, 0xff, 16);
      break;
  }
}

}  // namespace

at::Tensor make_stub(at::IntArrayRef shape, at::ScalarType dtype, at::Device device) {
  // An ordinary tensor also where a model is made in inference mode: set_data wants one.
  c10::InferenceMode off(false);
  at::Tensor bytes = at::empty({kStorageBytes}, at::TensorOptions().dtype(at::kByte));
  auto* data = bytes.mutable_data_ptr<uint8_t>();
  write_poison(data, dtype);
  std::memcpy(data + 16, &kMark, sizeof(kMark));
  if (!device.is_cpu()) bytes = bytes.to(device);
  at::Tensor stub = at::empty({0}, at::TensorOptions().dtype(dtype).device(device));
  stub.set_(bytes.storage(), 0, shape, std::vector<int64_t>(shape.size(), 0));
  return stub;
}

bool is_stub(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.has_storage()) return false;
  for (int64_t stride : tensor.strides()) {
    if (stride != 0) return false;
  }
  const at::Storage& storage = tensor.storage();
  if (storage.nbytes() != kStorageBytes) return false;
  if (!tensor.device().is_cpu()) return true;
  return std::memcmp(static_cast<const uint8_t*>(storage.data()) + 16, &kMark, sizeof(kMark)) == 0;
}

}  // namespace ferry::weights
