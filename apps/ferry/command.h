// What the subcommands share: the options of every command, and how a command is made known.
#pragma once

#include <c10/core/Device.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ferry/base/progress.h"
#include "ferry/base/stop_token.h"

namespace ferry::cli {

// Given to every command when it runs.
struct Context {
  bool quiet = false;
  StopToken stop;
};

// A progress bar's mode: none with --quiet.
inline ProgressMode progress_mode(const Context& context) {
  return context.quiet ? ProgressMode::quiet : ProgressMode::automatic;
}

// A command's function: runs after parsing, returns the exit code, throws ferry::Error.
using Run = std::function<int(Context&)>;

// Adds the subcommand to `app` and returns what runs it.
struct Command {
  CLI::App* app;
  Run run;
};

Command add_cache(CLI::App& app);
Command add_convert(CLI::App& app);
Command add_doctor(CLI::App& app);
Command add_forward(CLI::App& app);
Command add_generate(CLI::App& app);
Command add_inspect(CLI::App& app);
Command add_plan(CLI::App& app);
Command add_pack(CLI::App& app);
Command add_quantize(CLI::App& app);
Command add_random(CLI::App& app);
Command add_schedule(CLI::App& app);
Command add_tokenize(CLI::App& app);

// Compute threads: `threads` if given, else what OMP_NUM_THREADS or the machine says.
void set_threads(std::optional<int> threads);

// --device: where weights go and computing happens; read by tensor::parse_device().
void add_device(CLI::App* app, std::string& into);

// "name=value" each; a value that is no JSON is a string. Throws ArgumentError.
nlohmann::json parse_arguments(const std::vector<std::string>& items);

// An option's byte size, checked when the command line is parsed, so that a typo is wrong use.
CLI::Option* add_bytes(CLI::App* app, const std::string& flags, std::optional<uint64_t>& into,
                       const std::string& help);
CLI::Option* add_rate(CLI::App* app, const std::string& flags, std::optional<uint64_t>& into,
                      const std::string& help);

// --inputs and --output: safetensors files with named tensors.
void add_tensor_files(CLI::App* app, std::string& inputs, std::string& output);

// Writes `value` as indented JSON, whole or not at all.
void write_json(const std::string& path, const nlohmann::ordered_json& value);

// The folder of an output file exists, or the command fails before any long work.
void check_writable_parent(const std::string& path);

}  // namespace ferry::cli
