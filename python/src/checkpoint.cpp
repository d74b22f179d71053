#include <ATen/ATen.h>
#include <pybind11/stl.h>

#include <filesystem>

#include "ferry/base/error.h"
#include "ferry/base/units.h"
#include "ferry/tensor/dtype.h"
#include "ferry/weights/binding.h"
#include "ferry/weights/stub.h"
#include "module.h"

namespace ferry::python {

namespace {

// The weights' files of a folder, or one file.
std::vector<weights::StoredTensor> stored_in(const std::string& path, const std::string& variant) {
  if (!std::filesystem::is_directory(path))
    return weights::Checkpoint::open_file(std::filesystem::path(path))->tensors();
  for (const char* base : {"diffusion_pytorch_model", "model"}) {
    const std::string tail = variant.empty() ? "" : "." + variant;
    const std::filesystem::path folder(path);
    if (std::filesystem::exists(folder / (base + tail + ".safetensors")) ||
        std::filesystem::exists(folder /
                                (std::string(base) + ".safetensors.index" + tail + ".json")))
      return weights::Checkpoint::open_folder(folder, base, variant)->tensors();
  }
  throw_error<IoError>(
      "{}: no weights: neither diffusion_pytorch_model nor model .safetensors{} are there", path,
      variant.empty() ? "" : " of variant " + variant);
}

weights::StoredTensor stored_at(std::shared_ptr<io::File> file, const std::string& key,
                                at::ScalarType dtype, std::vector<int64_t> shape, uint64_t offset) {
  weights::StoredTensor stored;
  stored.key = key;
  stored.dtype = tensor::from_torch(dtype);
  stored.shape = std::move(shape);
  stored.file = std::move(file);
  stored.offset = offset;
  stored.size_bytes = io::item_size(stored.dtype);
  for (int64_t extent : stored.shape) stored.size_bytes *= static_cast<uint64_t>(extent);
  if (offset + stored.size_bytes > stored.file->size_bytes()) {
    throw_error<FormatError>("{}: '{}' at {} of {} bytes ends behind the file's {}",
                             stored.file->path().string(), key, offset, stored.size_bytes,
                             stored.file->size_bytes());
  }
  return stored;
}

}  // namespace

void add_checkpoint(py::module_& module) {
  py::class_<io::File, std::shared_ptr<io::File>>(module, "File", "An open file.")
      .def(py::init([](const std::string& path) {
             return std::const_pointer_cast<io::File>(io::File::open(path));
           }),
           py::arg("path"))
      .def_property_readonly("path", [](const io::File& file) { return file.path().string(); })
      .def_property_readonly("inode", [](const io::File& file) { return file.opened().inode; })
      .def("drop_cache", &io::File::drop_cache, NoGil());

  py::class_<weights::StoredTensor>(module, "StoredTensor", "A tensor's place in a file.")
      .def(py::init(&stored_at), py::arg("file"), py::arg("key"), py::arg("dtype"),
           py::arg("shape"), py::arg("offset"))
      .def_readonly("key", &weights::StoredTensor::key)
      .def_readonly("shape", &weights::StoredTensor::shape)
      .def_readonly("offset", &weights::StoredTensor::offset)
      .def_readonly("size_bytes", &weights::StoredTensor::size_bytes)
      .def_property_readonly(
          "dtype", [](const weights::StoredTensor& one) { return tensor::to_torch(one.dtype); })
      .def_property_readonly(
          "path", [](const weights::StoredTensor& one) { return one.file->path().string(); })
      .def("read", &weights::read_stored, NoGil());

  module.def("stored_in", &stored_in, py::arg("path"), py::arg("variant") = "", NoGil());
  module.def("make_stub", &weights::make_stub, py::arg("shape"), py::arg("dtype"),
             py::arg("device"));
  module.def("is_stub", &weights::is_stub, py::arg("tensor"));
  module.def(
      "parse_bytes", [](const std::string& text) { return parse_bytes(text, "size"); },
      py::arg("text"));
  module.def("format_bytes", &format_bytes, py::arg("bytes"));
}

}  // namespace ferry::python
