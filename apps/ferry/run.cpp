#include "run.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <signal.h>
#include <unistd.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

#include <atomic>
#include <cstdio>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <set>
#include <string>
#include <vector>

#include "command.h"
#include "ferry/base/error.h"
#include "ferry/base/log.h"
#include "ferry/base/terminal.h"
#include "ferry/tensor/device.h"

namespace {

constexpr int kFailure = 1;
constexpr int kWrongUse = 2;
constexpr int kStopped = 130;

// Of the command that runs. Never freed: a handler may still be looking at it.
std::atomic<const ferry::StopSource*> stop_source = nullptr;

// The first signal asks the work to stop; a second one ends the process where it is. Files are
// published by rename, so even that leaves nothing half-written.
void on_signal(int) {
  const ferry::StopSource* source = stop_source;
  if (source->stop_requested()) _exit(kStopped);
  source->request_stop();
}

ferry::StopToken install_handlers() {
  auto* source = new ferry::StopSource();
  stop_source = source;
  struct sigaction action {};
  action.sa_handler = on_signal;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  return source->token();
}

int fail(int code, const std::string& message) {
  ferry::terminal::set_status("");
  fmt::print(stderr, "ferry: error: {}\n", message);
  return code;
}

int run(const ferry::cli::Command& command, ferry::cli::Context& context) {
  try {
    int code = command.run(context);
    if (std::fflush(stdout) != 0) return fail(kFailure, "writing to standard output failed");
    return code;
  } catch (const ferry::Cancelled&) {
    fail(kStopped, "stopped");
    return kStopped;
  } catch (const ferry::ArgumentError& error) {
    return fail(kWrongUse, error.what());
  } catch (const ferry::Error& error) {
    return fail(kFailure, error.what());
  } catch (const std::bad_alloc&) {
    return fail(kFailure, "out of memory; try a smaller --weights-memory or a smaller picture");
  } catch (const c10::Error& error) {
    return fail(kFailure, error.what_without_backtrace());
  } catch (const std::exception& error) {
    return fail(kFailure, error.what());
  }
}

// CLI11 lists what an option excludes in the order of the options' addresses, which is the
// allocator's; here it is the order of names.
class HelpFormatter : public CLI::Formatter {
 public:
  std::string make_option_opts(const CLI::Option* option) const override {
    std::string text = CLI::Formatter::make_option_opts(option);
    std::set<std::string> names;
    for (const CLI::Option* other : option->get_excludes()) names.insert(other->get_name());
    if (names.size() < 2) return text;
    const std::string label = get_label("Excludes") + ":";
    return text.substr(0, text.find(label)) + fmt::format("{} {}", label, fmt::join(names, " "));
  }
};

}  // namespace

namespace ferry::cli {

int run_command_line(int argc, char** argv) {
  ferry::tensor::open_accelerator();  // before anything else asks torch for one
  CLI::App app(
      "ferry runs diffusion models in less memory than their weights need: it streams them from "
      "disk "
      "while they compute.",
      "ferry");
  app.set_version_flag("--version", "ferry " FERRY_VERSION);
  app.require_subcommand(1);
  app.fallthrough();  // --quiet and --log-level also after the subcommand
  app.formatter(std::make_shared<HelpFormatter>());  // before the commands, which inherit it
  app.get_formatter()->column_width(34);
  app.footer("ferry COMMAND --help explains each command.");

  Context context;
  std::string log_level;
  app.add_option("--log-level", log_level,
                 "trace, debug, info, warn, error or off [default: warn; or FERRY_LOG]")
      ->type_name("LEVEL");
  app.add_flag("-q,--quiet", context.quiet, "no progress, no log but errors");

  std::vector<Command> commands = {add_generate(app), add_inspect(app),  add_forward(app),
                                   add_schedule(app), add_tokenize(app), add_quantize(app),
                                   add_convert(app),  add_random(app),   add_plan(app),
                                   add_pack(app),     add_cache(app),    add_doctor(app)};
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) {  // --help, --version
      app.exit(error);
      return 0;
    }
    std::string name = "ferry";
    for (const CLI::App* used : app.get_subcommands()) name += " " + used->get_name();
    fail(kWrongUse, fmt::format("{}\n{} --help shows how it is used.", error.what(), name));
    return kWrongUse;
  }

  try {
    if (!log_level.empty()) {
      ferry::log::set_level(ferry::log::parse_level(log_level));
    } else if (context.quiet) {
      ferry::log::set_level(ferry::log::Level::error);
    } else if (getenv("FERRY_LOG") == nullptr) {
      ferry::log::set_level(ferry::log::Level::warn);
    }
  } catch (const ferry::ArgumentError& error) {
    return fail(kWrongUse, error.what());
  }
  context.stop = install_handlers();
  for (const Command& command : commands) {
    if (command.app->parsed()) return run(command, context);
  }
  return kWrongUse;
}

}  // namespace ferry::cli
