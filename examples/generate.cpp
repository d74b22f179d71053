// A picture from a prompt in less memory than the weights: example_generate DIR "a prompt" out.png
#include <cstdio>
#include <exception>

#include "ferry/ferry.h"

int main(int argc, char** argv) try {
  if (argc != 4) return std::fprintf(stderr, "usage: %s MODEL PROMPT OUTPUT.png\n", argv[0]), 2;
  auto pipeline = ferry::Pipeline::load(argv[1], {.weights_memory_bytes = 4 << 20});
  std::stop_source stop;  // stop.request_stop() from anywhere ends the generation
  auto pictures = pipeline.generate({
      .prompt = argv[2],
      .width = 64,
      .height = 64,
      .steps = 20,
      .max_sequence_length = 32,
      .seed = 7,
      .on_progress =
          [](const ferry::PictureProgress& p) {
            std::printf("%s %d/%d\n", p.stage.c_str(), int(p.step), int(p.total));
          },
      .stop = stop.get_token(),
  });
  pictures.front().save(argv[3]);
  std::printf("%s: %.1f MB streamed\n", argv[3], double(pipeline.bytes_streamed()) / 1e6);
} catch (const std::exception& error) {
  return std::fprintf(stderr, "%s\n", error.what()), 1;
}
