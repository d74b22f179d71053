#include "ferry/pipelines/image.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <limits>

// jpeglib.h needs cstdio before it.
#include <jpeglib.h>
#ifdef FERRY_WITH_WEBP
#include <webp/decode.h>
#endif

#include "ferry/base/error.h"

namespace ferry::pipelines {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

std::filesystem::path scratch(const std::string& name) {
  return std::filesystem::path(::testing::TempDir()) / name;
}

std::string read_bytes(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// A smooth picture in which every pixel and channel differs.
Image gradient(int width, int height, int channels) {
  Image image{width, height, channels, {}};
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      for (int c = 0; c < channels; ++c) {
        image.pixels.push_back(static_cast<uint8_t>(20 + 4 * x + 3 * y + 20 * c));
      }
    }
  }
  return image;
}

TEST(Image, TensorBecomesPixelsAsInPython) {
  // (x * 0.5 + 0.5).clamp(0, 1) * 255, halves to even: 0.5 -> 127.5 -> 128; -2 and 2 are clamped.
  at::Tensor tensor = at::tensor({0.0f, -1.0f, 1.0f, -2.0f, 2.0f, -0.5f}).reshape({1, 3, 1, 2});
  std::vector<Image> images = images_from_tensor(tensor);
  ASSERT_EQ(images.size(), 1u);
  EXPECT_EQ(images[0].width, 2);
  EXPECT_EQ(images[0].height, 1);
  EXPECT_THAT(images[0].pixels, ::testing::ElementsAre(128, 255, 255, 0, 0, 64));
  // Halves to even: 0.5/255 and 1.5/255 give 0 and 2.
  at::Tensor halves = at::tensor({0.5f / 255, 1.5f / 255, 2.5f / 255}).reshape({1, 1, 3});
  EXPECT_THAT(images_from_tensor(halves, /*do_denormalize=*/false)[0].pixels,
              ::testing::ElementsAre(0, 2, 2));
}

TEST(Image, DenormalizesInTheTensorsDtype) {
  // numpy and PIL of (bf16 tensor * 0.5 + 0.5): 0.3 in bf16 is 0.30078125 -> 0.650390625 -> bf16
  // 0.6484375 -> 165.35
  at::Tensor tensor = at::full({1, 1, 1}, 0.3, at::kBFloat16);
  EXPECT_EQ(images_from_tensor(tensor)[0].pixels[0], 165);
}

TEST(Image, NanIsAnErrorThatCountsThem) {
  at::Tensor tensor = at::zeros({2, 3, 4, 4});
  tensor[1][2][3][3] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT([&] { images_from_tensor(tensor); },
              ThrowsMessage<Error>(HasSubstr("1 NaN values of 96")));
}

TEST(Image, WrongTensorsAreNamed) {
  EXPECT_THAT(
      [] {
        images_from_tensor(at::zeros({2, 4, 4}));
      },
      ThrowsMessage<ArgumentError>(HasSubstr("2 x 4 x 4")));
  EXPECT_THAT(
      [] {
        images_from_tensor(at::zeros({3, 4, 4}, at::kLong));
      },
      ThrowsMessage<ArgumentError>(HasSubstr("Long")));
}

TEST(Image, TensorRoundTrip) {
  Image image = gradient(5, 3, 3);
  at::Tensor tensor = tensor_from_image(image);
  EXPECT_EQ(tensor.sizes(), (at::IntArrayRef{3, 3, 5}));
  EXPECT_EQ(images_from_tensor(tensor.to(at::kFloat) / 127.5 - 1)[0].pixels, image.pixels);
}

TEST(Image, PngRoundTripOfEachKindWithText) {
  for (int channels : {1, 3, 4}) {
    Image image = gradient(7, 5, channels);
    std::filesystem::path path = scratch("picture.PNG");
    std::vector<std::pair<std::string, std::string>> text = {{"prompt", "a red circle"},
                                                             {"Title", "größe 圆"}},
                                                     got;
    save_image(image, path, {.text = text});
    Image loaded = load_png(path, &got);
    EXPECT_EQ(loaded.width, 7);
    EXPECT_EQ(loaded.height, 5);
    EXPECT_EQ(loaded.channels, channels);
    EXPECT_EQ(loaded.pixels, image.pixels);
    EXPECT_EQ(got, text);
  }
}

