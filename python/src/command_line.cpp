// The command line inside the interpreter.
#include <signal.h>

#include <array>
#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

#include "module.h"
#include "run.h"

namespace ferry::python {
namespace {

// The command line installs its own handlers, and expects a pipe that nobody reads to end it, which
// Python ignores. Afterwards the interpreter's are back.
class SignalHandlers {
 public:
  SignalHandlers() {
    for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], nullptr, &kept_[i]);
    struct sigaction action {};
    action.sa_handler = SIG_DFL;
    sigaction(SIGPIPE, &action, nullptr);
  }
  ~SignalHandlers() {
    for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &kept_[i], nullptr);
  }
  SignalHandlers(const SignalHandlers&) = delete;
  SignalHandlers& operator=(const SignalHandlers&) = delete;

 private:
  static constexpr std::array kSignals = {SIGINT, SIGTERM, SIGPIPE};
  std::array<struct sigaction, 3> kept_{};
};

int run_command_line(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "ferry");
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  const SignalHandlers handlers;
  const int status = cli::run_command_line(static_cast<int>(arguments.size()), argv.data());
  std::cout.flush();
  std::fflush(nullptr);
  return status;
}

}  // namespace

void add_command_line(py::module_& module) {
  module.def("run_command_line", &run_command_line, py::arg("arguments"), NoGil(),
             "Runs `ferry ARGUMENTS...` in this process and returns its exit status. Meanwhile "
             "SIGINT and SIGTERM are the command's.");
}

}  // namespace ferry::python
