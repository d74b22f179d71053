// Runs a fuzz target without libFuzzer: every file of the folders given, and a fixed set of
// mutations of each, so that the targets and their seeds are exercised by any compiler.
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

void run(const std::string& bytes) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
}

void run_mutations(const std::string& seed, std::mt19937& random) {
  constexpr int kMutations = 300;
  for (int i = 0; i < kMutations; ++i) {
    std::string bytes = seed;
    for (unsigned edits = 1 + random() % 4; edits > 0 && !bytes.empty(); --edits) {
      size_t at = random() % bytes.size();
      switch (random() % 4) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes.erase(at, 1 + random() % 8);
          break;
        case 2:
          bytes.insert(at, bytes.substr(random() % bytes.size(), random() % 16));
          break;
        default:
          bytes[at] = static_cast<char>(bytes[at] ^ (1 << random() % 8));
          break;
      }
    }
    run(bytes);
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::mt19937 random(1);
  size_t files = 0;
  for (int i = 1; i < argc; ++i) {
    for (const auto& entry : std::filesystem::recursive_directory_iterator(argv[i])) {
      if (!entry.is_regular_file()) continue;
      std::ifstream in(entry.path(), std::ios::binary);
      std::string seed{std::istreambuf_iterator<char>(in), {}};
      run(seed);
      run_mutations(seed, random);
      ++files;
    }
  }
  std::printf("%zu seeds\n", files);
  return files > 0 ? 0 : 1;  // a test without input would prove nothing
}
