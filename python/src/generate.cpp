// ferry.Pipeline and ferry.Picture: the facade (ferry/ferry.h) in Python.
#include <atomic>
#include <mutex>
#include <optional>
#include <stop_token>
#include <thread>

#include "arguments.h"
#include "ferry/base/error.h"
#include "ferry/ferry.h"
#include "interrupt.h"
#include "module.h"
#include "stage_bars.h"

namespace ferry::python {
namespace {

// One generation at a time: a second thread waits for its turn.
class SharedPipeline {
 public:
  explicit SharedPipeline(Pipeline pipeline) : pipeline_(std::move(pipeline)) {}

  // Without the GIL, which a progress callback of the thread that is generating wants.
  std::vector<Picture> generate(const PictureOptions& options) {
    if (generating_ == std::this_thread::get_id())
      throw ArgumentError("generate() is called from its own on_progress");
    std::lock_guard lock(mutex_);
    generating_ = std::this_thread::get_id();
    struct Reset {
      std::atomic<std::thread::id>& id;
      ~Reset() { id = std::thread::id(); }
    } reset{generating_};
    return pipeline_.generate(options);
  }
  uint64_t bytes_streamed() const { return pipeline_.bytes_streamed(); }
  std::string class_name() const { return pipeline_.class_name(); }

 private:
  Pipeline pipeline_;
  std::mutex mutex_;
  std::atomic<std::thread::id> generating_;
};

std::unique_ptr<SharedPipeline> load(const py::object& folder_or_name, const py::object& memory,
                                     const py::object& weights_memory, const py::object& reserve,
                                     const py::object& dtype, const py::object& device,
                                     const py::object& quantize, const py::object& files,
                                     const std::optional<std::string>& variant, int threads) {
  PipelineOptions options;
  options.weights_memory_bytes = bytes_of(weights_memory, "weights_memory").value_or(0);
  options.memory = text_of(memory);
  options.reserve_bytes = bytes_of(reserve, "reserve").value_or(0);
  options.dtype = by_component(dtype);
  options.quantize = by_component(quantize);
  options.device = text_of(device);
  options.variant = variant.value_or("");
  options.threads = threads;
  if (!files.is_none()) {
    for (const auto& [component, file] : files.cast<py::dict>()) {
      options.files[component.cast<std::string>()] =
          path_of(py::reinterpret_borrow<py::object>(file));
    }
  }
  const std::string folder = path_of(folder_or_name);
  const py::gil_scoped_release no_gil;
  return std::make_unique<SharedPipeline>(Pipeline::load(folder, options));
}

std::optional<uint64_t> seed_of(const py::object& seed) {
  if (seed.is_none()) return std::nullopt;
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(seed.ptr()));
  const unsigned long long value = number ? PyLong_AsUnsignedLongLong(number.ptr()) : 0;
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw_error<ArgumentError>("seed: expected an int from 0 to 2^64 - 1, got {}",
                               py::cast<std::string>(py::repr(seed)));
  }
  return value;
}

// Reports each step to Python, or draws bars, and lets Python's signal handlers run. What those or
// the callback raise stops the generation and is raised in its place.
class ProgressReporter {
 public:
  // on_progress: a callable; None draws bars on standard error, as the command line does, and False
  // neither.
  explicit ProgressReporter(py::object on_progress)
      : on_progress_(std::move(on_progress)),
        calls_(!on_progress_.is_none() && !py::isinstance<py::bool_>(on_progress_)),
        bars_(calls_ || on_progress_.equal(py::bool_(false)) ? ProgressMode::quiet
                                                             : ProgressMode::automatic) {
    if (calls_ && PyCallable_Check(on_progress_.ptr()) == 0) {
      throw_error<ArgumentError>(
          "on_progress: expected a callable (stage, step, total), None or False, got {}",
          py::cast<std::string>(py::repr(on_progress_)));
    }
  }

