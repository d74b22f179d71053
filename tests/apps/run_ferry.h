// Runs the ferry that was built beside the tests.
#pragma once

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

inline pid_t start(const std::vector<std::string>& arguments, const std::filesystem::path& out,
                   const std::filesystem::path& err) {
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

}  // namespace ferry::testing_apps
