// Pictures: from a decoder's tensor to 8-bit pixels to files.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace ferry::pipelines {

// Rows from the top, pixels from the left, channels interleaved, no padding. A plain value.
struct Image {
  int width = 0;
  int height = 0;
  int channels = 3;  // 1 grey, 3 RGB, 4 RGBA
  std::vector<uint8_t> pixels = {};
};

// [..., channels, height, width] in -1..1 -> the same in 0..1: VaeImageProcessor.denormalize.
at::Tensor denormalize(const at::Tensor& images);

// VaeImageProcessor.postprocess(output_type="pil"): [channels, height, width] or [batch, channels,
// height, width], floating point, with 1, 3 or 4 channels, in -1..1 (in 0..1 without
// `do_denormalize`). Throws Error if a value is NaN, saying how many, and ArgumentError for other
// shapes.
std::vector<Image> images_from_tensor(const at::Tensor& images, bool do_denormalize = true);

// [channels, height, width], uint8.
at::Tensor tensor_from_image(const Image& image);

struct SaveOptions {
  // JPEG and WebP, 1 to 100.
  int quality = 95;
  // UTF-8 keywords and texts. PNG: text chunks, in this order. JPEG: one comment. WebP: not
  // written.
  std::vector<std::pair<std::string, std::string>> text = {};
};

// Writes .png, .jpg, .jpeg or .webp (any case), whole or not at all. Throws ArgumentError (another
// extension, RGBA as JPEG, a picture without pixels, WebP in a build without it), IoError.
void save_image(const Image& image, const std::filesystem::path& path,
                const SaveOptions& options = {});
// Throws save_image()'s ArgumentError for an extension, before any work is done for the picture.
void check_image_extension(const std::filesystem::path& path);

// Reads a PNG of any kind as 8 bits; `text` receives its text chunks. Throws IoError, FormatError.
Image load_png(const std::filesystem::path& path,
               std::vector<std::pair<std::string, std::string>>* text = nullptr);

}  // namespace ferry::pipelines