  // On the generating thread, which does not hold the GIL.
  void operator()(const PictureProgress& progress) {
    if (!calls_) bars_.update(progress.stage, progress.step, progress.total);
    const py::gil_scoped_acquire gil;
    try {
      check_signals();
      if (calls_) on_progress_(progress.stage, progress.step, progress.total);
    } catch (py::error_already_set& error) {
      raised_ = std::move(error);
      throw Cancelled();  // through code that knows nothing of Python
    }
  }
  // Throws what was raised meanwhile. REQUIRES: the GIL.
  void rethrow() {
    if (raised_) throw std::move(*raised_);
  }

 private:
  const py::object on_progress_;
  const bool calls_;
  cli::StageBars bars_;
  std::optional<py::error_already_set> raised_;
};

std::vector<std::shared_ptr<Picture>> generate(
    SharedPipeline& pipeline, const std::string& prompt,
    const std::optional<std::string>& negative_prompt, std::optional<int64_t> width,
    std::optional<int64_t> height, std::optional<int64_t> steps,
    std::optional<double> guidance_scale, std::optional<double> true_cfg_scale,
    std::optional<int64_t> max_sequence_length, int64_t num_images, const py::object& seed,
    const py::object& on_progress) {
  PictureOptions options;
  options.prompt = prompt;
  options.negative_prompt = negative_prompt;
  options.width = width;
  options.height = height;
  options.steps = steps;
  options.guidance_scale = guidance_scale;
  options.true_cfg_scale = true_cfg_scale;
  options.max_sequence_length = max_sequence_length;
  options.num_images = num_images;
  options.seed = seed_of(seed);
  ProgressReporter reporter(on_progress);
  options.on_progress = [&reporter](const PictureProgress& progress) { reporter(progress); };
  std::stop_source stop;
  options.stop = stop.get_token();
  std::vector<Picture> pictures;
  {
    const InterruptWatch watch([&stop] { stop.request_stop(); });
    try {
      const py::gil_scoped_release no_gil;
      pictures = pipeline.generate(options);
    } catch (const Cancelled&) {
      reporter.rethrow();
      check_signals();
      throw;
    }
  }
  std::vector<std::shared_ptr<Picture>> result;
  for (Picture& picture : pictures) result.push_back(std::make_shared<Picture>(std::move(picture)));
  return result;
}

py::buffer_info pixels(Picture& picture) {
  const py::ssize_t width = picture.width, height = picture.height;
  return py::buffer_info(picture.rgb.data(), {height, width, py::ssize_t{3}},
                         {3 * width, py::ssize_t{3}, py::ssize_t{1}});
}

py::object to_pil(const py::object& picture) {
  py::module_ images;
  try {
    images = py::module_::import("PIL.Image");
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ImportError)) throw;
    throw Error("to_pil() needs Pillow: pip install pillow; save() writes a picture without it");
  }
  const Picture& self = picture.cast<const Picture&>();
  return images.attr("frombytes")("RGB", py::make_tuple(self.width, self.height),
                                  py::memoryview(picture).attr("tobytes")());
}

py::bytes png(const Picture& picture) {
  const py::object folder = py::module_::import("tempfile").attr("TemporaryDirectory")();
  const std::string path = folder.attr("name").cast<std::string>() + "/picture.png";
  picture.save(path);
  const py::bytes data = py::module_::import("pathlib").attr("Path")(path).attr("read_bytes")();
  folder.attr("cleanup")();
  return data;
}

void add_picture(py::module_& module) {
  py::class_<Picture, std::shared_ptr<Picture>>(module, "Picture", py::buffer_protocol(),
                                                R"(A picture: 8 bits a channel, red green blue.

It is a buffer: `numpy.asarray(picture)` and `memoryview(picture)` are uint8 [height, width, 3] on its
own memory, rows from the top.)")
      .def_readonly("width", &Picture::width, "Pixels.")
      .def_readonly("height", &Picture::height, "Pixels.")
      .def_property_readonly(
          "text",
          [](const Picture& picture) {
            py::dict text;
            for (const auto& [key, value] : picture.text) text[py::str(key)] = value;
            return text;
          },
          "What it was made from (prompt, seed, ...), as it goes into a PNG's text chunks: "
          "dict[str, str].")
      .def_buffer(&pixels)
      .def(
          "numpy",
          [](const py::object& picture) {
            return py::module_::import("numpy").attr("asarray")(picture);
          },
          "uint8 [height, width, 3], on the picture's own memory.")
      .def(
          "save",
          [](const Picture& picture, const py::object& path) {
            const std::string file = path_of(path);
            const py::gil_scoped_release no_gil;
            picture.save(file);
          },
          py::arg("path"),
          "Writes .png, .jpg or .webp, whole or not at all. Raises ArgumentError (another "
          "extension), IoError.")
      .def("to_pil", &to_pil, "A PIL.Image.Image with a copy of the pixels. Needs Pillow.")
      .def("_repr_png_", &png)
      .def("__repr__", [](const Picture& picture) {
        return fmt::format("<ferry.Picture {}x{}>", picture.width, picture.height);
      });
}

}  // namespace

