#include "ferry/pipelines/image.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>
#include <jpeglib.h>
#include <png.h>

#include <algorithm>
#include <cctype>
#include <csetjmp>
#include <cstdlib>
#include <cstring>
#include <span>

#ifdef FERRY_WITH_WEBP
#include <webp/encode.h>
#endif

#include "ferry/base/error.h"
#include "ferry/io/atomic_file.h"
#include "ferry/io/json_file.h"

namespace ferry::pipelines {

namespace {

using Text = std::vector<std::pair<std::string, std::string>>;

std::string lower_extension(const std::filesystem::path& path) {
  std::string extension = path.extension().string();
  std::transform(extension.begin(), extension.end(), extension.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return extension;
}

bool is_ascii(const std::string& text) {
  return std::all_of(text.begin(), text.end(), [](unsigned char c) { return c < 128; });
}

// ---- PNG ----
// libpng reports errors by longjmp: between setjmp and the last call of libpng in a function there
// are no objects with destructors.

struct PngMessage {
  char text[256] = "";
};

void on_png_error(png_structp png, png_const_charp message) {
  auto* into = static_cast<PngMessage*>(png_get_error_ptr(png));
  std::strncpy(into->text, message, sizeof(into->text) - 1);
  png_longjmp(png, 1);
}
void on_png_warning(png_structp, png_const_charp) {}

void append_png_bytes(png_structp png, png_bytep data, size_t size) {
  auto* out = static_cast<std::string*>(png_get_io_ptr(png));
  // An exception must not cross libpng; out of memory becomes its error.
  bool failed = false;
  try {
    out->append(reinterpret_cast<const char*>(data), size);
  } catch (...) {
    failed = true;
  }
  if (failed) png_error(png, "out of memory");
}

// Returns false with the message set if libpng failed.
bool write_png(const Image& image, std::vector<png_bytep>& rows, std::vector<png_text>& chunks,
               std::string& out, PngMessage& message) {
  png_structp png =
      png_create_write_struct(PNG_LIBPNG_VER_STRING, &message, on_png_error, on_png_warning);
  png_infop info = png ? png_create_info_struct(png) : nullptr;
  if (!info || setjmp(png_jmpbuf(png))) {
    png_destroy_write_struct(&png, &info);
    return false;
  }
  png_set_write_fn(png, &out, append_png_bytes, [](png_structp) {});
  int color = image.channels == 1   ? PNG_COLOR_TYPE_GRAY
              : image.channels == 3 ? PNG_COLOR_TYPE_RGB
                                    : PNG_COLOR_TYPE_RGB_ALPHA;
  png_set_IHDR(png, info, image.width, image.height, 8, color, PNG_INTERLACE_NONE,
               PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
  if (!chunks.empty()) png_set_text(png, info, chunks.data(), static_cast<int>(chunks.size()));
  png_set_rows(png, info, rows.data());
  png_write_png(png, info, PNG_TRANSFORM_IDENTITY, nullptr);
  png_destroy_write_struct(&png, &info);
  return true;
}

std::string encode_png(const Image& image, const SaveOptions& options, const std::string& where) {
  Text text = options.text;  // png_text wants char*, not const char*
  std::vector<png_text> chunks;
  for (auto& [keyword, value] : text) {
    if (keyword.empty() || keyword.size() > 79 || !is_ascii(keyword)) {
      throw_error<ArgumentError>("{}: text keyword \"{}\": expected 1 to 79 ASCII characters",
                                 where, keyword);
    }
    png_text chunk{};
    // tEXt is Latin-1; anything beyond ASCII goes into iTXt, which is UTF-8.
    chunk.compression = is_ascii(value) ? PNG_TEXT_COMPRESSION_NONE : PNG_ITXT_COMPRESSION_NONE;
    chunk.key = keyword.data();
    chunk.text = value.data();
    chunk.text_length = value.size();
    chunk.itxt_length = value.size();
    chunks.push_back(chunk);
  }
  std::vector<png_bytep> rows(image.height);
  size_t stride = static_cast<size_t>(image.width) * image.channels;
  for (int y = 0; y < image.height; ++y)
    rows[y] = const_cast<png_bytep>(image.pixels.data() + y * stride);
  std::string out;
  PngMessage message;
  if (!write_png(image, rows, chunks, out, message))
    throw_error<Error>("{}: cannot encode PNG: {}", where, message.text);
  return out;
}

struct PngSource {
  const std::string* bytes;
  size_t position = 0;
};

void read_png_bytes(png_structp png, png_bytep data, size_t size) {
  auto* source = static_cast<PngSource*>(png_get_io_ptr(png));
  if (size > source->bytes->size() - source->position) png_error(png, "the file ends too early");
  std::memcpy(data, source->bytes->data() + source->position, size);
  source->position += size;
}

struct PngReader {
  png_structp png = nullptr;
  png_infop info = nullptr;
  ~PngReader() { png_destroy_read_struct(&png, &info, nullptr); }
};

bool read_png_header(PngReader& reader) {
  if (setjmp(png_jmpbuf(reader.png))) return false;
  png_read_info(reader.png, reader.info);
  png_set_expand(reader.png);
  png_set_strip_16(reader.png);
  if (png_get_color_type(reader.png, reader.info) == PNG_COLOR_TYPE_GRAY_ALPHA ||
      (png_get_color_type(reader.png, reader.info) == PNG_COLOR_TYPE_GRAY &&
       png_get_valid(reader.png, reader.info, PNG_INFO_tRNS))) {
    png_set_gray_to_rgb(reader.png);
  }
  png_set_interlace_handling(reader.png);
  png_read_update_info(reader.png, reader.info);
  return true;
}

bool read_png_rows(PngReader& reader, png_bytepp rows) {
  if (setjmp(png_jmpbuf(reader.png))) return false;
  png_read_image(reader.png, rows);
  png_read_end(reader.png, reader.info);
  return true;
}

// ---- JPEG ----

struct JpegError {
  jpeg_error_mgr base;
  std::jmp_buf jump;
  char message[JMSG_LENGTH_MAX];
};

void on_jpeg_error(j_common_ptr info) {
  auto* error = reinterpret_cast<JpegError*>(info->err);
  info->err->format_message(info, error->message);
  std::longjmp(error->jump, 1);
}

bool write_jpeg(const Image& image, int quality, const std::string& comment, unsigned char*& data,
                unsigned long& size, JpegError& error) {
  jpeg_compress_struct jpeg;
  jpeg.err = jpeg_std_error(&error.base);
  error.base.error_exit = on_jpeg_error;
  if (setjmp(error.jump)) {
    jpeg_destroy_compress(&jpeg);
    return false;
  }
  jpeg_create_compress(&jpeg);
  jpeg_mem_dest(&jpeg, &data, &size);
  jpeg.image_width = image.width;
  jpeg.image_height = image.height;
  jpeg.input_components = image.channels;
  jpeg.in_color_space = image.channels == 1 ? JCS_GRAYSCALE : JCS_RGB;
  jpeg_set_defaults(&jpeg);
  jpeg_set_quality(&jpeg, quality, TRUE);
  jpeg_start_compress(&jpeg, TRUE);
  if (!comment.empty()) {
    jpeg_write_marker(&jpeg, JPEG_COM, reinterpret_cast<const JOCTET*>(comment.data()),
                      static_cast<unsigned>(comment.size()));
  }
  size_t stride = static_cast<size_t>(image.width) * image.channels;
  while (jpeg.next_scanline < jpeg.image_height) {
    JSAMPROW row = const_cast<JSAMPROW>(image.pixels.data() + jpeg.next_scanline * stride);
    jpeg_write_scanlines(&jpeg, &row, 1);
  }
  jpeg_finish_compress(&jpeg);
  jpeg_destroy_compress(&jpeg);
  return true;
}

std::string encode_jpeg(const Image& image, const SaveOptions& options, const std::string& where) {
  if (image.channels == 4) {
    throw_error<ArgumentError>("{}: JPEG has no transparency; save the RGBA picture as PNG or WebP",
                               where);
  }
  std::string comment;
  for (const auto& [keyword, value] : options.text) comment += keyword + ": " + value + "\n";
  comment.resize(std::min<size_t>(comment.size(), 65533));  // what a marker holds
  unsigned char* data = nullptr;
  unsigned long size = 0;
  JpegError error{};
  bool written = write_jpeg(image, options.quality, comment, data, size, error);
  std::string out(reinterpret_cast<const char*>(data), written ? size : 0);
  std::free(data);
  if (!written) throw_error<Error>("{}: cannot encode JPEG: {}", where, error.message);
  return out;
}

// ---- WebP ----

#ifdef FERRY_WITH_WEBP
std::string encode_webp(const Image& image, const SaveOptions& options, const std::string& where) {
  const Image* source = &image;
  Image rgb;
  if (image.channels == 1) {
    rgb = {image.width, image.height, 3, {}};
    rgb.pixels.reserve(image.pixels.size() * 3);
    for (uint8_t value : image.pixels) rgb.pixels.insert(rgb.pixels.end(), 3, value);
    source = &rgb;
  }
  uint8_t* data = nullptr;
  auto encode = source->channels == 4 ? WebPEncodeRGBA : WebPEncodeRGB;
  size_t size =
      encode(source->pixels.data(), source->width, source->height, source->width * source->channels,
             static_cast<float>(options.quality), &data);
  std::string out(reinterpret_cast<const char*>(data), size);
  WebPFree(data);
  if (size == 0) {
    throw_error<Error>("{}: cannot encode WebP of {} x {} (its limit is {} a side)", where,
                       image.width, image.height, WEBP_MAX_DIMENSION);
  }
  return out;
}
#endif

}  // namespace

at::Tensor denormalize(const at::Tensor& images) {
  return (images * 0.5 + 0.5).clamp(0, 1);
}

std::vector<Image> images_from_tensor(const at::Tensor& images, bool do_denormalize) {
  at::Tensor batch = images.dim() == 3 ? images.unsqueeze(0) : images;
  if (batch.dim() != 4 || !batch.is_floating_point() ||
      (batch.size(1) != 1 && batch.size(1) != 3 && batch.size(1) != 4) || batch.size(2) == 0 ||
      batch.size(3) == 0) {
    throw_error<ArgumentError>(
        "a picture from a tensor: got {} of shape {}, expected floating point [batch, 1, 3 or 4, "
        "height, width]",
        c10::toString(images.scalar_type()), fmt::format("{}", fmt::join(images.sizes(), " x ")));
  }
  int64_t nan_count = batch.isnan().sum().item<int64_t>();
  if (nan_count > 0) {
    throw_error<Error>(
        "the picture has {} NaN values of {}: a model overflowed or read a broken weight. Try "
        "another "
        "dtype for the decoder (vae=fp32) and check the files",
        nan_count, batch.numel());
  }
  if (do_denormalize) batch = denormalize(batch);
  batch =
      batch.to(at::kCPU).permute({0, 2, 3, 1}).to(at::kFloat);  // [batch, height, width, channels]
  // Outside 0..1 Python wraps around; a clamp is what is meant.
  at::Tensor bytes = (batch * 255).round().clamp(0, 255).to(at::kByte).contiguous();
  std::vector<Image> result;
  for (int64_t i = 0; i < bytes.size(0); ++i) {
    at::Tensor one = bytes[i];
    const uint8_t* data = one.const_data_ptr<uint8_t>();
    result.push_back({static_cast<int>(one.size(1)),
                      static_cast<int>(one.size(0)),
                      static_cast<int>(one.size(2)),
                      {data, data + one.numel()}});
  }
  return result;
}

at::Tensor tensor_from_image(const Image& image) {
  at::Tensor pixels = at::empty({image.height, image.width, image.channels}, at::kByte);
  std::copy(image.pixels.begin(), image.pixels.end(), pixels.mutable_data_ptr<uint8_t>());
  return pixels.permute({2, 0, 1}).contiguous();
}

void check_image_extension(const std::filesystem::path& path) {
  std::string extension = lower_extension(path);
  if (extension == ".png" || extension == ".jpg" || extension == ".jpeg") return;
  if (extension == ".webp") {
#ifdef FERRY_WITH_WEBP
    return;
#else
    throw_error<ArgumentError>(
        "{}: this ferry was built without webp (FERRY_WITH_WEBP); save as .png or .jpg",
        path.string());
#endif
  }
  throw_error<ArgumentError>("{}: a picture is saved as .png, .jpg or .webp, got \"{}\"",
                             path.string(), extension);
}

void save_image(const Image& image, const std::filesystem::path& path, const SaveOptions& options) {
  check_image_extension(path);
  std::string where = path.string();
  if (image.width < 1 || image.height < 1 ||
      (image.channels != 1 && image.channels != 3 && image.channels != 4) ||
      image.pixels.size() != static_cast<size_t>(image.width) * image.height * image.channels) {
    throw_error<ArgumentError>("{}: cannot save a picture of {} x {} with {} channels and {} bytes",
                               where, image.width, image.height, image.channels,
                               image.pixels.size());
  }
  if (options.quality < 1 || options.quality > 100) {
    throw_error<ArgumentError>("{}: quality: got {}, expected 1 to 100", where, options.quality);
  }
  std::string extension = lower_extension(path);
  std::string bytes;
  if (extension == ".png") {
    bytes = encode_png(image, options, where);
#ifdef FERRY_WITH_WEBP
  } else if (extension == ".webp") {
    bytes = encode_webp(image, options, where);
#endif
  } else {
    bytes = encode_jpeg(image, options, where);
  }
  io::write_file(path, std::string_view(bytes));
}

Image load_png(const std::filesystem::path& path, Text* text) {
  std::string bytes = io::read_text_file(path);
  std::string where = path.string();
  if (bytes.size() < 8 || png_sig_cmp(reinterpret_cast<png_const_bytep>(bytes.data()), 0, 8) != 0) {
    throw_error<FormatError>("{}: no PNG file (its first 8 bytes differ)", where);
  }
  PngMessage message;
  PngSource source{&bytes};
  PngReader reader;
  reader.png =
      png_create_read_struct(PNG_LIBPNG_VER_STRING, &message, on_png_error, on_png_warning);
  reader.info = reader.png ? png_create_info_struct(reader.png) : nullptr;
  if (!reader.info) throw_error<Error>("{}: libpng does not start", where);
  png_set_user_limits(reader.png, 1 << 16, 1 << 16);
  png_set_read_fn(reader.png, &source, read_png_bytes);
  if (!read_png_header(reader)) throw_error<FormatError>("{}: broken PNG: {}", where, message.text);

  Image image;
  image.width = static_cast<int>(png_get_image_width(reader.png, reader.info));
  image.height = static_cast<int>(png_get_image_height(reader.png, reader.info));
  image.channels = png_get_channels(reader.png, reader.info);
  size_t stride = png_get_rowbytes(reader.png, reader.info);
  if (stride != static_cast<size_t>(image.width) * image.channels || image.channels == 2 ||
      stride * image.height > (size_t{1} << 30)) {
    throw_error<FormatError>("{}: a PNG of {} x {} with {} channels is not supported", where,
                             image.width, image.height, image.channels);
  }
  image.pixels.resize(stride * image.height);
  std::vector<png_bytep> rows(image.height);
  for (int y = 0; y < image.height; ++y) rows[y] = image.pixels.data() + y * stride;
  if (!read_png_rows(reader, rows.data()))
    throw_error<FormatError>("{}: broken PNG: {}", where, message.text);
  if (text) {
    png_textp chunks = nullptr;
    int count = 0;
    png_get_text(reader.png, reader.info, &chunks, &count);
    for (int i = 0; i < count; ++i)
      text->emplace_back(chunks[i].key, chunks[i].text ? chunks[i].text : "");
  }
  return image;
}

}  // namespace ferry::pipelines