TEST(Image, BrokenPngFilesAreErrors) {
  std::filesystem::path path = scratch("broken.png");
  save_image(gradient(16, 16, 3), path);
  std::string bytes = read_bytes(path);
  auto expect_refused = [&](const std::string& text, const char* what) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << text;
    EXPECT_THAT([&] { load_png(path); }, ThrowsMessage<FormatError>(HasSubstr(what)));
  };
  expect_refused("JFIF, not a PNG", "no PNG file");
  for (size_t length : {size_t{8}, size_t{20}, size_t{40}, bytes.size() / 2, bytes.size() - 13}) {
    expect_refused(bytes.substr(0, length), "broken PNG");
  }
  std::string flipped = bytes;
  flipped[bytes.size() / 2] ^= 0x55;
  expect_refused(flipped, "broken PNG");
}

TEST(Image, JpegHoldsThePictureAndTheComment) {
  Image image = gradient(32, 16, 3);
  std::filesystem::path path = scratch("picture.jpg");
  save_image(image, path, {.quality = 98, .text = {{"prompt", "a red circle"}}});
  std::string bytes = read_bytes(path);
  EXPECT_THAT(bytes, HasSubstr("prompt: a red circle"));
  jpeg_decompress_struct jpeg;
  jpeg_error_mgr error;
  jpeg.err = jpeg_std_error(&error);
  jpeg_create_decompress(&jpeg);
  jpeg_mem_src(&jpeg, reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size());
  jpeg_read_header(&jpeg, TRUE);
  jpeg_start_decompress(&jpeg);
  ASSERT_EQ(jpeg.output_width, 32u);
  ASSERT_EQ(jpeg.output_height, 16u);
  std::vector<uint8_t> pixels(32 * 16 * 3);
  while (jpeg.output_scanline < 16) {
    JSAMPROW row = pixels.data() + jpeg.output_scanline * 32 * 3;
    jpeg_read_scanlines(&jpeg, &row, 1);
  }
  jpeg_finish_decompress(&jpeg);
  jpeg_destroy_decompress(&jpeg);
  double sum = 0;
  for (size_t i = 0; i < pixels.size(); ++i) sum += std::abs(int{pixels[i]} - int{image.pixels[i]});
  EXPECT_LT(sum / pixels.size(), 4.0);
  EXPECT_THAT([&] { save_image(gradient(4, 4, 4), path); },
              ThrowsMessage<ArgumentError>(HasSubstr("transparency")));
  // A refused picture leaves the file as it was.
  EXPECT_EQ(read_bytes(path), bytes);
}

TEST(Image, Webp) {
  std::filesystem::path path = scratch("picture.webp");
#ifdef FERRY_WITH_WEBP
  Image image = gradient(16, 16, 3);
  save_image(image, path, {.quality = 95});
  std::string bytes = read_bytes(path);
  int width = 0, height = 0;
  uint8_t* pixels =
      WebPDecodeRGB(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), &width, &height);
  ASSERT_NE(pixels, nullptr);
  EXPECT_EQ(width, 16);
  EXPECT_EQ(height, 16);
  EXPECT_NEAR(pixels[3 * (8 * 16 + 8)], image.pixels[3 * (8 * 16 + 8)], 8);
  WebPFree(pixels);
#else
  EXPECT_THAT([&] { save_image(gradient(16, 16, 3), path); },
              ThrowsMessage<ArgumentError>(HasSubstr("built without webp")));
#endif
}

TEST(Image, OtherNamesAndEmptyPicturesAreRefused) {
  Image image = gradient(2, 2, 3);
  EXPECT_THAT([&] { save_image(image, scratch("a.gif")); },
              ThrowsMessage<ArgumentError>(HasSubstr(".gif")));
  EXPECT_THAT([&] { save_image({}, scratch("a.png")); },
              ThrowsMessage<ArgumentError>(HasSubstr("0 x 0")));
  EXPECT_THAT([&] { save_image(image, scratch("a.jpg"), {.quality = 0}); },
              ThrowsMessage<ArgumentError>(HasSubstr("quality")));
  EXPECT_THROW(save_image(image, scratch("no-such-folder") / "a.png"), IoError);
}

}  // namespace
}  // namespace ferry::pipelines