void add_generate(py::module_& module) {
  add_picture(module);
  const auto none = py::none();
  py::class_<SharedPipeline>(module, "Pipeline",
                             R"(A text-to-image pipeline that runs in ferry itself.

Thread-safety: one generation at a time; a second thread waits for its turn.)")
      .def_static("load", &load, py::arg("folder_or_name"), py::kw_only(), py::arg("memory") = none,
                  py::arg("weights_memory") = none, py::arg("reserve") = none,
                  py::arg("dtype") = none, py::arg("device") = none, py::arg("quantize") = none,
                  py::arg("files") = none, py::arg("variant") = none, py::arg("threads") = 0,
                  R"(Loads a folder that diffusers wrote. Reads headers only.

Sizes are bytes, as int or as text ("6GiB", "512MB").

folder_or_name: the folder, or "org/repo[@revision]" in the local Hugging Face cache.
memory: all that ferry may hold where compute happens, or "auto" for what is free, leaving a tenth.
    Weights that do not fit are streamed from disk. None: no limit.
weights_memory: the weights' part alone, in place of memory.
reserve: of memory, what the program keeps for itself.
dtype: "bf16", torch.bfloat16, or by component {"transformer": "bf16", "vae": "fp32"}. None: as stored.
device: "cpu", "cuda", "cuda:1" or "auto". None: $FERRY_DEVICE, else the CPU.
quantize: as it is loaded, once, into the pack cache: "int8wo", or by component.
files: single files in place of components, folders in place of tokenizers, by component.
variant: of the weight files, e.g. "fp16".
threads: compute threads of this process, as torch.set_num_threads() sets them. 0: as they are.

Raises FormatError, IoError, ArgumentError, DeviceError.)")
      .def("generate", &generate, py::arg("prompt"), py::arg("negative_prompt") = none,
           py::kw_only(), py::arg("width") = none, py::arg("height") = none,
           py::arg("steps") = none, py::arg("guidance_scale") = none,
           py::arg("true_cfg_scale") = none, py::arg("max_sequence_length") = none,
           py::arg("num_images") = 1, py::arg("seed") = none, py::arg("on_progress") = none,
           R"(Makes pictures: list[Picture]. What is None is the pipeline's own default.

negative_prompt: with true_cfg_scale above 1.
width, height: pixels.
max_sequence_length: tokens of the prompt.
seed: 0 to 2**64 - 1; the same one gives the same picture as Python diffusers on the CPU. None: random
    (picture.text["seed"] tells).
on_progress: called as on_progress(stage, step, total) with "encode", "denoise" or "decode" and how
    many of its steps are done; what it raises stops the generation. None draws bars on standard
    error, False does not.

Ctrl-C stops within one block of the model and raises KeyboardInterrupt; the pipeline can be used again.
Raises ArgumentError, BudgetError, IoError, DeviceError.)")
      .def_property_readonly("class_name", &SharedPipeline::class_name, "\"FluxPipeline\".")
      .def_property_readonly("bytes_streamed", &SharedPipeline::bytes_streamed,
                             "Bytes read from disk for streamed weights since loading.")
      .def("__repr__", [](const SharedPipeline& pipeline) {
        return fmt::format("<ferry.Pipeline {}>", pipeline.class_name());
      });
}

}  // namespace ferry::python
