// A tokenizer's folder that is gone after the test.
#pragma once

#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace ferry::text {

class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "ferry-text-XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp " + name);
    path_ = name;
  }
  // A copy of a committed fixture.
  explicit Folder(const std::string& fixture) : Folder() {
    std::filesystem::copy(std::string(FERRY_FIXTURES "/tokenizers/") + fixture, path_,
                          std::filesystem::copy_options::recursive);
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  Folder& write(const std::string& file, std::string_view content) {
    std::ofstream(path_ / file, std::ios::binary) << content;
    return *this;
  }
  Folder& remove(const std::string& file) {
    std::filesystem::remove(path_ / file);
    return *this;
  }

 private:
  std::filesystem::path path_;
};

}  // namespace ferry::text
