#include "command.h"

#include <ATen/Parallel.h>

#include <filesystem>

#include "ferry/base/error.h"
#include "ferry/base/units.h"
#include "ferry/io/atomic_file.h"

namespace ferry::cli {

void set_threads(std::optional<int> threads) {
  if (threads) at::set_num_threads(*threads);
}

void add_device(CLI::App* app, std::string& into) {
  app->add_option("--device", into, "cpu, cuda, cuda:1 or auto [default: cpu; or FERRY_DEVICE]")
      ->type_name("NAME");
}

nlohmann::json parse_arguments(const std::vector<std::string>& items) {
  nlohmann::json arguments = nlohmann::json::object();
  for (const std::string& item : items) {
    size_t split = item.find('=');
    if (split == std::string::npos || split == 0) {
      throw_error<ArgumentError>("--arg {}: expected name=value", item);
    }
    std::string text = item.substr(split + 1);
    auto value = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (value.is_discarded()) value = text;
    if (text == "True" || text == "False") value = text == "True";
    if (text == "None") value = nullptr;
    arguments[item.substr(0, split)] = value;
  }
  return arguments;
}

namespace {

CLI::Option* add_number(CLI::App* app, const std::string& flags, std::optional<uint64_t>& into,
                        const std::string& help,
                        uint64_t (*parse)(std::string_view, std::string_view),
                        const std::string& type) {
  auto set = [&into, flags, parse](const std::string& text) {
    try {
      into = parse(text, flags);
    } catch (const ArgumentError& error) {
      throw CLI::ValidationError(error.what());
    }
  };
  return app->add_option_function<std::string>(flags, set, help)->type_name(type);
}

}  // namespace

CLI::Option* add_bytes(CLI::App* app, const std::string& flags, std::optional<uint64_t>& into,
                       const std::string& help) {
  return add_number(app, flags, into, help, &parse_bytes, "BYTES");
}

CLI::Option* add_rate(CLI::App* app, const std::string& flags, std::optional<uint64_t>& into,
                      const std::string& help) {
  return add_number(app, flags, into, help, &parse_rate, "RATE");
}

void add_tensor_files(CLI::App* app, std::string& inputs, std::string& output) {
  app->add_option("--inputs", inputs, "safetensors file")->required()->type_name("FILE");
  app->add_option("--output", output, "safetensors file to write")->required()->type_name("FILE");
}

void write_json(const std::string& path, const nlohmann::ordered_json& value) {
  io::write_file(path, value.dump(2) + "\n");
}

void check_writable_parent(const std::string& path) {
  if (path.empty()) return;
  auto parent = std::filesystem::absolute(path).parent_path();
  if (!std::filesystem::is_directory(parent)) {
    throw_error<IoError>("{}: the folder {} does not exist; create it first", path,
                         parent.string());
  }
  if (std::filesystem::is_directory(path)) {
    throw_error<IoError>("{}: is a folder, expected the name of a file to write", path);
  }
}

}  // namespace ferry::cli
