// Runs the ferry that was built beside the tests.
#pragma once

#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <vector>

#include "../io/temp_folder.h"

namespace ferry::testing_apps {

struct Result {
  int code;
  std::string out, err;
};

// What ferry keeps between runs goes where the tests end, unless a test says where.
inline void use_own_cache() {
  static const testing_io::TempFolder cache;
  setenv("FERRY_CACHE_DIR", cache.path().c_str(), /*overwrite=*/0);
}

inline pid_t start(const std::vector<std::string>& arguments, const std::filesystem::path& out,
                   const std::filesystem::path& err) {
  use_own_cache();
  pid_t child = fork();
  if (child != 0) return child;
  if (!freopen(out.c_str(), "w", stdout) || !freopen(err.c_str(), "w", stderr)) _exit(99);
  std::vector<char*> argv = {const_cast<char*>(FERRY_CLI)};
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  execv(FERRY_CLI, argv.data());
  _exit(98);
}

inline Result ferry(const std::vector<std::string>& arguments) {
  testing_io::TempFolder folder;
  pid_t child = start(arguments, folder / "out", folder / "err");
  int status = 0;
  waitpid(child, &status, 0);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status),
          testing_io::read_text(folder / "out"), testing_io::read_text(folder / "err")};
}

// `ferry generate` of a small picture with the tiny pipeline.
inline std::vector<std::string> tiny_picture(const std::filesystem::path& output,
                                             const std::vector<std::string>& more = {},
                                             const std::string& prompt = "a red circle") {
  std::vector<std::string> arguments = {"generate", "--model",
                                        std::string(FERRY_FIXTURES) + "/pipelines/flux-tiny"};
  if (!prompt.empty()) arguments.insert(arguments.end(), {"--prompt", prompt});
  arguments.insert(arguments.end(),
                   {"--width", "48", "--height", "32", "--steps", "2", "--max-sequence-length",
                    "16", "--seed", "5", "--threads", "1", "--output", output.string()});
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

}  // namespace ferry::testing_apps
