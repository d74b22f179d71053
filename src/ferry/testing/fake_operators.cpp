// The fake accelerator's own kernels: memory, views, copies; and the list of composites that run
// whole.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <cstring>

#include "ferry/testing/fake_dispatch.h"
#include "ferry/testing/fake_guard.h"
#include "ferry/testing/fake_memory.h"
#include "ferry/testing/fake_streams.h"

namespace ferry::testing::fake {

// Keeps the bytes, in the current stream's order.
void resize_storage(c10::StorageImpl& storage, size_t bytes) {
  DeviceMemory& memory = DeviceMemory::get();
  c10::DataPtr data = memory.allocate(bytes);
  if (size_t kept = std::min(bytes, storage.nbytes()); kept > 0)
    memory.copy_data(data.get(), storage.data(), kept);
  storage.set_data_ptr_noswap(std::move(data));
  storage.set_nbytes(bytes);
}

namespace {

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

// ---- memory and views ----

at::Tensor empty_memory_format(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                               std::optional<at::Layout>, std::optional<at::Device>,
                               std::optional<bool> pin_memory,
                               std::optional<at::MemoryFormat> memory_format) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_generic(size, &DeviceMemory::get(), kKeys, c10::dtype_or_default(dtype),
                                   memory_format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool> pin_memory) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_strided_generic(size, stride, &DeviceMemory::get(), kKeys,
                                           c10::dtype_or_default(dtype));
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size,
                          std::optional<at::MemoryFormat> memory_format) {
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  if (memory_format && *memory_format != at::MemoryFormat::Preserve)
    impl->empty_tensor_restride(*memory_format);
  const size_t needed = at::detail::computeStorageNbytes(
      self.sizes(), self.strides(), self.itemsize(), static_cast<size_t>(self.storage_offset()));
  c10::StorageImpl& storage = *self.storage().unsafeGetStorageImpl();
  if (needed > storage.nbytes()) resize_storage(storage, needed);
  return self;
}

at::Tensor& set_storage_offset(at::Tensor& self, at::Storage source, int64_t storage_offset,
                               at::IntArrayRef size, at::IntArrayRef stride) {
  std::vector<int64_t> strides = stride.vec();
  if (strides.empty() && !size.empty()) {
    strides.resize(size.size());
    int64_t step = 1;
    for (size_t i = size.size(); i-- > 0; step *= std::max<int64_t>(size[i], 1)) strides[i] = step;
  }
  const size_t needed = at::detail::computeStorageNbytes(size, strides, self.itemsize(),
                                                         static_cast<size_t>(storage_offset));
  TORCH_CHECK(source.device() == self.device(), "set_: the storage is on ", source.device(),
              ", the tensor on ", self.device());
  if (needed > source.nbytes()) resize_storage(*source.unsafeGetStorageImpl(), needed);
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(size, strides, storage_offset);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
  const auto elements = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage_offset(self, std::move(source), 0, {elements}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage_offset(self, source.storage(), source.storage_offset(), source.sizes(),
                            source.strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  return set_storage(self, at::Storage(c10::Storage::use_byte_size_t(), 0, &DeviceMemory::get(),
                                       /*resizable=*/true));
}

// Data of a CPU tensor may replace a device tensor's, and the other way round: set_data().
bool has_compatible_shallow_copy_type(const at::Tensor& self, const at::Tensor& from) {
  auto dense = [](const at::Tensor& tensor) {
    return tensor.layout() == at::kStrided && (tensor.is_cpu() || tensor.is_privateuseone());
  };
  return dense(self) && dense(from);
}

void record_stream(at::Tensor& self, at::Stream stream) {
  DeviceMemory::get().recordStream(self.storage().data_ptr(), stream);
}

// ---- copies ----

void copy_on_device(const at::Tensor& from, const at::Tensor& to) {
  Streams& streams = Streams::get();
  streams.enqueue(streams.current(),
                  {.kind = JobKind::operation,
                   .name = "copy on device",
                   .run = [from = cpu_alias(from), to = cpu_alias(to)] { to.copy_(from); }});
}

at::Tensor host_alias(const at::Tensor& tensor) {
  c10::InferenceMode off(false);
  return at::from_blob(const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(),
                       at::TensorOptions().dtype(tensor.scalar_type()));
}

// One of the two is on the host.
void copy_over_the_bus(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const bool to_device = to.is_privateuseone();
  // As CUDA, which has no other copy over the bus than one of equal bytes: a difference in dtype or
  // order goes through a temporary, and that one is pageable.
  const at::Tensor& host = to_device ? from : to;
  const bool plain =
      from.scalar_type() == to.scalar_type() && host.is_non_overlapping_and_dense() &&
      (host.is_contiguous() || host.strides().equals(to_device ? to.strides() : from.strides()));
  const bool pinned = PinnedMemory::get().owns(host.const_data_ptr());
  const JobKind kind = to_device ? JobKind::host_to_device : JobKind::device_to_host;
  const uint64_t bytes = static_cast<uint64_t>(to.numel()) * to.itemsize();

  at::Tensor source = to_device ? host_alias(from) : cpu_alias(from);
  at::Tensor target = to_device ? cpu_alias(to) : host_alias(to);
  const bool same_order = from.scalar_type() == to.scalar_type() &&
                          from.strides().equals(to.strides()) &&
                          from.is_non_overlapping_and_dense();
  auto run = [=] {
    Streams::get().paced(kind, bytes, [&](uint64_t begin, uint64_t end) {
      if (same_order) {
        std::memcpy(static_cast<std::byte*>(target.data_ptr()) + begin,
                    static_cast<const std::byte*>(source.const_data_ptr()) + begin, end - begin);
      } else if (end == bytes) {
        target.copy_(source);
      }
    });
  };
  Streams& streams = Streams::get();
  const int64_t stream = streams.current();
  const std::string name = to_device ? "copy host to device" : "copy device to host";
  streams.enqueue(stream, {kind, name, bytes, std::move(run)});
  if (non_blocking && pinned && plain) {
    PinnedMemory::get().record_event(
        const_cast<void*>(host.const_data_ptr()), nullptr,
        c10::Stream(c10::Stream::UNSAFE, FakeAccelerator::device(), stream));
    return;
  }
  const char* why = !pinned ? " (pageable)" : !plain ? " (not contiguous)" : " (blocking)";
  streams.synchronize(stream, name + why);
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
  TORCH_CHECK(
      (self.is_cpu() || self.is_privateuseone()) && (dst.is_cpu() || dst.is_privateuseone()),
      "fake accelerator: cannot copy from ", self.device(), " to ", dst.device());
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (dst.numel() == 0 || self.is_same(dst)) return dst;
  at::Tensor from = self.expand(dst.sizes());
  if (self.is_privateuseone() && dst.is_privateuseone()) {
    copy_on_device(from, dst);
  } else {
    copy_over_the_bus(from, dst, non_blocking);
  }
  return dst;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) {
  if (!dst.sizes().equals(self.sizes())) dst.resize_(self.sizes());
  return copy_from(self, dst, /*non_blocking=*/false);
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  at::Scalar value;
  Streams& streams = Streams::get();
  streams.enqueue(streams.current(),
                  {.run = [&value, alias = cpu_alias(self)] { value = alias.item(); }});
  streams.synchronize(streams.current(), "aten::_local_scalar_dense");
  return value;
}

// Composites that would decompose into other kernels than the CPU's, and operations that libtorch
// sends elsewhere for a device of this kind.
constexpr const char* kComposites[] = {
    "linear",
    "layer_norm",
    "rms_norm",
    "group_norm",
    "conv2d",
    "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math",
};
constexpr const char* kWhole[] = {"convolution", "convolution_backward", "native_layer_norm",
                                  "native_group_norm"};

}  // namespace

void register_operators() {
  using c10::DispatchKey;
  using torch::CppFunction;
  // libtorch unregisters what a Library registered when it goes.
  static auto* const all =
      new torch::Library(torch::Library::IMPL, "_", DispatchKey::PrivateUse1, __FILE__, __LINE__);
  all->fallback(CppFunction::makeFromBoxedFunction<&run_boxed>());

  static auto* const own = new torch::Library(torch::Library::IMPL, "aten",
                                              DispatchKey::PrivateUse1, __FILE__, __LINE__);
  own->impl("empty.memory_format", &empty_memory_format);
  own->impl("empty_strided", &empty_strided);
  own->impl("resize_", &resize_);
  own->impl("as_strided", &at::native::as_strided_tensorimpl);
  own->impl("view", &at::native::view);
  own->impl("view_as_complex", &at::native::view_as_complex);
  own->impl("view_as_real", &at::native::view_as_real);
  own->impl("_reshape_alias", &at::native::_reshape_alias);
  own->impl("unfold", &at::native::unfold);
  own->impl("set_.source_Storage_storage_offset", &set_storage_offset);
  own->impl("set_.source_Storage", &set_storage);
  own->impl("set_.source_Tensor", &set_tensor);
  own->impl("set_", &set_nothing);
  own->impl("_has_compatible_shallow_copy_type", &has_compatible_shallow_copy_type);
  own->impl("record_stream", &record_stream);
  own->impl("_copy_from", &copy_from);
  own->impl("_copy_from_and_resize", &copy_from_and_resize);
  own->impl("_local_scalar_dense", &local_scalar_dense);
  for (const char* name : kComposites)
    own->impl(name, CppFunction::makeFromBoxedFunction<&run_boxed>());
  for (const char* name : kWhole) own->impl(name, CppFunction::makeFromBoxedFunction<&run_boxed>());

  static auto* const autograd = new torch::Library(
      torch::Library::IMPL, "aten", DispatchKey::AutogradPrivateUse1, __FILE__, __LINE__);
  for (const char* name : kComposites)
    autograd->impl(name, CppFunction::makeFromBoxedFunction<&run_boxed_autograd>());
}

}  // namespace ferry::testing::fake
